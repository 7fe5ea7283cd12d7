"""A fitted solver: its plan, the account of its fit, and its file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError, InputError
from ..files import from_json, read_tensors, to_json, write_tensors
from ..ode import ProbabilityFlowODE
from ..plan import Plan
from ..plan.checks import check_weights, has_shape
from ..plan.reading import unpacked
from ..plan.storing import pack, tensors_misfit
from ..schedules import Schedule
from ..schedules.stored import stored_schedule
from ..sharing.card import card_of
from ..sharing.hub import SOLVER, check_repo, pushed
from ..sharing.report import describe_fit, explain_fit, table_of, table_of_weights
from ..sharing.serving import at_scale, checked_scales, measured, range_of
from ..warm_starts import WarmStart
from .provenance import Record, StepReport, later

__all__ = ["FittedSolver", "describe", "read_fit"]

_KIND = "fitted solver"
_PAPERS = {
    "heun": "karras2022edm",
    "ddim": "song2021ddim",
    "spndm": "liu2022pndm",
    "ipndm": "zhang2023deis",
    "dpmpp_2m": "lu2022dpmsolverpp",
}
"""The paper of a base solver, by its key in references.bib."""
_REFERENCES = Path(__file__).with_name("references.bib")


@dataclass(frozen=True, eq=False)
class FittedSolver:
    """A base solver with fitted weights, for one model, schedule and grid, at the cost of its base.

    Attributes
    ----------
    plan : the solver as a plan.
    reports : a report for each fitted step.
    record : provenance of the fit: method, ODE, states, errors and costs.

    Raises
    ------
    MismatchError : in :func:`iia_ode.sample`, if the ODE or the states do not match the fit; see :meth:`check`.
    """

    plan: Plan
    reports: tuple[StepReport, ...]
    record: Record

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.plan.name

    @property
    def grid(self) -> Tensor:
        """The grid of the fit, float64 [N + 1]."""
        return torch.tensor(self.plan.grid, dtype=torch.float64, device="cpu")

    @property
    def nfe(self) -> int:
        """Model evaluations of one run."""
        return self.plan.nfe

    def check(self, ode: ProbabilityFlowODE, x: Tensor | None = None) -> None:
        """Raise if the ODE differs from the ODE of the fit, or x does not fit the weights.

        Number weights fit samples of every shape. Linear maps and constants fit samples of the shape of the fit only.

        Parameters
        ----------
        ode : the ODE to be solved.
        x : states [B, ...] of any dtype; by default only the ODE is compared.

        Raises
        ------
        MismatchError : another schedule, prediction type, set of conditions (names or shapes) or state shape.

        Warns
        -----
        MismatchWarning : another guidance scale, outside of the range of :meth:`serves`.
        FingerprintWarning : the model has other parameters.
        """
        self.record.origin.check(ode, x if has_shape(self.plan) else None, name=self.name)

    def __str__(self) -> str:
        text = describe_fit(self.name, self.plan.steps, self.nfe, self.record, self.reports)
        return text if self.reports else f"{text}\n\n{self.table()}"

    def table(self) -> str:
        """Every coefficient in the paper's symbols, with the residual of each step before and after the fit.

        Without step reports, as after a refinement, the table has the weights of the plan on its initial state and its data
        estimates. Linear maps with few groups have a table per group; maps with many groups have a single table of means.
        """
        return table_of(self.reports) if self.reports else table_of_weights(self.plan)

    def explain(self) -> str:
        """A summary in words: the method, the largest gains, steps with base weights, and the largest weights."""
        return explain_fit(self.plan, self.record, self.reports)

    def after(self, warm: WarmStart) -> FittedSolver:
        """Put a warm start before the solver; the warm start takes the first interval without an evaluation.

        Parameters
        ----------
        warm : map of the first interval, up to the start of this solver.

        Returns
        -------
        A solver that starts at ``warm.t_start``.

        Raises
        ------
        MismatchError : the warm start is for another schedule, or does not end where this solver starts.
        """
        plan = warm.then(self.plan)
        return replace(self, plan=plan, reports=later(self.reports, plan.steps - self.plan.steps))

    # ---- sharing -----------------------------------------------------------------------------------------------------

    def serves(
        self,
        ode: ProbabilityFlowODE,
        x: Tensor,
        scales: Sequence[float],
        *,
        sigma_min: float | None = None,
        progress: bool = False,
    ) -> FittedSolver:
        """Measure the fit at further guidance scales, and record the range of scales that the fit serves.

        At each scale, the endpoint error of the fit and the errors of ``dpmpp_2m``, ``ipndm3`` and ``heun`` on Karras grids
        are measured against accurate states (:class:`~iia_ode.Teacher`). The range reaches from the scale of the fit over
        all measured scales at which the fit is at least as good as the best of these solvers. :meth:`check` and
        :func:`iia_ode.sample` warn outside of the range only. The errors are in ``fit.record.served``.

        Parameters
        ----------
        ode : the ODE of the fit, at any guidance scale.
        x : initial states [B, ...] at ``fit.grid[0]``, float32 or float64; best not the states of the fit.
        scales : the guidance scales to measure.
        sigma_min : level sigma/alpha at which the accurate integration stops, as for :func:`iia_ode.fit`.
        progress : show a bar over the scales.

        Returns
        -------
        The fit with the errors and the range in its record, which replace earlier ones.

        Raises
        ------
        InputError : the scales are no numbers, the scale of the fit is a function of the time, x is no batch of states, or
            the ODE has no null condition.
        MismatchError : the ODE is not the ODE of the fit.

        Examples
        --------
        >>> fit = fit.serves(ode, x, [1.0, 1.5, 2.0, 3.0, 5.0])
        """
        origin = self.record.origin
        numbers = checked_scales(scales, origin.guidance_scale)
        # The scales to measure do not warn.
        replace(origin, serves=(numbers[0], numbers[-1])).check(at_scale(ode, numbers[0]), x, name=self.name)
        found = measured(self.plan, ode, x, numbers, sigma_min, progress)
        origin = replace(origin, serves=range_of(found, origin.guidance_scale))
        return replace(self, record=replace(self.record, origin=origin, served=found))

    def note(self, **values: Any) -> FittedSolver:
        """Add free notes to the record of the fit, for its file and its card.

        The card uses the notes ``model`` (such as ``"owner/name"`` on the hub), ``revision`` and ``license``. Useful further
        notes are ``prompts`` (number and kind of the prompts of the fit) and ``dtype``.

        Parameters
        ----------
        values : notes by name: texts, numbers, lists and dicts as in JSON; None removes a note.

        Returns
        -------
        The fit with the notes; notes of other names stay.

        Raises
        ------
        InputError : a value is not valid in JSON.

        Examples
        --------
        >>> fit.note(model="owner/name", revision="fp16", license="apache-2.0", prompts="64 captions").save(
        ...     "fit.safetensors"
        ... )
        """
        try:
            own = json.loads(json.dumps(values, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"a note must be a text, a finite number, a list or a dict of these: {error}.") from error
        notes = {k: v for k, v in {**self.record.notes, **own}.items() if v is not None}
        return replace(self, record=replace(self.record, notes=notes))

    def card(self, repo: str = "owner/name") -> str:
        """The model card of the fit: use, errors, settings, versions, notes and license.

        The errors stand beside errors of solvers without a fit. For a fit to a pipeline of diffusers, the card also has the
        error of the scheduler in use; see ``iia_ode.diffusers.against``.

        Parameters
        ----------
        repo : name of the repository in the lines on the use of the fit.

        Returns
        -------
        Markdown with a YAML header, for the ``README.md`` of a repository of the Hugging Face hub.
        """
        return card_of(self.plan, self.record, repo, self.citation())

    def push_to_hub(
        self,
        repo: str,
        *,
        file: str = SOLVER,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str | None = None,
        card: bool = True,
    ) -> str:
        """Upload the file of the fit, and its card, to a repository of the Hugging Face hub; needs the extra ``hub``.

        Parameters
        ----------
        repo : name of the repository, such as ``"owner/name"``; made if it does not exist.
        file : name of the file in the repository. Several fits go into one repository under several names.
        revision : branch to commit to; by default the main branch.
        private : whether a new repository is private.
        token : access token; by default the token of ``hf auth login``.
        message : message of the commit.
        card : write the card as the ``README.md`` of the repository.

        Returns
        -------
        Address of the commit.

        Raises
        ------
        InputError : `repo` is no name of a repository.
        MissingDependencyError : huggingface_hub is not installed.
        FileFormatError : the hub refuses the commit, or does not answer.
        """
        check_repo(repo)
        with tempfile.TemporaryDirectory() as folder:
            files = {file: self.save(Path(folder, "fit")).read_bytes()}
        if card:
            files["README.md"] = self.card(repo).encode()
        return pushed(repo, files, message or f"Add {self.name}", revision=revision, private=private, token=token)

    def citation(self) -> str:
        """BibTeX entries of the papers behind IIA and the base; of IIA alone where the base has no paper of its own."""
        keys = ("zhang2024iia", _PAPERS.get(self.record.base.name))
        entries = _REFERENCES.read_text("utf-8").strip().split("\n\n")
        return "\n\n".join(e for e in entries if e.partition("{")[2].partition(",")[0] in keys)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: grid, times and weights as tensors, everything else as JSON in its header.

        Raises
        ------
        FileFormatError : a value in the record or in a report is not valid in a file.
        """
        code, tensors = pack(self.plan)
        header = to_json(_Header(self.name, code, self.record, self.reports))
        from_json(_Header, header, f"the account of {self.name}")
        return write_tensors(path, _KIND, tensors, header)


@dataclass(frozen=True)
class _Header:
    """The header of a file: a plan without its tensors, and the account of the fit."""

    name: str
    code: list[list[Any]]
    record: Record
    reports: tuple[StepReport, ...]


def read_fit(path: str | os.PathLike[str], *, schedule: Schedule | None = None) -> FittedSolver:
    """Read a file of :meth:`FittedSolver.save`; arguments and errors as for :func:`iia_ode.load`."""
    return _built(path, *_read(path), schedule)


def describe(path: str | os.PathLike[str]) -> str:
    """The text of ``print(iia_ode.load(path))``, for any schedule.

    The table of weights needs the schedule. For a file without its schedule, the table of weights is left out.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file.
    """
    tensors, header = _read(path)
    try:
        stored_schedule(path, header.record.origin.schedule, tensors)
    except FileFormatError:
        nfe = sum(item[:1] == ["evaluate"] for item in header.code)
        return describe_fit(header.name, len(tensors["grid"]) - 1, nfe, header.record, header.reports)
    return str(_built(path, tensors, header, None))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], _Header]:
    """Tensors and header of a file, after the checks of checksum and layout."""
    tensors, header = read_tensors(path, _KIND, _Header)
    if problem := tensors_misfit(tensors):
        raise FileFormatError(f"{str(path)!r} is damaged: {problem}.")
    return tensors, header


def _built(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], header: _Header, schedule: Schedule | None
) -> FittedSolver:
    """The fitted solver of a file, on the given schedule or on the stored one."""
    found = stored_schedule(path, header.record.origin.schedule, tensors, schedule)
    plan = unpacked(path, found, header.name, header.code, tensors)
    try:
        check_weights(plan, header.record.origin.state_shape)
    except InputError as error:
        raise FileFormatError(f"{str(path)!r} is damaged: {error}") from error
    return FittedSolver(plan, header.reports, header.record)
