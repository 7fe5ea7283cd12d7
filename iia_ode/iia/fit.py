"""IIA: improved integration approximation, a meta-solver [Zhang, Niwa, Kleijn 2024]."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import __about__
from ..errors import InputError, unknown_name
from ..ode import ProbabilityFlowODE
from ..plan import Past, Plan, Tracer, Vector, check_grid, check_start
from ..plan.plan import run_code
from ..plan.tracer import take_step
from ..plan.vectors import vector_indices
from ..solvers import Solver, SolverLike, as_solver
from .fitted import FittedSolver, StepReport, conditioning_shapes
from .lstsq import LeastSquares, Solution
from .targets import Numeric, Target, resolve_target
from .terms import StepRecord, Term, Terms, resolve_terms

__all__ = ["IIA", "PRESETS", "preset"]


class _Chunk:
    """Part of the fitting batch, with the vectors of its own run of the growing plan that are still needed."""

    def __init__(self, ode: ProbabilityFlowODE, x: Tensor) -> None:
        self.ode, self.initial = ode, x
        self.values: dict[int, Tensor] = {0: x}
        self._done = 0

    def _evaluate(self, x: Tensor, t: float, form: str) -> Tensor:
        return self.ode.evaluate(x, t).as_form(form)

    def advance(self, tracer: Tracer) -> None:
        """Run the instructions that were written since the last call."""
        for _ in run_code(tracer.code, self.values, self._evaluate, start=self._done):
            pass
        self._done = len(tracer.code)

    def explore(self, fork: Tracer) -> dict[int, Tensor]:
        """The vectors of a fork of the trace, its own instructions included, without keeping them."""
        values = dict(self.values)
        for _ in run_code(fork.code, values, self._evaluate, start=self._done):
            pass
        return values

    def keep(self, live: set[int]) -> None:
        """Forget every vector that no later step can read."""
        self.values = {j: v for j, v in self.values.items() if j in live}


@dataclass(frozen=True)
class IIA:
    """A meta-solver: the base solver's step plus a few directions, weighted by least squares against a better integration.

    Fitting is sequential: step i is fitted on states that the already fitted steps before it produce. The result costs
    what the base costs.

    Parameters
    ----------
    base : registered name or a :class:`~iia_ode.Solver`.
    terms : ``"paper"`` (what the paper has for this base: ``"iia-edm"`` or ``"iia-ddim"``), one of these or ``"biia-edm"`` by
        name, or a function; see `iia_ode.iia.terms`.
    target : ``"substeps"`` (the paper's), ``"local"`` (high-accuracy integration of each step) or a `Target`.
    history : r, how many earlier steps the terms may use.
    substeps : M, sub-steps of the ``"substeps"`` target.
    ridge : relative ridge towards the base; 0 is the paper's plain least squares.
    name : what the fitted solver is called; ``iia(<base>)`` by default.
    """

    base: SolverLike
    terms: str | Terms = "paper"
    target: str | Target = "substeps"
    history: int = 1
    substeps: int = 3
    ridge: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("history", "substeps"):
            if not isinstance(getattr(self, name), int):
                raise InputError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
        if self.history < 0 or not 0 <= self.ridge < math.inf:
            raise InputError(f"history and ridge cannot be negative, got {self.history} and {self.ridge}.")
        resolve_terms(self.terms, self.base_solver.label)
        resolve_target(self.target, self.substeps)

    @property
    def base_solver(self) -> Solver:
        """The base as an instance."""
        return as_solver(self.base)

    def fit(
        self,
        ode: ProbabilityFlowODE,
        grid: Tensor,
        x: Tensor,
        *,
        chunk_size: int | None = None,
        seed: int | None = None,
        progress: bool = False,
    ) -> FittedSolver:
        """Fit every step but one that lands on the data, for this model and grid.

        Parameters
        ----------
        ode : the model with its schedule; conditioning has one entry per sample of x, or one for all.
        grid : float64 [N + 1] times.
        x : initial states [B, ...], float32 or float64: the expectation of the paper is the mean over these.
        chunk_size : samples that go through the model at once (all by default). The least squares does not depend on it;
            a network whose rounding depends on the batch size still may.
        seed : recorded in the file; the fit itself draws no random numbers.
        progress : show a bar over the steps.

        Raises
        ------
        GridError, InputError : the grid or the states are not usable.
        NonFiniteError : the model is not finite on this batch.
        """
        check_start(ode, x)
        if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise InputError(f"chunk_size must be a positive whole number, got {chunk_size!r}.")
        times = check_grid(ode.schedule, grid)
        base = self.base_solver
        with torch.no_grad(), ode.counting() as spent:
            size = chunk_size or len(x)
            chunks = [_Chunk(ode.subset(slice(i, i + size), len(x)), x[i : i + size]) for i in range(0, len(x), size)]
            plan, reports = self._fit_steps(base, ode, times, chunks, progress)
        about = self._about(base, ode, x, seed) | {
            "evaluations": spent.evaluations,
            "sample_evaluations": spent.samples,
        }
        return FittedSolver(plan, tuple(reports), about)

    def _fit_steps(
        self, base: Solver, ode: ProbabilityFlowODE, times: list[float], chunks: list[_Chunk], progress: bool
    ) -> tuple[Plan, list[StepReport]]:
        _, terms = resolve_terms(self.terms, base.label)
        target = resolve_target(self.target, self.substeps)
        name = self.name or f"iia({base.label})"
        tracer, x, memory = Tracer(ode.schedule), Vector({0: 1.0}), ()
        records: tuple[StepRecord, ...] = ()
        reports = []
        intervals = list(zip(times[:-1], times[1:], strict=True))
        for i, (t, s) in enumerate(tqdm(intervals, desc=f"fit {name}", disable=not progress)):
            seen = len(tracer.evaluations)
            y, memory = take_step(base, tracer, x, t, s, Past(memory, i, len(intervals) - 1 - i))
            made = tuple(tracer.evaluations[seen:])
            record = StepRecord(i, t, s, x, made, tracer.known(x, t), ode.is_data(s), y, y)
            for chunk in chunks:
                chunk.advance(tracer)
            candidates = terms(record, records)
            if not all(isinstance(term, Term) for term in candidates):
                raise InputError("terms must be a function that returns a tuple of iia_ode.iia.Term.")
            if candidates:
                solution = self._solve(base, tracer, record, candidates, target, chunks)
                reports.append(_report(record, candidates, solution))
                pairs = list(zip(solution.coefficients.tolist(), candidates, strict=True))
                own = sum((c * term.direction for c, term in pairs if not term.history), start=y)
                y = sum((c * term.direction for c, term in pairs if term.history), start=own)
                record = replace(record, own=own)
            x = tracer.hold(y, step=i + 1)
            records = (record, *records)[: self.history]
            live = tracer.retain(vector_indices((x, memory, records)))
            for chunk in chunks:
                chunk.advance(tracer)
                chunk.keep(live)
        return Plan(ode.schedule, tuple(times), tuple(tracer.code), name), reports

    def _solve(
        self,
        base: Solver,
        tracer: Tracer,
        record: StepRecord,
        candidates: tuple[Term, ...],
        target: Target,
        chunks: list[_Chunk],
    ) -> Solution:
        """The least squares of one step. Everything it needs is traced on a fork, run, and thrown away."""
        fork = tracer.fork()
        aim: Vector | Numeric = target.aim(fork, base, record)
        columns = [fork.hold(term.direction) for term in candidates]
        start, result = fork.hold(record.x), fork.hold(record.base)
        end = fork.hold(aim) if isinstance(aim, Vector) else None
        system = LeastSquares(len(candidates))
        noise = torch.zeros(len(candidates), dtype=torch.float64, device="cpu")
        for chunk in chunks:
            values = chunk.explore(fork)
            if end is not None:
                wanted = _read(values, end)
            elif not isinstance(aim, Vector):
                wanted = aim(chunk.ode, chunk.initial, _read(values, start))
            # In float64 before the difference: a residual is small against the states at high noise.
            residual = wanted.double() - _read(values, result).double()
            system.add([_read(values, c) for c in columns], residual)
            noise += torch.tensor(
                [_rounding(term.direction, values) for term in candidates], dtype=torch.float64, device="cpu"
            )
        return system.solve(ridge=self.ridge, noise=noise.sqrt())

    def _about(self, base: Solver, ode: ProbabilityFlowODE, x: Tensor, seed: int | None) -> dict[str, Any]:
        return {
            "library": __about__.__version__,
            "base": {"name": base.name, "options": base.options()},
            "terms": resolve_terms(self.terms, base.label)[0],
            "target": resolve_target(self.target, self.substeps).options(),
            "history": self.history,
            "ridge": self.ridge,
            "schedule": ode.schedule.config(),
            "prediction": ode.prediction,
            "guidance_scale": ode.guidance_scale,
            "conditioning": conditioning_shapes(ode),
            "state_shape": list(x.shape[1:]),
            "state_dtype": str(x.dtype).removeprefix("torch."),
            "batch": len(x),
            "seed": seed,
            "fingerprint": ode.fingerprint(),
        }


def _read(values: dict[int, Tensor], held: Vector) -> Tensor:
    (index,) = held.weights
    return values[index]


def _rounding(direction: Vector, values: dict[int, Tensor]) -> float:
    """Squared norm of the rounding error in a direction: each vector in it is exact to the precision of its dtype only."""
    parts = (torch.as_tensor(w, device=values[j].device) * values[j] for j, w in direction.weights.items())
    return sum((torch.finfo(p.dtype).eps * float(torch.linalg.vector_norm(p))) ** 2 for p in parts)


def _report(record: StepRecord, candidates: tuple[Term, ...], solution: Solution) -> StepReport:
    corrections = tuple(solution.coefficients.tolist())
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
        rank=solution.rank,
        condition=solution.condition,
    )


PRESETS: dict[str, IIA] = {
    "biia-edm": IIA("heun", terms="biia-edm", name="biia-edm"),
    "iia-edm": IIA("heun", terms="iia-edm", name="iia-edm"),
    "iia-ddim": IIA("ddim", terms="iia-ddim", name="iia-ddim"),
}
"""The paper's methods, with its defaults (M, r) = (3, 1)."""


def preset(name: str, **changes: Any) -> IIA:
    """One of the paper's methods by name, with some options changed: ``preset("iia-edm", history=0)``.

    Raises
    ------
    UnknownNameError : no such preset or option.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    known = PRESETS[name].__dict__
    for key in changes:
        if key not in known:
            raise unknown_name("option of IIA", key, known)
    return IIA(**{**known, **changes})
