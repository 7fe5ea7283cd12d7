"""Results of a comparison of solvers: rows of measurements, the states and fits behind them, tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..iia import FittedSolver

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
        width = max(len("solver / NFE"), *(len(s) for s in self.solvers))
        best = {
            n: min((e for s in self.solvers if (e := self.error(s, n)) is not None), default=None) for n in self.nfes
        }
        # Four decimals, or four digits where an error is too small for them: data may have any unit.
        small = min((r.rmse for r in self.rows if r.rmse > 0), default=1.0) < 1e-3
        style = ".3e" if small or max(r.rmse for r in self.rows) >= 1e4 else ".4f"

        def cell(solver: str, nfe: int) -> str:
            error = self.error(solver, nfe)
            return "-" if error is None else f"{error:{style}}{'*' if error == best[nfe] else ' '}"

        column = 8 if style == ".4f" else 11
        body = [[f"{s:<{width}}", *(f"{cell(s, n):>{column}}" for n in self.nfes)] for s in self.solvers]
        head = [f"{'solver / NFE':<{width}}", *(f"{n:>{column}}" for n in self.nfes)]
        if not markdown:
            return "\n".join(" ".join(row) for row in (head, *body))
        rule = ["-" * width, *(f"{'-' * (column - 1)}:" for _ in self.nfes)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))

    def csv(self) -> str:
        """Format all rows as comma-separated values, with a header line."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in self.rows)
        return out.getvalue()

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of the protocol and the grids, JSON-ready: ``{"setting": ..., ..., "grids": {"heun 5": [...]}}``."""
        about = {} if self.protocol is None else asdict(self.protocol)
        return about | {"grids": {f"{name} {nfe}": grid.tolist() for (name, nfe), grid in self.grids.items()}}
