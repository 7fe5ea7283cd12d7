"""One call: the lowest error per evaluation that a budget can buy, with every ingredient chosen by held-out noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GridError, IIAError, InputError, MismatchError, unknown_name
from ..grids import karras
from ..ode import ProbabilityFlowODE
from ..plan import Plan, check_start, trace
from ..schedules import Discrete, Schedule
from ..solvers import get_solver
from .chunks import device_of
from .endpoint import by_robust_error, endpoint_errors, robust_mean
from .fit import IIA
from .fitted import FittedSolver
from .moments import estimate_moments
from .refine import Refinement, refine
from .routes import Route, Start, class_condition
from .search import Fit, LeapGrid, leap_grids, samples_of, search_grid, search_levels
from .teacher import Teacher

__all__ = ["BUDGETS", "Budget", "Ingredient", "fit"]

_F64 = torch.float64
_NOISIEST = 80.0  # where a run starts on a schedule that has no noisiest state of its own
_BASELINE = "ipndm3"
_RIDGE = 1e-7  # where it is not chosen: enough to keep weights of all but parallel directions small
_LARGEST = 4096  # components of a sample whose covariance is worth its eigenvectors


@dataclass(frozen=True)
class Budget:
    """What a fit may spend.

    Attributes
    ----------
    teacher_steps : of the accurate trajectories that everything is fitted to.
    rounds, descent : of the search for a grid; see :func:`~iia_ode.iia.search.search_grid`.
    levels : passes over every level of the best grid on its own; see :func:`~iia_ode.iia.search.search_levels`.
    warm_starts : whether routes that take the first interval without an evaluation (:class:`WarmStart`) are tried.
    starts : how many of the best routes are refined.
    iterations, probes : of each refinement.
    """

    teacher_steps: int = 60
    rounds: tuple[tuple[float, int], ...] = ((0.125, 8), (0.5, 3), (1.0, 1))
    descent: int = 1
    levels: int = 0
    warm_starts: bool = False
    starts: int = 0
    iterations: int = 6
    probes: int = 2

    def __post_init__(self) -> None:
        wrong = [k for k in ("iterations", "probes") if getattr(self, k) < 1]
        wrong += [k for k in ("descent", "levels", "starts") if getattr(self, k) < 0]
        if wrong or not self.rounds or self.teacher_steps < 2:
            raise InputError(
                f"a budget needs rounds, at least 2 steps of the teacher, and counts: {wrong or 'rounds'}."
            )

    def cost(self, nfe: int, candidates: int, batch: int, train: int) -> int:
        """About how many sample evaluations a fit with `nfe` evaluations spends, `train` of its `batch` draws fitted to."""
        search, alive = 0, candidates if nfe > 1 else 0
        for share, keep in self.rounds:
            search, alive = search + alive * 2 * samples_of(share, train), keep
        search += 6 * self.descent * 2 * samples_of(self.rounds[-1][0], train)
        search += 2 * (nfe - 1) * self.levels * 2 * train
        search *= 2 if self.warm_starts else 1
        refinement = self.starts * self.iterations * (train * (2 * self.probes + 4) + batch - train)
        return (self.teacher_steps + 1) * batch + nfe * (search + 4 * batch + refinement)


BUDGETS: dict[str, Budget] = {
    "closed-form": Budget(),
    "standard": Budget(levels=1, starts=1, iterations=6, probes=2),
    "thorough": Budget(
        teacher_steps=80,
        rounds=((0.25, 12), (1.0, 4)),
        descent=2,
        levels=2,
        warm_starts=True,
        starts=3,
        iterations=15,
        probes=4,
    ),
}
"""The budgets by name: no gradients, one short refinement, several long ones."""


@dataclass(frozen=True)
class Ingredient:
    """What was tried: the held-out error with it, and what it cost.

    Attributes
    ----------
    name : what it is.
    error : root mean square endpoint error on the held-out noise; None where it could not be made.
    sample_evaluations, seconds : spent on it.
    chosen : whether it is the result.
    """

    name: str
    error: float | None
    sample_evaluations: int
    seconds: float
    chosen: bool = False


def fit(
    ode: ProbabilityFlowODE,
    nfe: int,
    noise: Tensor | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    samples: int = 256,
    budget: str | Budget = "standard",
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    held_out: float = 0.5,
    teacher: Teacher | None = None,
    chunk_size: int = 64,
    seed: int = 0,
    report: Callable[[str], None] | None = print,
    progress: bool = False,
) -> FittedSolver:
    """A solver with `nfe` evaluations for this model, as accurate as the budget can make it.

    Accurate trajectories are made once, from the given noise. Grids that leap from the noisiest level are searched, each
    with weights in closed form (:class:`IIA` over DDIM with ``terms="window"`` and ``target="trajectory"``); with a budget
    above ``"closed-form"`` the weights and grids of the best are then refined together (:func:`refine`). Every choice is
    made by the endpoint error on held-out noise, the last part of `noise`, which no fit sees; the solver that the model
    would have had without a fit is among the candidates.

    Parameters
    ----------
    ode : the model, with conditions for each noise or one for all. Guidance is part of it.
    nfe : evaluations of a run, at least 1.
    noise : draws of standard normal noise [B, ...], float32 or float64; 64 or more, 256 are good. Initial states are
        recognised by their size and taken as they are where the noisiest level is far from 1; those of a `teacher` always.
    shape : instead of `noise`, the shape of one sample: `samples` draws are made from `seed`, in float32.
    budget : ``"closed-form"``, ``"standard"``, ``"thorough"`` or a :class:`Budget`.
    sigma_max : level sigma/alpha to start from; by default the noisiest of the schedule, or 80 where its model says nothing
        of the data there (noise or score where alpha = 0).
    sigma_min : level whose data estimate the teacher takes for the data: the smallest that the model was trained on. By
        default 0.002, or the level of the first timestep of a :class:`~iia_ode.Discrete` schedule if that is higher.
    held_out : share of the noise, its last part, that decides.
    teacher : of these very initial states, if there is one already.
    chunk_size : samples that go through the model at once.
    seed : of `shape`'s draws and of the refinement's signs; recorded.
    report : is told what it will cost, how far it is and what it found; None for silence.
    progress : show bars.

    Returns
    -------
    A :class:`FittedSolver` that starts from ``sigma * noise`` at ``fit.grid[0]`` and ends at the data. Its
    ``about["recipe"]`` has the list of ingredients with their errors and costs; ``fit.explain()`` says it in words.

    Raises
    ------
    InputError, GridError, MismatchError : an argument is not usable.
    NonFiniteError : the model is not finite.
    """
    chosen = _budget(budget)
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise InputError(f"nfe must be a positive whole number, got {nfe!r}.")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError(
            "iia_ode.fit runs in one process: over several ranks, fit IIA(...) on a grid, or run it on one rank."
        )
    start = _start(ode, sigma_max)
    x = noise if teacher is not None and noise is not None else _initial(ode, noise, shape, samples, start, seed)
    if teacher is not None and not torch.equal(teacher.initial, x.detach().cpu().to(teacher.initial.dtype)):
        x = _initial(ode, noise, shape, samples, start, seed)
    check_start(ode, x)
    x = x.detach().to(device_of(ode, x))
    sigma_min = _floor(ode.schedule) if sigma_min is None else sigma_min
    if len(x) < 8:
        raise InputError(f"a fit needs at least 8 draws of noise, better 256, got {len(x)}.")
    job = _Job(ode, nfe, x, start, sigma_min, chosen, held_out, chunk_size, seed, report or (lambda _: None), progress)
    return job.run(teacher)


class _Job:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        ode: ProbabilityFlowODE,
        nfe: int,
        x: Tensor,
        start: float,
        sigma_min: float,
        budget: Budget,
        held_out: float,
        chunk_size: int,
        seed: int,
        say: Callable[[str], None],
        progress: bool,
    ) -> None:
        if not 0 < held_out < 1:
            raise InputError(f"held_out is a share of the noise between 0 and 1, got {held_out!r}.")
        self.ode, self.nfe, self.x, self.start, self.sigma_min = ode, nfe, x, start, sigma_min
        self.budget, self.chunk_size, self.seed, self.say, self.progress = budget, chunk_size, seed, say, progress
        self.train = len(x) - min(max(1, round(held_out * len(x))), len(x) - 1)
        self.method = IIA("ddim", terms="window", target="trajectory", history=2, ridge="auto", name=f"iia-{nfe}")
        self.found: list[_Found] = []
        self.teacher: Teacher

    def run(self, teacher: Teacher | None) -> FittedSolver:
        """All stages, and the best of what they found."""
        begun = time.perf_counter()
        with self.ode.counting() as spent:
            self._announce(teacher)
            with self._stage() as cost:
                self.teacher = self._check(teacher) or Teacher.solve(
                    self.ode,
                    self.x,
                    self.start,
                    self.ode.schedule.t_data,
                    steps=self.budget.teacher_steps,
                    sigma_min=self.sigma_min,
                    chunk_size=self.chunk_size,
                    progress=self.progress,
                )
            self.say(f"teacher: {cost.samples} sample evaluations, {cost.seconds:.1f} s")
            self._classic()
            routes = self._closed_form()
            if self.budget.starts:
                self._refined(routes)
        return self._result(spent.evaluations, spent.samples, time.perf_counter() - begun)

    # ---- stages --------------------------------------------------------------------------------------------------------

    def _announce(self, teacher: Teacher | None) -> None:
        """Time the model, and say what this will take."""
        part = slice(0, min(self.chunk_size, len(self.x)))
        ode, x = self.ode.subset(part, len(self.x)), self.x[part]
        with torch.no_grad():
            for _ in range(2):  # the first call may allocate or compile
                began = time.perf_counter()
                ode.output(x, self.start).sum().item()
                seconds = time.perf_counter() - began
        cost = self.budget.cost(self.nfe, len(self._candidates(1.0)), len(self.x), self.train)
        cost -= (self.budget.teacher_steps + 1) * len(self.x) if teacher is not None else 0
        self.say(
            f"{self.nfe} evaluations, {len(self.x)} draws of noise: about {cost} sample evaluations, "
            f"{cost * seconds / len(x):.0f} s at {1e3 * seconds / len(x):.2g} ms each"
        )

    def _check(self, teacher: Teacher | None) -> Teacher | None:
        if teacher is None:
            return None
        teacher.check(self.ode, self.x)
        if teacher.about["t_start"] != self.start:
            raise MismatchError(f"the teacher starts at t = {teacher.about['t_start']:g}, the fit at {self.start:g}.")
        return teacher

    def _classic(self) -> None:
        """What the model would have had without a fit."""
        with self._stage() as cost:
            plan = None
            try:
                top = min(self._top(), 200.0)
                low = max(self.sigma_min, min(0.02, top / 10))
                grid = get_solver(_BASELINE).grid_for(
                    self.nfe, lambda n: karras(n, low, top, schedule=self.ode.schedule), self.ode.schedule
                )
                grid[0] = self.start
                plan = trace(get_solver(_BASELINE), self.ode.schedule, grid, consistent=False)
            except IIAError:
                pass
            error = None if plan is None else self._errors(plan)
        if plan is not None and error is not None:
            self._add(f"{_BASELINE}, not fitted", plan, error, cost, None)

    def _candidates(self, scale: float) -> list[LeapGrid]:
        return leap_grids(self._top(), scale)

    def _closed_form(self) -> list[Route]:
        """Weights in closed form on the best grid of each way to start, with all training samples; best route first."""
        own = slice(0, self.train)
        ode, x, teacher = self._part(own)
        routes: list[Route] = []
        if self.nfe > 1:
            scale = float(self.teacher.final.double().square().mean().sqrt()) or 1.0
            cold = self._searched(Route(None), self._candidates(scale))
            routes.append(self._freed(Route(None, cold)))
            near = [
                LeapGrid(scale * first, last, cold.rho)
                for first in (2.0, 3.5, 6.0, 10.0, 16.0, 28.0)
                for last in (cold.sigma_min, cold.sigma_min / 2)
            ]
            for start in self._starts(teacher) if self.budget.warm_starts else []:
                try:
                    routes.append(self._freed(Route(start, self._searched(Route(start), near))))
                except IIAError as error:
                    self.say(f"{start.name}: not possible here ({str(error).splitlines()[0]})")
        else:
            routes.append(Route(None))
        for route in routes:
            tried: list[tuple[bool, Tensor]] = []
            for intercept in (False, True) if route.start is None else (False,):
                with self._stage() as cost:
                    method = replace(self.method, intercept=intercept, guard=False)
                    plan, fitted = route.fit(method, self._grid(route), ode, x, teacher, self.chunk_size, held_out=0.2)
                    tried.append((intercept, self._errors(plan)))
                self._add(f"{route.name}{', intercept' if intercept else ''}", plan, tried[-1][1], cost, fitted)
            route.intercept, route.errors = by_robust_error(tried, lambda pair: pair[1], outliers_too=True)[0]
        return by_robust_error(routes, lambda route: route.errors, outliers_too=True)

    def _starts(self, teacher: Teacher) -> list[Start]:
        """The warm starts that are tried: one gain, and one per direction of the data; per class where there are classes."""
        key = class_condition(self.ode, len(self.x), self.train)
        labels = None if key is None else self.ode.conditioning[key][: self.train].cpu()
        x = self.x[: self.train]
        starts = [Start("affine", x, teacher)]
        if teacher.final[0].numel() <= _LARGEST:
            try:
                starts.append(Start("diagonal", x, teacher, estimate_moments(teacher.final)))
                if key is not None:
                    moments = estimate_moments(teacher.final, labels=labels, key=key)
                    starts.append(Start("diagonal, per " + key, x, teacher, moments, key, labels))
            except IIAError as error:
                self.say(f"no covariance of the data: {str(error).splitlines()[0]}")
        return starts

    def _searched(self, route: Route, candidates: list[LeapGrid]) -> LeapGrid:
        """The best of a family of grids for this way to start."""
        with self._stage() as cost:
            search = search_grid(
                *self._search(route), candidates,
                rounds=self.budget.rounds, descent=self.budget.descent, chunk_size=self.chunk_size,
            )  # fmt: skip
        best = ", ".join(f"{k} {v:.3g}" for k, v in asdict(search.best).items())
        self.say(
            f"{route.name}: {len(search.trials)} grids, {cost.samples} sample evaluations, {cost.seconds:.1f} s; {best}"
        )
        return search.best

    def _freed(self, route: Route) -> Route:
        """The route with every level of its grid moved to where it does best."""
        if not self.budget.levels or route.grid is None:
            return route
        with self._stage() as cost:
            search = search_levels(
                *self._search(route), route.grid, passes=self.budget.levels, chunk_size=self.chunk_size
            )
        levels = " ".join(f"{v:.3g}" for v in search.best.levels)
        self.say(
            f"{route.name}: {len(search.trials)} grids, {cost.samples} sample evaluations, {cost.seconds:.1f} s; {levels}"
        )
        return replace(route, grid=search.best)

    def _search(self, route: Route) -> tuple[Fit, ProbabilityFlowODE, Tensor, Teacher, int]:
        """What a search for a grid is about: how to fit, to what, and how many intervals there are."""
        plain = replace(self.method, guard=False, ridge=_RIDGE)

        def closed(ode: ProbabilityFlowODE, grid: Tensor, x: Tensor, teacher: Teacher) -> Plan:
            return route.fit(plain, grid, ode, x, teacher, self.chunk_size)[0]

        return closed, *self._part(slice(0, self.train)), self.nfe + (route.start is not None)

    def _refined(self, routes: list[Route]) -> None:
        """Gauss-Newton from the best routes."""
        held = len(self.x) - self.train
        target = self.teacher.final.to(self.x)
        own, own_x, own_teacher = self._part(slice(0, self.train))
        for route in routes[: self.budget.starts]:
            with self._stage() as cost:
                method = replace(self.method, guard=False, ridge=_RIDGE, intercept=route.intercept)
                grid = self._grid(route)
                warm, rest, _ = route.parts(method, grid, own, own_x, own_teacher, self.chunk_size)
                try:
                    found = refine(
                        rest,
                        self.ode,
                        self.x if warm is None else warm.apply(self.x, self.ode),
                        target,
                        held_out=held / len(self.x),
                        sigma_min=self.sigma_min,
                        iterations=self.budget.iterations,
                        probes=self.budget.probes,
                        chunk_size=self.chunk_size,
                        seed=self.seed,
                        progress=self.progress,
                    )
                except (IIAError, RuntimeError) as error:
                    self.say(f"{route.name}, refined: not possible ({str(error).splitlines()[0]})")
                    continue
                plan = found.plan if warm is None else warm.then(found.plan)
                errors = self._errors(plan)
            cost.samples += found.backward
            name = f"{route.name}{', intercept' if route.intercept else ''}, refined"
            self._add(name, plan, errors, cost, found)

    # ---- the outcome ---------------------------------------------------------------------------------------------------

    def _result(self, evaluations: int, samples: int, seconds: float) -> FittedSolver:
        usable = [f for f in self.found if f.ingredient.error is not None]
        if not usable:
            raise InputError("nothing could be fitted: the model is not finite on this noise.")
        best = by_robust_error(usable, lambda f: f.errors, outliers_too=True)[0]
        ladder = [replace(f.ingredient, chosen=f is best) for f in self.found]
        source = next(f.source for f in self.found if isinstance(f.source, FittedSolver))
        fitted = best.source if isinstance(best.source, FittedSolver) else source
        reports = best.source.reports if isinstance(best.source, FittedSolver) else ()
        samples += sum(f.source.backward for f in self.found if isinstance(f.source, Refinement))
        recipe = {
            "budget": asdict(self.budget) | {"rounds": [list(r) for r in self.budget.rounds]},
            "ingredients": [asdict(i) for i in ladder],
            "refinement": best.source.about() if isinstance(best.source, Refinement) else None,
            "evaluations": evaluations,
            "sample_evaluations": samples,
            "seconds": seconds,
        }
        plan = replace(best.plan, name=f"iia-{self.nfe}")
        about = fitted.about | {
            "intercept": any(r.intercept > 0 for r in reports) if reports else fitted.about["intercept"],
            "batch": len(self.x),
            "held_out": len(self.x) - self.train,
            "seed": self.seed,
            "evaluations": evaluations,
            "sample_evaluations": samples,
            "recipe": recipe,
        }
        base = next((i.error for i in ladder if i.name.startswith(_BASELINE)), None)
        about["endpoint"] = about["endpoint"] | {
            "base": base,
            "fit": best.ingredient.error,
            "fell_back": best.source is None,
        }
        self.say(
            f"chosen: {best.ingredient.name}, error {best.ingredient.error:.4g} on held-out noise; {seconds:.0f} s in all"
        )
        return FittedSolver(plan, reports, about)

    def _add(
        self, name: str, plan: Plan, errors: Tensor, cost: _Cost, source: FittedSolver | Refinement | None
    ) -> None:
        error = robust_mean(errors, math.inf)
        known = error if math.isfinite(error) else None
        self.found.append(_Found(Ingredient(name, known, cost.samples, cost.seconds), plan, errors, source))
        self.say(
            f"{name}: error {error:.4g} on held-out noise, median {float(errors.median()):.4g} ({cost.seconds:.1f} s)"
        )

    def _errors(self, plan: Plan) -> Tensor:
        """Endpoint errors on held-out noise, one for each sample."""
        held = slice(self.train, len(self.x))
        return endpoint_errors(plan, self.ode, self.x, self.teacher.final, held, chunk_size=self.chunk_size)

    def _part(self, part: slice) -> tuple[ProbabilityFlowODE, Tensor, Teacher]:
        return self.ode.subset(part, len(self.x)), self.x[part], self.teacher.subset(part)

    def _grid(self, route: Route) -> Tensor:
        if route.grid is None:
            return torch.tensor([self.start, self.ode.schedule.t_data], dtype=_F64, device="cpu")
        return route.grid.times(self.nfe + (route.start is not None), self.ode.schedule, self.start)

    def _top(self) -> float:
        schedule = self.ode.schedule
        return schedule.noise_to_signal(self.start) if schedule.alpha(self.start) > 0 else math.inf

    @contextmanager
    def _stage(self) -> Iterator[_Cost]:
        cost, begun, before = _Cost(), time.perf_counter(), self.ode.ledger.samples
        yield cost
        cost.seconds, cost.samples = time.perf_counter() - begun, self.ode.ledger.samples - before


@dataclass(frozen=True, eq=False)
class _Found:
    """Something that was tried, with its errors on held-out noise and where it comes from; None is no fit at all."""

    ingredient: Ingredient
    plan: Plan
    errors: Tensor
    source: FittedSolver | Refinement | None


@dataclass
class _Cost:
    samples: int = 0
    seconds: float = 0.0


def _budget(budget: str | Budget) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    return BUDGETS[budget]


def _floor(schedule: Schedule) -> float:
    """The smallest level that a model of this schedule may be asked at."""
    first = (
        schedule.noise_to_signal(0.0) if isinstance(schedule, Discrete) else schedule.noise_to_signal(schedule.t_data)
    )
    return max(0.002, first)


def _start(ode: ProbabilityFlowODE, sigma_max: float | None) -> float:
    """The time to start from."""
    schedule = ode.schedule
    if sigma_max is not None:
        if not (isinstance(sigma_max, int | float) and 0 < sigma_max < math.inf):
            raise GridError(f"sigma_max is a positive level sigma/alpha, got {sigma_max!r}.")
        return schedule.t_of_noise_to_signal(float(sigma_max))
    if schedule.alpha(schedule.t_noise) == 0 and ode.prediction in ("noise", "score"):
        return schedule.t_of_noise_to_signal(_NOISIEST)
    return schedule.t_noise


def _initial(
    ode: ProbabilityFlowODE, noise: Tensor | None, shape: tuple[int, ...] | None, samples: int, t: float, seed: int
) -> Tensor:
    """Initial states from noise, or from a shape."""
    if (noise is None) == (shape is None):
        raise InputError("a fit needs either noise=, draws of standard normal noise, or shape=, of one sample.")
    sigma = ode.schedule.sigma(t)
    if noise is None:
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((samples, *(shape or ())), generator=generator, device="cpu")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        raise InputError(f"noise must be a float tensor [B, ...], got {getattr(noise, 'shape', type(noise).__name__)}.")
    size = float(noise.double().square().mean().sqrt())
    if 0.5 < size < 2.0:
        noise = sigma * noise
    elif not 0.8 * sigma < size < 1.25 * sigma + 1:
        raise InputError(
            f"noise must be draws of the standard normal distribution, or states at the noisiest level {sigma:g}: its root "
            f"mean square is {size:.3g}."
        )
    check_start(ode, noise)
    return noise
