"""The ways into a fit: how its first interval is taken, on which grid, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import IIAError, first_line
from ..ode import ProbabilityFlowODE
from ..plan import Plan
from ..schedules import Schedule
from .families import FreeGrid, LeapGrid
from .fit import IIA
from .fitted import FittedSolver
from .gather import Alone
from .moments import Moments, estimate_moments
from .teacher import Teacher
from .variants import SCALARS, Variant
from .warm_start import WarmStart

__all__ = ["Parts", "Route", "Start", "class_condition", "joined", "starts_of", "worth_refining"]

_LARGEST = 4096  # components of a sample whose covariance is worth its eigenvectors


@dataclass(frozen=True, eq=False)
class Start:
    """A way to take the first interval without an evaluation."""

    name: str
    x: Tensor
    teacher: Teacher
    moments: Moments | None = None
    key: str | None = None
    labels: Tensor | None = None

    def make(self, schedule: Schedule, t: float, s: float) -> WarmStart:
        """The map from the states at t to the teacher's at s: of all training samples, also where few are fitted to."""
        there = self.teacher.at(s)
        return WarmStart.affine(
            schedule, t, s, self.x.cpu(), there, over=self.moments, labels=self.labels, per=self.key
        )

    def take(
        self, grid: Tensor, ode: ProbabilityFlowODE, x: Tensor, teacher: Teacher
    ) -> tuple[WarmStart, Tensor, Tensor, Teacher]:
        """The warm start over the first interval, and the grid, states and teacher from where it ends."""
        t, s = (float(v) for v in grid[:2])
        warm = self.make(ode.schedule, t, s)
        y = warm.apply(x, ode)
        return warm, grid[1:], y, teacher.restarted(s, y)


@dataclass(eq=False)
class Route:
    """A way to start, the grid that suits it, what the weights are, and the errors of all that on held-out noise."""

    start: Start | None
    grid: LeapGrid | FreeGrid | None = None
    family: LeapGrid | None = None  # where the search of the family ended
    variant: Variant = SCALARS
    errors: Tensor = torch.empty(0)
    fitted: FittedSolver | None = None  # to the training samples

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether it has a warm start, and one per class."""
        return self.start is not None, self.start is not None and self.start.key is not None

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{'' if self.start is None else f'warm start {self.start.name}, '}{self.variant.name}"

    def fit(
        self,
        method: IIA,
        grid: Tensor,
        ode: ProbabilityFlowODE,
        x: Tensor,
        teacher: Teacher,
        chunk: int,
        **options: Any,
    ) -> Parts:
        """What it makes of these samples on this grid; `method` is how to fit, less the variant."""
        method = self.variant.of(method)
        options |= {
            "chunk_size": chunk,
            "group": Alone(),
        }  # the samples are all of them, in every process that there is
        if self.start is None:
            return Parts(None, method.fit(ode, grid, x, teacher=teacher, **options))
        warm, rest, y, teacher = self.start.take(grid, ode, x, teacher)
        return Parts(warm, method.fit(ode, rest, y, teacher=teacher, **options))

    def ends(
        self, method: IIA, grid: Tensor, ode: ProbabilityFlowODE, x: Tensor, teacher: Teacher, own: slice, chunk: int
    ) -> Tensor:
        """Where it takes these samples, once fitted to `own` of them, [B, ...] on the host."""
        method = self.variant.of(method)
        if self.start is not None:
            _, grid, x, teacher = self.start.take(grid, ode, x, teacher)
        return method.fit_and_run(ode, grid, x, own, teacher=teacher, chunk_size=chunk)[1]


@dataclass(frozen=True, eq=False)
class Parts:
    """A warm start, if there is one, and the fit from where it ends."""

    warm: WarmStart | None
    rest: FittedSolver

    @property
    def whole(self) -> FittedSolver:
        """The fit from the start of the grid."""
        return self.rest if self.warm is None else self.rest.after(self.warm)


def joined(warm: WarmStart | None, rest: Plan) -> Plan:
    """The plan of a warm start, if there is one, and what follows it."""
    return rest if warm is None else warm.then(rest)


def worth_refining(routes: Sequence[Route], count: int) -> list[Route]:
    """So many of the routes, given best first: of each kind the best, then the others in order.

    The best with and the best without a warm start come first, then the best with one per class. A few samples that end in
    another mode may put all routes of one kind behind, and refinement gains unlike amounts on each; so where there is room,
    all are refined, and the choice among them comes after that.
    """
    by_start = {route.kind[:1]: route for route in reversed(routes)}
    by_kind = {route.kind: route for route in reversed(routes)}
    leading = [route for firsts in (by_start, by_kind) for route in routes if route in firsts.values()]
    return list(dict.fromkeys([*leading, *routes]))[:count]


def starts_of(
    ode: ProbabilityFlowODE, x: Tensor, train: int, teacher: Teacher, say: Callable[[str], None]
) -> list[Start]:
    """The warm starts that are tried: one gain, and one per direction of the data; per class where there are classes.

    Of the states x [B, ...] the first `train` are fitted to, and the teacher is of these.
    """
    key = class_condition(ode, len(x), train)
    labels = None if key is None else ode.conditioning[key][:train].cpu()
    own = x[:train]
    starts = [Start("affine", own, teacher)]
    if teacher.final[0].numel() <= _LARGEST:
        try:
            starts.append(Start("diagonal", own, teacher, estimate_moments(teacher.final)))
            if key is not None:
                moments = estimate_moments(teacher.final, labels=labels, key=key)
                starts.append(Start("diagonal, per " + key, own, teacher, moments, key, labels))
        except IIAError as error:
            say(f"no covariance of the data: {first_line(error)}")
    return starts


def class_condition(ode: ProbabilityFlowODE, batch: int, train: int) -> str | None:
    """The name of a condition with few values, each held by enough of the training samples to have a mean."""
    for key, value in ode.conditioning.items():
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) == batch and not value.is_floating_point():
            _, counts = torch.unique(value[:train], return_counts=True)
            if len(counts) > 1 and bool((counts >= 8).all()) and bool(torch.isin(value, value[:train]).all()):
                return key
    return None
