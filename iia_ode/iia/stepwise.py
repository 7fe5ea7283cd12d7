"""The sequential fit: each step of the base is traced, corrected by least squares, and the whole result is guarded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import GuardWarning, InputError, NonFiniteError, warn
from ..metrics import flat
from ..plan import Past, Plan, Tracer, Vector, evaluator, run_code, trace
from ..plan.checks import samples_of
from ..plan.tracer import take_step
from ..plan.vectors import vector_indices, weight_mean_square
from ..solvers import Solver
from ..teacher import Integration
from ..teacher.teacher import DEFAULT
from .batch import Batch
from .directions import StepRecord, Term, Terms
from .least_squares import LeastSquares, Solution
from .provenance import UNJUDGED, Endpoint, Split, StepReport, finite
from .ranking import Range, samples_against, too_few, verdict
from .targets import Target

__all__ = ["RIDGES", "Stepwise", "StepwiseFit"]

RIDGES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Candidates of ``ridge="auto"``."""

_HUGE = 30.0  # largest term of a correction, relative to the state; a larger ridge is taken otherwise
_SLACK = 1.001  # of the ridges with a held-out loss within this factor of the lowest, the largest is chosen

_F64 = torch.float64


@dataclass(frozen=True, eq=False)
class _Choice:
    """The least-squares solution of a step, and the decision to use the solution or to keep the base."""

    solution: Solution
    ridge: float
    held_before: float | None
    held_after: float | None
    accepted: bool


@dataclass(frozen=True, eq=False)
class StepwiseFit:
    """Result of a sequential fit.

    Attributes
    ----------
    plan : the fitted solver; the base where the guard refused the fit.
    reports : a report of each fitted step.
    endpoint : errors of the final states.
    split : number of samples, and of held-out samples among them.
    """

    plan: Plan
    reports: tuple[StepReport, ...]
    endpoint: Endpoint
    split: Split


@dataclass(frozen=True, eq=False)
class Stepwise:
    """A sequential fit with every option resolved; see :class:`~iia_ode.IIA` for the options.

    Attributes
    ----------
    base, terms, target, history, ridge, guard, intercept, last_step : the method.
    name : name of the resulting plan.
    """

    base: Solver
    terms: Terms
    target: Target
    history: int
    ridge: float | str
    guard: bool
    intercept: bool
    last_step: bool
    name: str

    @torch.no_grad()
    def fit(self, batch: Batch, times: list[float], held_out: float, *, progress: bool = False) -> StepwiseFit:
        """Fit the steps in order, each on the states after the fitted steps before.

        Parameters
        ----------
        batch : samples without copies, with a teacher if the target needs a teacher.
        times : the grid.
        held_out : share of held-out samples, the last of the batch. With a share of 0 there is no guard.
        progress : show a bar over the steps.
        """
        held = min(max(1, int(held_out * len(batch))), len(batch) - 1) if held_out and len(batch) >= 4 else 0
        tracer, x, memory = Tracer(batch.ode.schedule), Vector({0: 1.0}), ()
        records: tuple[StepRecord, ...] = ()
        reports: list[StepReport] = []
        chunks: list[Chunk] = []
        for part in batch.chunks():
            chunks.append(Chunk(part, sum(len(c.batch) for c in chunks), batch.device))
        intervals = list(zip(times[:-1], times[1:], strict=True))
        for i, (t, s) in enumerate(tqdm(intervals, desc=f"fit {self.name}", disable=not progress)):
            seen = len(tracer.evaluations)
            y, memory = take_step(self.base, tracer, x, t, s, Past(memory, i, len(intervals) - 1 - i))
            made = tuple(tracer.evaluations[seen:])
            record = StepRecord(i, t, s, x, made, tracer.known(x, t), batch.ode.is_data(s), y, y)
            left = record.to_data and not self.last_step
            candidates = () if left else self.terms(record, records)
            if not isinstance(candidates, tuple) or not all(isinstance(term, Term) for term in candidates):
                raise InputError(
                    f"terms must be a function that returns a tuple of iia_ode.iia.Term, got {candidates!r}."
                )
            if candidates:
                systems = self._systems(tracer, record, candidates, chunks, len(batch) - held)
                try:
                    choice = self._choose(*systems)
                except NonFiniteError as error:
                    raise NonFiniteError(f"{error} {_culprits(chunks)}") from error
                reports.append(_report(record, candidates, choice))
                if choice.accepted:
                    y, record = _corrected(record, candidates, reports[-1].corrections, choice.solution.constant)
            x = tracer.hold(y, step=i + 1)
            records = (record, *records)[: self.history]
            live = tracer.retain(vector_indices((x, memory, records)))
            for chunk in chunks:
                chunk.advance(tracer, live)
        plan = Plan(batch.ode.schedule, tuple(times), tuple(tracer.code), self.name)
        fit = StepwiseFit(plan, tuple(reports), UNJUDGED, Split(len(batch), held))
        judged = self.guard and held_out > 0 and any(r.accepted for r in reports)
        return self._guarded(fit, batch, chunks) if judged else fit

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _systems(
        self, tracer: Tracer, record: StepRecord, candidates: tuple[Term, ...], chunks: list[Chunk], train: int
    ) -> tuple[LeastSquares, LeastSquares, LeastSquares, Tensor]:
        """The least-squares problems of one step, on the first `train` samples, on the others and on all.

        Only a choice of the ridge without a guard uses the problem on all samples. The last value has, for the first `train`
        samples, the norm of the rounding error of each direction and the norm of the base's result, float64 [k + 1] on the
        host.
        """
        fork = tracer.fork()
        aim = self.target.aim(fork, self.base, record)
        start, result = fork.hold(record.x), fork.hold(record.base)
        columns = [fork.hold(term.direction) for term in candidates]
        end, numeric = (fork.hold(aim), None) if isinstance(aim, Vector) else (start, aim)
        own, held, whole = (LeastSquares(len(candidates), intercept=self.intercept) for _ in range(3))
        sizes = torch.zeros(len(candidates) + 1, dtype=_F64, device="cpu")
        for chunk in chunks:
            values = chunk.explore(tracer, fork)
            wanted = _read(values, end)
            wanted = wanted if numeric is None else numeric(chunk.batch, wanted)
            # In float64 before the difference: a residual is small against the states at high noise.
            base = _read(values, result).cpu().double()
            residual, directions = wanted.cpu().double() - base, [_read(values, c) for c in columns]
            cut = min(max(train - chunk.first, 0), len(base))
            own.add([d[:cut] for d in directions], residual[:cut])
            held.add([d[cut:] for d in directions], residual[cut:])
            if self.ridge == "auto" and not self.guard:
                whole.add(directions, residual)
            sizes[:-1] += _rounding(values, candidates, cut)
            sizes[-1] += base[:cut].square().sum()
        return own, held, whole, sizes.sqrt()

    def _choose(self, own: LeastSquares, held: LeastSquares, whole: LeastSquares, sizes: Tensor) -> _Choice:
        """The solution of one step with a sound ridge, and the decision of the held-out samples.

        Where the held-out samples have only chosen the ridge, the solution is that of all samples with this ridge.
        """
        auto = self.ridge == "auto"
        ridges: tuple[float, ...] = RIDGES if auto else (float(self.ridge),)
        if self.guard and not auto:
            ridges += tuple(r for r in RIDGES if r > ridges[0])
        found = [own.solve(ridge=ridge, noise=sizes[:-1]) for ridge in ridges]
        # Huge terms that cancel on these samples need not cancel on the next one.
        sound = [i for i, s in enumerate(found) if s.largest <= _HUGE * float(sizes[-1])] or [len(found) - 1]
        best = sound[0] if self.guard or auto else 0
        if not held.samples:
            return _Choice(found[best], ridges[best], None, None, True)
        if auto:
            losses = {i: held.residual(found[i].coefficients, found[i].constant) for i in sound}
            least = min(losses.values())
            best = max((i for i in sound if losses[i] <= _SLACK * least), default=sound[-1])
        chosen = found[best]
        before = held.residual(torch.zeros_like(chosen.coefficients), None)
        after = held.residual(chosen.coefficients, chosen.constant)
        if whole.samples:
            again = whole.solve(ridge=ridges[best], noise=sizes[:-1])
            if again.largest <= _HUGE * float(sizes[-1]) * math.sqrt(whole.samples / own.samples):
                chosen = again
        return _Choice(chosen, ridges[best], before, after, not self.guard or after < before)

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def _guarded(self, fit: StepwiseFit, batch: Batch, chunks: list[Chunk]) -> StepwiseFit:
        """The fit if its final states are clearly nearer the truth than the base's; otherwise the base, and a warning."""
        plan, held_out = fit.plan, fit.split.held_out
        grid = torch.tensor(plan.grid, dtype=_F64, device="cpu")
        base = trace(self.base, plan.schedule, grid, consistent=False)
        if held_out:
            judged = batch if batch.teacher is not None else batch[len(batch) - held_out :]
            exact, error, reference = _truth(judged, base)
            first = len(batch) - len(judged)
            parts = (chunk.squares(base, len(plan.code), first, exact) for chunk in chunks)
            squares = torch.cat([p for p in parts if p is not None])
            found = verdict(squares, held_out, 100 * torch.finfo(batch.x.dtype).eps)
            ends = Range.of(torch.cat([chunk.values[len(plan.code)] for chunk in chunks]), len(squares))
            against = samples_against(float((squares[:, 0] - squares[:, 1]).mean()), ends.reach)
            # Training samples are measured, but favor the fit: only held-out samples are counted as judges.
            like = None if found.needed is None else math.ceil(found.needed * held_out / len(squares))
            number, needed = held_out, against if found.kept else like
            samples = f"{held_out} held-out sample{'s' * (held_out > 1)}"
            seen = f"on {samples} its RMSE is {found.fit:.3g}, and the base's {found.base:.3g}; "
        else:
            found, seen, reference, error = too_few(len(batch)), "", UNJUDGED.reference, None
            number, needed, ends = 0, None, Range(0.0, 0)
        why = "" if found.kept else found.why
        errors = finite(found.base), finite(found.fit)
        endpoint = Endpoint(*errors, not found.kept, reference, why, number, needed).known_to(error)
        if found.kept:
            if ends.strays:
                warn(
                    f"{plan.name} is kept, but {ends.strays} of {len(batch)} samples end where no judged sample does: "
                    f"{endpoint.limits}. Give more samples, a larger held_out, or a teacher, which measures all samples.",
                    GuardWarning,
                )
            return replace(fit, endpoint=endpoint)
        limits = f"; {endpoint.limits}" if endpoint.limits else ""
        other = "" if self.target.needs_teacher else " or another target (target='trajectory' repairs earlier error)"
        warn(
            f"{plan.name} is not clearly better than its base, which is kept: {seen}{found.why}{limits}. Fit on more samples, "
            f"with other terms{other}, or with a ridge; guard=False keeps the fit anyway.",
            GuardWarning,
        )
        reports = tuple(_refused(r) for r in fit.reports)
        return replace(fit, plan=replace(base, name=plan.name), reports=reports, endpoint=endpoint)


def _culprits(chunks: Iterable[Chunk]) -> str:
    """The samples with NaN or infinity in a vector of the trace, in words."""
    found = [
        chunk.first + int(i)
        for chunk in chunks
        for i in (~torch.stack([flat(v).isfinite().all(dim=1) for v in chunk.values.values()]).all(dim=0)).nonzero()
    ]
    return f"Not finite: {samples_of(found)}." if found else ""


class Chunk:
    """The vectors of a part of a batch, while the plan grows.

    Between steps the vectors rest on the host, so the model's device holds the vectors of a single chunk at a time.

    Parameters
    ----------
    batch : the samples.
    first : index of the first sample in the whole batch.
    device : device of the model.
    """

    def __init__(self, batch: Batch, first: int, device: torch.device) -> None:
        self.batch, self.first, self.device = batch, first, device
        self.values: dict[int, Tensor] = {0: batch.x.cpu()}
        self._evaluate, self._done = evaluator(batch.ode), 0

    def advance(self, tracer: Tracer, live: set[int]) -> None:
        """Run the new instructions of the trace, and drop the vectors outside `live`."""
        needed = {j for instruction in tracer.code[self._done :] for j in instruction.reads}
        if needed:
            values = self._loaded(needed & self.values.keys())
            for _ in run_code(tracer.code, values, self._evaluate, start=self._done):
                pass
            self._store(values, tracer)
        self.values = {j: v for j, v in self.values.items() if j in live}

    def explore(self, tracer: Tracer, fork: Tracer) -> dict[int, Tensor]:
        """All vectors at the end of a fork, on the device. The vectors of the trace itself are stored, the others are not."""
        values = self._loaded(self.values.keys())
        for code in (tracer.code, fork.code):
            for _ in run_code(code, values, self._evaluate, start=self._done):
                pass
            if code is tracer.code:
                self._store(values, tracer)
        return values

    def squares(self, base: Plan, final: int, first: int, exact: Tensor) -> Tensor | None:
        """Mean squares of base error, fit error and true final state of the samples from `first` on, [n, 3] on the host.

        The index of the fit's last vector is `final`, and `exact` has the true final states of the samples from `first` on,
        float64 on the host. Without samples from `first` on, the result is None.
        """
        own = max(first - self.first, 0)
        if own >= len(self.batch):
            return None
        part, place = self.batch[own:], self.first + own - first
        truth = exact[place : place + len(part)]
        by_base = base.run(part.ode, part.x.to(self.device), check_finite=False).cpu().double()
        by_fit = self.values[final][own:].double()
        errors = (by_base - truth, by_fit - truth, truth)
        return torch.stack([flat(e).square().mean(dim=1) for e in errors], dim=1)

    def _loaded(self, indices: Iterable[int]) -> dict[int, Tensor]:
        return {j: self.values[j].to(self.device) for j in indices}

    def _store(self, values: dict[int, Tensor], tracer: Tracer) -> None:
        self.values |= {j: v.cpu() for j, v in values.items() if j > self._done}
        self._done = len(tracer.code)


def _truth(batch: Batch, base: Plan) -> tuple[Tensor, float | None, str]:
    """True final states on the grid of `base`, float64 on the host, the estimate of their error, and how they were made."""
    t_start, last, t_end = base.grid[0], *base.grid[-2:]
    if batch.teacher is not None:
        record = batch.teacher.record
        return batch.teacher.at(t_end).double(), record.error, str(record.options)
    made = Integration.of(batch.ode, batch.x, t_start, t_end, last=base.schedule.noise_to_signal(last))
    finals = torch.cat([made.end(part.ode, part.x.to(batch.device)).cpu() for part in batch.chunks()])
    return finals.double(), made.error(batch.ode, batch.x, finals), DEFAULT


def _rounding(values: dict[int, Tensor], candidates: tuple[Term, ...], cut: int) -> Tensor:
    """Squared rounding error of each direction on the first `cut` samples, float64 [k], by the dtype of the vectors."""
    plain = {j: values[j][:cut] for term in candidates for j in term.direction.weights}
    if not plain:
        return torch.zeros(len(candidates), dtype=_F64, device="cpu")
    sizes = torch.stack([torch.linalg.vector_norm(v.cpu().double()) * torch.finfo(v.dtype).eps for v in plain.values()])
    size = dict(zip(plain, sizes.square().tolist(), strict=True))
    weights = [term.direction.weights for term in candidates]
    noise = [sum(weight_mean_square(w) * size[j] for j, w in own.items()) for own in weights]
    return torch.tensor(noise, dtype=_F64, device="cpu")


def _read(values: dict[int, Tensor], held: Vector) -> Tensor:
    (index,) = held.weights
    return values[index]


def _corrected(
    record: StepRecord, candidates: tuple[Term, ...], corrections: tuple[float, ...], constant: Tensor | None
) -> tuple[Vector, StepRecord]:
    """The corrected result of a step, and the record of the step with the result without history terms."""
    pairs = list(zip(corrections, candidates, strict=True))
    own = sum((c * term.direction for c, term in pairs if not term.history), start=record.base)
    y = sum((c * term.direction for c, term in pairs if term.history), start=own)
    return y if constant is None else y + constant, replace(record, own=own)


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
