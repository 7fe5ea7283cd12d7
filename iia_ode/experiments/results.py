"""Results of a comparison of solvers: rows of measurements, the states and fits behind them, tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import Tensor

from ..errors import FileFormatError, InputError
from ..files import as_path
from ..iia import FittedSolver
from ..plan import Plan
from .slopes import Slope, slope_of
from .tables import csv_of, error_table, flat_markdown, rows_of_csv, written

__all__ = ["Comparison", "Protocol", "Row"]


@dataclass(frozen=True)
class Row:
    """Measurements of one line of a comparison at one number of evaluations.

    Attributes
    ----------
    solver : name of the line: the solver's name; with several families of grids, followed by ``" on "`` and the family.
    nfe : number of model evaluations per run.
    rmse : root mean square error per component of the final states, against the reference from the same unseen noise, in
        units of the state.
    standard_error : standard error of `rmse` over samples; NaN for a single sample.
    grid : family of the grid; ``""`` for a solver with a grid of its own (a fitted solver, a plan, the solver ``"iia"``).
    fit_samples : number of samples of the fit, 0 for a solver without a fit in the comparison.
    fit_evaluations : batched model evaluations of the fit, 0 without a fit. Accurate trajectories count in full for each
        fit, also where several fits share them.
    fit_seconds : wall-clock time of the fit in seconds, 0 without a fit. Accurate trajectories count in full here too.
    fitted : whether the weights were fitted to a model, in the comparison or before.
    method : name of the solver without the family of grids; by default `solver`.
    sample_evaluations : model evaluations of the run, summed over samples: `nfe` times the number of samples.
    seconds : wall-clock time of a run over all samples in seconds, the median of the timed runs; 0 if not measured. The
        protocol names the device.
    fit_sample_evaluations : model evaluations of the fit, summed over samples, 0 without a fit. A backward pass counts as two
        evaluations. Accurate trajectories count in full.
    """

    solver: str
    nfe: int
    rmse: float
    standard_error: float
    grid: str = ""
    fit_samples: int = 0
    fit_evaluations: int = 0
    fit_seconds: float = 0.0
    fitted: bool = False
    method: str = ""
    sample_evaluations: int = 0
    seconds: float = 0.0
    fit_sample_evaluations: int = 0

    def __post_init__(self) -> None:
        if not self.method:
            object.__setattr__(self, "method", self.solver)


@dataclass(frozen=True)
class Protocol:
    """The conditions of a comparison.

    Attributes
    ----------
    setting : name of the setting, or the given name of any other model.
    schedule : configuration of the noise schedule.
    samples : number of unseen initial states behind every error.
    fit_samples : number of initial states for each fit, drawn apart from the unseen ones.
    target : target of the presets given by name.
    budget : name of the budget of the solver ``"iia"``.
    guidance_scale : scale of classifier-free guidance; None if it is not one number.
    seed : seed of the draws.
    device : device of the states.
    tolerance : relative and absolute tolerance of the reference; None where the reference was given.
    repeats : number of timed runs of each row after the first run; with 0 the first run was timed.
    fingerprint : identity of the model, see :class:`~iia_ode.ode.Fingerprint`.
    surroundings : versions and hardware, by name.
    """

    setting: str
    schedule: Mapping[str, Any]
    samples: int
    fit_samples: int
    target: str
    budget: str
    guidance_scale: float | None
    seed: int
    device: str
    tolerance: float | None = None
    repeats: int = 1
    fingerprint: str = "unknown"
    surroundings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Result of :func:`compare`. ``Comparison(rows)`` makes a comparison from your own measurements, to print and to plot.

    Attributes
    ----------
    rows : measurements, one for each line and each number of evaluations possible for the line.
    solvers : names of the lines, in order; by default the names in the rows.
    nfes : requested numbers of evaluations, in order; by default the numbers in the rows.
    reference : accurate final states [B, ...]; None if unknown.
    samples : final states [B, ...] of each row, by (name of the line, nfe).
    grids : times of each row, float64 [N + 1], by (name of the line, nfe).
    fits : solvers fitted in the comparison, by (name of the line, nfe).
    plans : plan of each row, by (name of the line, nfe).
    protocol : the conditions of the comparison; None if unknown.
    """

    rows: tuple[Row, ...]
    solvers: tuple[str, ...] = ()
    nfes: tuple[int, ...] = ()
    reference: Tensor | None = None
    samples: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    grids: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    fits: Mapping[tuple[str, int], FittedSolver] = field(default_factory=dict)
    protocol: Protocol | None = None
    plans: Mapping[tuple[str, int], Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = tuple(self.rows)
        if not rows or not all(isinstance(row, Row) for row in rows):
            raise InputError("a Comparison takes one iia_ode.experiments.Row or more.")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "solvers", tuple(self.solvers) or tuple(dict.fromkeys(r.solver for r in rows)))
        object.__setattr__(self, "nfes", tuple(self.nfes) or tuple(sorted({r.nfe for r in rows})))

    def error(self, solver: str, nfe: int) -> float | None:
        """Look up an RMSE.

        Parameters
        ----------
        solver : name of the line.
        nfe : number of evaluations.

        Returns
        -------
        The RMSE per component; None if the solver cannot make exactly `nfe` evaluations.
        """
        return next((r.rmse for r in self.rows if (r.solver, r.nfe) == (solver, nfe)), None)

    def table(self, markdown: bool = False) -> str:
        """Format the errors as a table: a line per solver, a column per number of evaluations.

        A star marks the lowest error of a column. A dash means the solver cannot make this number of evaluations.

        Parameters
        ----------
        markdown : whether to write a Markdown table instead of aligned text.

        Returns
        -------
        The table as text.
        """
        errors = {(r.solver, r.nfe): r.rmse for r in self.rows}
        return error_table(errors, self.solvers, self.nfes, markdown=markdown)

    def csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Format all rows as comma-separated values: a header line, and a line for each solver, family of grids and count.

        Parameters
        ----------
        path : file to write, atomically; by default none.

        Returns
        -------
        The text. :meth:`read_csv` reads the rows back without loss.

        Raises
        ------
        OSError : the file cannot be written.
        """
        return written(path, csv_of(Row, self.rows))

    def markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """Format all rows as a Markdown table: a line for each solver, family of grids and count, with errors and costs.

        Parameters
        ----------
        path : file to write, atomically; by default none.

        Returns
        -------
        The text.

        Raises
        ------
        OSError : the file cannot be written.
        """
        text = flat_markdown(self.rows)
        written(path, f"{text}\n")
        return text

    @classmethod
    def read_csv(cls, path: str | os.PathLike[str]) -> Self:
        """Read the rows of :meth:`csv`.

        Parameters
        ----------
        path : the file. Columns other than the fields of :class:`Row` are ignored.

        Returns
        -------
        A comparison with the rows, to print and to plot; states, grids and fits are not in the file.

        Raises
        ------
        FileFormatError : the file is missing, has no rows, lacks a column, or a value has another type.
        """
        source = as_path(path)
        try:
            rows = rows_of_csv(Row, source.read_text("utf-8"), repr(str(source)))
        except (OSError, UnicodeError) as error:
            raise FileFormatError(f"{str(source)!r} is not readable as text: {error}.") from error
        if not rows:
            raise FileFormatError(f"{str(source)!r} has no rows: give a file of Comparison.csv.")
        return cls(rows)

    def slopes(self, least: int = 1, most: int | None = None) -> tuple[Slope, ...]:
        """Observed orders: slopes of log(error) against log(evaluations) by least squares, a slope for each line.

        Parameters
        ----------
        least, most : range of the numbers of evaluations, both included; by default all. Choose the asymptotic range: above
            the counts at which the error does not yet fall as a power, and below the counts at which the error of the
            reference shows.

        Returns
        -------
        The slopes of all lines with two or more counts in the range, in the order of the lines.

        Raises
        ------
        InputError : no line has two counts with positive errors in the range.
        """
        found = []
        for solver in self.solvers:
            points = [(r.nfe, r.rmse) for r in self.rows if r.solver == solver and r.rmse > 0]
            points = [p for p in points if least <= p[0] and (most is None or p[0] <= most)]
            if len({nfe for nfe, _ in points}) > 1:
                found.append(slope_of(solver, *zip(*points, strict=True)))
        if not found:
            counts = ", ".join(map(str, self.nfes))
            raise InputError(
                f"a slope needs two numbers of evaluations in the range from {least} to {most or 'any'}; the comparison has "
                f"{counts}: choose another range or add numbers of evaluations."
            )
        return tuple(found)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of the protocol and the grids, JSON-ready: ``{"setting": ..., ..., "grids": {"heun 5": [...]}}``."""
        about = {} if self.protocol is None else asdict(self.protocol)
        return about | {"grids": {f"{name} {nfe}": grid.tolist() for (name, nfe), grid in self.grids.items()}}
