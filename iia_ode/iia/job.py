"""The stages of the one call: trajectories, grids and weights in closed form, refinement, the choice, and its last fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ..errors import IIAError, InputError, MismatchError, RankError, first_line
from ..grids import karras
from ..ode import ProbabilityFlowODE
from ..plan import Plan, trace
from ..solvers import get_solver
from .budgets import AGAIN, Budget
from .candidates import Candidate, Cost, Ingredient
from .endpoint import Ends, by_robust_error
from .families import LeapGrid, leap_grids
from .fit import IIA
from .fitted import FittedSolver
from .initial import fresh_states, held_out_of
from .outcome import Outcome
from .refine import Refinement, refine
from .remembered import RememberedODE
from .routes import Route, joined, starts_of, worth_refining
from .search import Bench
from .shared import SharedODE
from .teacher import Teacher
from .variants import SCALARS, variants_of
from .warm_start import WarmStart

__all__ = ["Job"]

_F64 = torch.float64
_BASELINE = "ipndm3"
_FEW = 64  # draws of noise below which a choice is not to be trusted far
_ENOUGH = 10  # components of training noise for each weight, or nothing is fitted to the rest of the noise
_SAMPLES = 10  # of training noise, for the mean that an intercept is
_RIDGE = 1e-7  # where it is not chosen: enough to keep weights of all but parallel directions small


@dataclass(eq=False)
class Job:
    """The state of one call of :func:`iia_ode.fit`: what it was given, what it has found, and what that cost.

    Attributes
    ----------
    ode, nfe : the model, which remembers its answers, and evaluations of a run.
    x : initial states [B, ...] at time `start`, of which the first `given` are the caller's or drawn for it.
    sigma_min : level whose data estimate is taken for the data.
    budget, held_out, chunk_size, checkpointed, seed, progress : as for :func:`iia_ode.fit`.
    say : is told how far it is.
    """

    ode: RememberedODE
    nfe: int
    x: Tensor
    given: int
    start: float
    sigma_min: float
    budget: Budget
    held_out: float
    chunk_size: int
    checkpointed: bool
    seed: int
    say: Callable[[str], None]
    progress: bool
    teacher: Teacher = field(init=False)
    found: list[Candidate] = field(init=False, default_factory=list)
    failed: list[Ingredient] = field(init=False, default_factory=list)
    costs: dict[str, Cost] = field(init=False, default_factory=dict)
    fresh: Ends | None = field(init=False, default=None)  # noise that only the last choice sees, where there is any

    def __post_init__(self) -> None:
        self.train = len(self.x) - held_out_of(len(self.x), self.held_out)
        self.method = IIA(
            "ddim", terms="window", target="trajectory", history=2, ridge="auto", guard=False, name=f"iia-{self.nfe}"
        )

    def run(self, teacher: Teacher | None) -> FittedSolver:
        """All stages, and the best of what they found."""
        begun = time.perf_counter()
        with self.ode.counting() as spent:
            self._announce(teacher)
            with self._stage() as self.costs["teacher"]:
                self.teacher = self._check(teacher) or Teacher.solve(
                    self.ode.inner,  # of whose answers no other but the first is asked for again
                    self.x,
                    self.start,
                    self.ode.schedule.t_data,
                    steps=self.budget.steps(self.nfe),
                    sigma_min=self.sigma_min,
                    chunk_size=self.chunk_size,
                    progress=self.progress,
                )
                self.fresh = self._fresh()  # now, so that a model that fails on it does so before the work
            self.say("teacher: {samples} sample evaluations, {seconds:.1f} s".format(**asdict(self.costs["teacher"])))
            self._classic()
            routes = self._closed_form()
            if self.budget.starts:
                self._refined(routes)
            if self.fresh is not None:
                with self._stage() as self.costs["finals"]:
                    self._judged(self.fresh)
            best = self._choice()
            with self._stage() as self.costs["last"]:
                plan, fitted, backward = self._finished(best)
            self.costs["last"].samples += backward
        found = Outcome(
            best,
            plan,
            fitted,
            tuple(self.found),
            tuple(self.failed),
            self.costs,
            spent.evaluations,
            spent.samples + backward,
            time.perf_counter() - begun,
        )
        where = "held-out noise" if self.fresh is None else "all of it"
        self.say(f"chosen: {best.name}, error {best.error:.4g} on {where}; {found.seconds:.0f} s in all")
        return found.solver(
            f"iia-{self.nfe}",
            budget=self.budget,
            base=_BASELINE,
            batch=len(self.x),
            held_out=len(self.x) - self.train,
            given=self.given,
            final_draws=self.final_draws,
            checkpointed=self.checkpointed,
            seed=self.seed,
        )

    # ---- stages --------------------------------------------------------------------------------------------------------

    def _announce(self, teacher: Teacher | None) -> None:
        """Time the model, and say what this will take."""
        part = slice(0, min(self.chunk_size, len(self.x)))
        ode, x = self.ode.inner.subset(part, len(self.x)), self.x[part]
        with torch.no_grad():
            for _ in range(2):  # the first call may allocate or compile
                began = time.perf_counter()
                ode.output(x, self.start).sum().item()
                seconds = time.perf_counter() - began
        numbers = self.nfe, len(self._candidates(1.0)), len(self.x), self.train
        cost = self.budget.cost(*numbers, checkpointed=self.checkpointed)
        cost -= (self.budget.steps(self.nfe) + 1) * len(self.x) if teacher is not None else 0
        more = f" and {len(self.x) - self.given} more" if len(self.x) > self.given else ""
        finals = self.budget.finals_of(len(self.x))
        more += f", {finals} for the last choice" if finals else ""
        self.say(
            f"{self.nfe} evaluations, {self.given} draws of noise{more}: about {cost} sample evaluations, "
            f"{cost * seconds / len(x):.0f} s at {1e3 * seconds / len(x):.2g} ms each"
        )
        if len(self.x) < _FEW:
            self.say(
                f"only {len(self.x)} draws of noise: what is chosen by so few can be worse on others than the solver without "
                f"a fit; give {_FEW} or more, 256 are good"
            )

    def _check(self, teacher: Teacher | None) -> Teacher | None:
        if teacher is None:
            return None
        teacher.check(self.ode, self.x, stacklevel=6)
        if teacher.about["t_start"] != self.start:
            raise MismatchError(f"the teacher starts at t = {teacher.about['t_start']:g}, the fit at {self.start:g}.")
        # If its model had other weights, that is said by now, and no fit has to say it again.
        return replace(teacher, about=teacher.about | {"fingerprint": self.ode.fingerprint()})

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
            self._add(Candidate(f"{_BASELINE}, not fitted", plan, error, cost))

    def _candidates(self, scale: float) -> list[LeapGrid]:
        return leap_grids(self._top(), scale)

    def _closed_form(self) -> list[Route]:
        """Weights in closed form on the best grid of each way to start, with all training samples; best route first."""
        _, _, teacher = self._part(slice(0, self.train))
        scale = float(self.teacher.final.double().square().mean().sqrt()) or 1.0
        routes = self._routes(Route(None), self._candidates(scale) if self.nfe > 1 else [])
        cold = routes[0].family or LeapGrid(scale, 0.1 * scale)
        near = [
            LeapGrid(scale * first, last, cold.rho)
            for first in (2.0, 3.5, 6.0, 10.0, 16.0, 28.0)
            for last in (cold.sigma_min, cold.sigma_min / 2)
        ]
        for start in starts_of(self.ode, self.x, self.train, teacher, self.say) if self.budget.warm_starts else []:
            made = len(self.found)
            with self._stage() as cost:
                try:
                    routes += self._routes(Route(start), near)
                    continue
                except RankError:
                    raise
                except IIAError as error:
                    reason = first_line(error)
            self.say(f"warm start {start.name}: not possible here ({reason})")
            for own in (f.cost for f in self.found[made:]):  # what was possible bears its own cost
                cost.samples, cost.seconds = cost.samples - own.samples, cost.seconds - own.seconds
            self.failed.append(Ingredient(f"warm start {start.name}", None, cost.samples, cost.seconds))
        return by_robust_error(routes, lambda route: route.errors, outliers_too=True)

    def _routes(self, route: Route, candidates: list[LeapGrid]) -> list[Route]:
        """For a way to start: the grid, found with scalars, what else its weights may be, and the fits of both."""
        ode, x, teacher = self._part(slice(0, self.train))
        with self._stage() as search:
            if candidates:
                route.grid = route.family = self._searched(route, candidates)
            chosen = self._freed(self._varied(route))
        routes = [chosen] if chosen.variant is SCALARS else [replace(chosen, variant=SCALARS), chosen]
        for own in routes:
            with self._stage() as cost:
                parts = own.fit(self.method, self._grid(own), ode, x, teacher, self.chunk_size, held_out=0.2)
                own.fitted = parts.whole
                own.errors = self._errors(own.fitted.plan)
            if own is routes[0]:  # what is made first on a grid bears the cost of finding it
                cost.samples, cost.seconds = cost.samples + search.samples, cost.seconds + search.seconds
            self._add(Candidate(own.name, own.fitted.plan, own.errors, cost, own))
        return routes

    def _varied(self, route: Route) -> Route:
        """The route with the weights that do best on its grid, on halves of the training samples that they do not see."""
        if route.start is not None and route.start.moments is not None:
            return route  # its map is over directions of the data, which do not go with bands
        variants = variants_of(self.x.shape[1:], intercepts=route.start is None)
        if len(variants) < 2 or self.train < 4:
            return route
        tried = []
        for variant in variants:
            own = replace(route, variant=variant)
            tried.append((own, self._bench(own).judge(self._grid(own), self.train)))
        best = by_robust_error(tried, lambda pair: pair[1], outliers_too=True)[0][0]
        return best if bool(torch.isfinite(torch.cat([e for _, e in tried])).any()) else route

    def _searched(self, route: Route, candidates: list[LeapGrid]) -> LeapGrid:
        """The best of a family of grids for this way to start."""
        with self._stage() as cost:
            search = self._bench(route).search_grid(candidates, rounds=self.budget.rounds, descent=self.budget.descent)
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
            search = self._bench(route).search_levels(route.grid, passes=self.budget.levels)
        levels = " ".join(f"{v:.3g}" for v in search.best.levels)
        self.say(
            f"{route.name}: {len(search.trials)} grids, {cost.samples} sample evaluations, {cost.seconds:.1f} s; {levels}"
        )
        return replace(route, grid=search.best)

    def _bench(self, route: Route) -> Bench:
        """Where grids and weights for a route are tried: the training samples, halves of them judged by the other half."""
        plain = replace(self.method, ridge=_RIDGE)

        def fold(
            ode: ProbabilityFlowODE, grid: Tensor, x: Tensor, teacher: Teacher, own: slice, other: slice
        ) -> Tensor:
            return route.ends(plain, grid, ode, x, teacher, own, self.chunk_size)[other]

        return Bench(fold, *self._part(slice(0, self.train)), self.nfe + (route.start is not None))

    def _refined(self, routes: list[Route]) -> None:
        """Gauss-Newton from the best routes, given best first."""
        own, own_x, own_teacher = self._part(slice(0, self.train))
        usable = [route for route in routes if bool(torch.isfinite(route.errors).all())]
        for route in worth_refining(usable or routes, self.budget.starts):
            name, found = f"{route.name}, refined", None
            with self._stage() as cost:
                method, held_out = replace(self.method, ridge=_RIDGE), 1 - self.train / len(self.x)
                try:
                    parts = route.fit(method, self._grid(route), own, own_x, own_teacher, self.chunk_size)
                except RankError:
                    raise
                except IIAError as error:
                    self.say(f"{name}: not possible ({first_line(error)})")
                else:
                    found = self._refine(name, parts.warm, parts.rest.plan, held_out, self.budget.iterations)
                if found is not None:
                    plan = joined(parts.warm, found.plan)
                    errors = self._errors(plan)
            if found is None:
                self.failed.append(Ingredient(name, None, cost.samples, cost.seconds))
                continue
            cost.samples += found.backward
            self._add(Candidate(name, plan, errors, cost, route, found, parts.warm))

    def _refine(
        self, name: str, warm: WarmStart | None, rest: Plan, held_out: float, iterations: int
    ) -> Refinement | None:
        """The refinement of what follows a warm start, if there is one."""
        try:
            return refine(
                self.ode,
                self.x if warm is None else warm.apply(self.x, self.ode),
                rest,
                self.teacher.final.to(self.x),
                held_out=held_out,
                sigma_min=self.sigma_min,
                iterations=iterations,
                probes=self.budget.probes,
                chunk_size=self.chunk_size,
                checkpointed=self.checkpointed,
                seed=self.seed,
                progress=self.progress,
            )
        except RankError:
            raise
        except (IIAError, RuntimeError) as error:
            less = "; checkpointed=True or a smaller chunk_size takes less memory" if "memory" in str(error) else ""
            everyones = isinstance(error, IIAError | torch.linalg.LinAlgError)  # type: ignore[attr-defined]
            if isinstance(self.ode.inner, SharedODE) and not everyones:  # the others wait for this process
                raise RankError(f"{name} failed in this process: {first_line(error)}{less}") from error
            self.say(f"{name}: not possible ({first_line(error)}{less})")
            return None

    def _fresh(self) -> Ends | None:
        """Noise that only the last choice sees, and where it should end; none where the budget has none."""
        draws = self.budget.finals_of(len(self.x))
        if not draws:
            return None
        ode, x = fresh_states(self.ode.inner, self.x, self.start, draws, self.train, self.seed)
        steps, size = self.budget.steps(self.nfe), self.chunk_size
        end, level = self.ode.schedule.t_data, self.sigma_min
        ends = Ends.solve(
            ode, x, self.start, end, steps=steps, sigma_min=level, chunk_size=size, progress=self.progress
        )
        return replace(ends, ode=self.ode.over(ode))

    def _judged(self, fresh: Ends) -> None:
        """Run everything that was made on noise that none of the choices before has seen, too."""
        judged = [found.judged(fresh.errors(found.plan)) for found in self.found]
        if all(found.error is None for found in judged):
            self.say(f"nothing is finite on {self.final_draws} draws of noise more: the choice is made without them")
            self.fresh = None
            return
        self.found = judged
        self.say(f"and on {self.final_draws} draws of noise more:")
        for found in judged:
            self.say(f"{found}, on all of it")

    def _finished(self, best: Candidate) -> tuple[Plan, FittedSolver | None, int]:
        """The choice is made: what was chosen is fitted once more, to all of the noise; and the backward passes of that.

        Its held-out error was that of the fit to the first part, which had less to learn from. Where there is little noise
        for so many weights, or the new fit is not better on all of it, the one that was judged stays.
        """
        route = best.route
        if route is None:
            return best.plan, None, 0
        weights = self.nfe * (self.nfe + 3) // 2 * route.variant.groups
        if self.train < _SAMPLES or self.train * self.x[0].numel() < _ENOUGH * weights:
            return best.plan, route.fitted, 0
        backward, fitted = 0, route.fitted
        if best.refinement is None:
            fitted = route.fit(
                self.method, self._grid(route), self.ode, self.x, self.teacher, self.chunk_size, held_out=0.2
            ).whole
            plan = fitted.plan
        else:
            again = self._refine(best.name, best.warm, best.refinement.plan, 0.0, AGAIN)
            if again is None or again.best == 0:
                return best.plan, fitted, 0 if again is None else again.backward
            backward = again.backward
            plan = joined(best.warm, again.plan)
        if self.fresh is None:
            pairs = [(p, self._ends.errors(p)) for p in (plan, best.plan)]
        else:
            pairs = [(plan, self.fresh.errors(plan)), (best.plan, best.errors[-self.final_draws :])]
        kept, _ = by_robust_error(pairs, lambda pair: pair[1], outliers_too=True)[0]
        return kept, fitted if kept is plan else route.fitted, backward

    # ---- the outcome ---------------------------------------------------------------------------------------------------

    def _choice(self) -> Candidate:
        usable = [f for f in self.found if f.error is not None]
        if not usable:
            raise InputError("nothing could be fitted: the model is not finite on this noise.")
        return by_robust_error(usable, lambda f: f.errors, outliers_too=True)[0]

    def _add(self, found: Candidate) -> None:
        self.found.append(found)
        self.say(f"{found}, on held-out noise ({found.cost.seconds:.1f} s)")

    def _errors(self, plan: Plan) -> Tensor:
        """Endpoint errors on held-out noise, one for each sample."""
        return self._ends.errors(plan, slice(self.train, len(self.x)))

    @property
    def _ends(self) -> Ends:
        """The noise that fits and choices are made on, and where it ends."""
        return Ends(self.ode, self.x, self.teacher.final, self.chunk_size)

    @property
    def final_draws(self) -> int:
        """How many draws only the last choice saw."""
        return 0 if self.fresh is None else len(self.fresh.x)

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
    def _stage(self) -> Iterator[Cost]:
        cost, begun, before = Cost(), time.perf_counter(), self.ode.ledger.samples
        yield cost
        cost.seconds, cost.samples = time.perf_counter() - begun, self.ode.ledger.samples - before
