"""The run of a fit: step after step, the base is traced, its directions are weighted, and the result is guarded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import GuardWarning, InputError
from ..ode import ProbabilityFlowODE
from ..plan import Past, Plan, Tracer, Vector, trace
from ..plan.tracer import take_step
from ..plan.vectors import vector_indices
from .chunks import Chunk, StepSystem
from .directions import StepRecord, Term, resolve_terms
from .gather import Gather
from .guard import too_few, verdict
from .least_squares import LeastSquares, Solution
from .provenance import UNJUDGED, Endpoint, StepReport, finite
from .targets import Target, resolve_target
from .teacher import DEFAULT_WAY, Teacher

if TYPE_CHECKING:
    from .fit import IIA

__all__ = ["RIDGES", "Fitting"]

RIDGES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""What ``ridge="auto"`` chooses from."""

_HUGE = 30.0  # no term of a correction is larger than so many times the state; a larger ridge sees to it
_SLACK = 1.001  # of the ridges with a held-out loss within this factor of the lowest, the largest is chosen

_F64 = torch.float64


@dataclass(frozen=True, eq=False)
class _Choice:
    """What was found for a step, and whether it is to be used."""

    solution: Solution
    ridge: float
    held_before: float | None
    held_after: float | None
    accepted: bool


@dataclass(frozen=True, eq=False)
class Fitting:
    """Everything that one call of :meth:`IIA.fit` works with.

    Attributes
    ----------
    method : the options.
    ode, times : the model and the grid.
    chunks : the samples of this process, those that the fit is about and those that run along.
    begin : where the former begin among them.
    first, total, held_out : the place of that one in the whole batch of the fit, the size of that, and how many are held out
        at its end.
    judged : whether the whole fit is to be judged by its guard.
    teacher : of the samples of this process, if there is one.
    gather : how to share with other processes.
    """

    method: IIA
    ode: ProbabilityFlowODE
    times: list[float]
    chunks: list[Chunk]
    begin: int
    first: int
    total: int
    held_out: int
    judged: bool
    teacher: Teacher | None
    gather: Gather

    @cached_property
    def target(self) -> Target:
        """What steps are fitted to."""
        return resolve_target(self.method.target, self.method.substeps)

    @property
    def ends(self) -> Tensor:
        """Where :meth:`run` took all samples of this process, [B, ...] on the host; those that run along as well."""
        return torch.cat([chunk.values[max(chunk.values)] for chunk in self.chunks])

    def run(self, progress: bool) -> tuple[Plan, tuple[StepReport, ...], Endpoint]:
        """The plan, the report of each fitted step, and the outcome of the guard."""
        base = self.method.base_solver
        _, terms = resolve_terms(self.method.terms, base.label)
        name = self.method.name or f"iia({base.label})"
        tracer, x, memory = Tracer(self.ode.schedule), Vector({0: 1.0}), ()
        records: tuple[StepRecord, ...] = ()
        reports: list[StepReport] = []
        intervals = list(zip(self.times[:-1], self.times[1:], strict=True))
        for i, (t, s) in enumerate(tqdm(intervals, desc=f"fit {name}", disable=not progress)):
            seen = len(tracer.evaluations)
            y, memory = take_step(base, tracer, x, t, s, Past(memory, i, len(intervals) - 1 - i))
            made = tuple(tracer.evaluations[seen:])
            record = StepRecord(i, t, s, x, made, tracer.known(x, t), self.ode.is_data(s), y, y)
            candidates = terms(record, records)
            if not isinstance(candidates, tuple) or not all(isinstance(term, Term) for term in candidates):
                raise InputError(
                    f"terms must be a function that returns a tuple of iia_ode.iia.Term, got {candidates!r}."
                )
            if candidates:
                choice = self._choose(tracer, record, candidates)
                reports.append(_report(record, candidates, choice))
                if choice.accepted:
                    pairs = list(zip(reports[-1].corrections, candidates, strict=True))
                    own = sum((c * term.direction for c, term in pairs if not term.history), start=y)
                    y = sum((c * term.direction for c, term in pairs if term.history), start=own)
                    record = replace(record, own=own)
                    if choice.solution.constant is not None:
                        y = y + choice.solution.constant
            x = tracer.hold(y, step=i + 1)
            records = (record, *records)[: self.method.history]
            live = tracer.retain(vector_indices((x, memory, records)))
            for chunk in self.chunks:
                chunk.advance(tracer, live)
        plan = Plan(self.ode.schedule, tuple(self.times), tuple(tracer.code), name)
        return self._guarded(plan, tuple(reports))

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _choose(self, tracer: Tracer, record: StepRecord, candidates: tuple[Term, ...]) -> _Choice:
        """The least squares of one step, on the training samples, and how it does on the others."""
        fork = tracer.fork()
        aim = self.target.aim(fork, self.method.base_solver, record)
        system = StepSystem(tracer, fork, record, candidates, aim)
        train, held = (LeastSquares(len(candidates), intercept=self.method.intercept) for _ in range(2))
        sizes = torch.zeros(len(candidates) + 1, dtype=_F64, device="cpu")
        for chunk in self.chunks:
            if chunk.own.stop > chunk.own.start:
                sizes += system.add(chunk, train, held, self._cut(chunk))
        train, held = (self.gather.merged(part) for part in (train, held))
        *_, size = sizes = self.gather.sum(sizes).sqrt()
        noise = sizes[:-1]
        auto = self.method.ridge == "auto"
        ridges: tuple[float, ...] = RIDGES if auto else (float(self.method.ridge),)
        if self.method.guard and not auto:
            ridges += tuple(r for r in RIDGES if r > ridges[0])
        found = [train.solve(ridge=ridge, noise=noise) for ridge in ridges]
        # Terms that are huge and cancel on these samples need not on the next one.
        sound = [i for i, s in enumerate(found) if s.largest <= _HUGE * float(size)] or [len(found) - 1]
        best = sound[0] if self.method.guard or auto else 0
        if not held.samples:
            return _Choice(found[best], ridges[best], None, None, True)
        if auto:
            losses = {i: held.residual(found[i].coefficients, found[i].constant) for i in sound}
            least = min(losses.values())
            best = max((i for i in sound if losses[i] <= _SLACK * least), default=sound[-1])
        chosen = found[best]
        before = held.residual(torch.zeros_like(chosen.coefficients), None)
        after = held.residual(chosen.coefficients, chosen.constant)
        return _Choice(chosen, ridges[best], before, after, not self.method.guard or after < before)

    def _cut(self, chunk: Chunk) -> int:
        """How many of a chunk's samples, from its first, are fitted to; the rest are held out."""
        own = chunk.own_samples
        left: int = self.total - self.held_out - self.first - (own.index.start - self.begin)
        return min(max(left, 0), len(own.initial))

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def _guarded(self, plan: Plan, reports: tuple[StepReport, ...]) -> tuple[Plan, tuple[StepReport, ...], Endpoint]:
        """The fit if its final states are clearly nearer the truth than the base's; else the base, and a warning."""
        if not (self.judged and any(r.accepted for r in reports)):
            return plan, reports, UNJUDGED
        base = trace(
            self.method.base_solver, plan.schedule, torch.tensor(plan.grid, dtype=_F64, device="cpu"), consistent=False
        )
        if self.held_out:
            squares = torch.zeros(self.total, 3, dtype=_F64, device="cpu")  # everyone fills in its own samples
            for chunk in self.chunks:
                self._fill(squares, chunk, base, len(plan.code))
            squares = self.gather.sum(squares)[0 if self.teacher is not None else self.total - self.held_out :]
            found = verdict(squares, self.held_out, 100 * torch.finfo(self.chunks[0].samples.initial.dtype).eps)
            way = DEFAULT_WAY if self.teacher is None else self.teacher.way
            reference = ", ".join(f"{k} {v}" for k, v in way.items())
            seen = (
                f"on the {self.held_out} held-out samples it ends {found.fit:.3g} from the truth, the base {found.base:.3g} "
                "(root mean square); "
            )
        else:
            found, seen, reference = too_few(self.total), "", UNJUDGED.reference
        outcome = Endpoint(
            base=finite(found.base),
            fit=finite(found.fit),
            fell_back=not found.kept,
            reference=reference,
            why="" if found.kept else found.why,
        )
        if found.kept:
            return plan, reports, outcome
        other = "" if self.target.needs_teacher else " or another target (target='trajectory' repairs earlier error)"
        warnings.warn(
            f"{plan.name} is not clearly better than its base: {seen}{found.why}. So the base is kept. Fit on more samples, "
            f"with other terms{other}, with a ridge, or pass guard=False to have the fit anyway.",
            GuardWarning,
            stacklevel=6,
        )
        return replace(base, name=plan.name), tuple(_refused(r) for r in reports), outcome

    def _fill(self, squares: Tensor, chunk: Chunk, base: Plan, final: int) -> None:
        """Write the errors of base and fit and the sizes of the true ends of a chunk's samples into [total, 3].

        Mean squares per component; of the held-out samples, and of all where the teacher knows where those should end.
        """
        own = chunk.samples
        n = len(own.initial)
        first = 0 if self.teacher is not None else self._cut(chunk)
        if first == n:
            return
        ode, x = own.ode.subset(slice(first, n), n), own.initial[first:].to(chunk.device)
        if self.teacher is not None:
            exact = self.teacher.at(self.times[-1], own.index)
        else:
            exact = Teacher.for_grid(ode, x, self.times).final
        exact = exact.double().cpu()
        by_base = base.run(ode, x, check_finite=False).cpu().double()
        by_fit = chunk.values[final][first:].double()
        parts = [by_base - exact, by_fit - exact, exact]
        start = self.first + own.index.start
        squares[start + first : start + n] = torch.stack([p.flatten(1).square().mean(dim=1) for p in parts], dim=1)


def _report(record: StepRecord, candidates: tuple[Term, ...], choice: _Choice) -> StepReport:
    solution = choice.solution
    corrections = tuple(solution.coefficients.tolist()) if choice.accepted else (0.0,) * len(candidates)
    constant = solution.constant if choice.accepted else None
    return StepReport(
        index=record.index,
        t=record.t,
        s=record.s,
        symbols=tuple(term.symbol for term in candidates),
        values=tuple(term.base + term.unit * c for term, c in zip(candidates, corrections, strict=True)),
        base_values=tuple(term.base for term in candidates),
        corrections=corrections,
        before=solution.before,
        after=solution.after,
        held_before=choice.held_before,
        held_after=choice.held_after,
        accepted=choice.accepted,
        rank=solution.rank,
        condition=solution.condition,
        ridge=choice.ridge,
        intercept=0.0 if constant is None else float(constant.square().mean().sqrt()),
    )


def _refused(report: StepReport) -> StepReport:
    zero = (0.0,) * len(report.corrections)
    return replace(report, values=report.base_values, corrections=zero, accepted=False, intercept=0.0)
