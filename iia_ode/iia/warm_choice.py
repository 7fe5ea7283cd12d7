"""The choice among warm starts, and to do without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from ..ode import ProbabilityFlowODE
from .warm_start import WarmStart

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` chose, and from what.

    Attributes
    ----------
    warm : the warm start; None is to do without.
    rows : for each candidate its name, its level sigma/alpha at t_1, the root mean square distance to the teacher's states
        there, and the error of what follows (None where that was not asked for).
    best : index of the row that was chosen.
    """

    warm: WarmStart | None
    rows: tuple[tuple[str, float | None, float | None, float | None], ...]
    best: int

    def __str__(self) -> str:
        lines = [f"  {'map':<24} {'sigma_1':>9} {'rmse there':>11} {'error':>11}"]
        for i, (name, *values) in enumerate(self.rows):
            shown = ["-" if v is None else f"{v:.4g}" for v in values]
            lines.append(f"{'*' if i == self.best else ' '} {name:<24} {shown[0]:>9} {shown[1]:>11} {shown[2]:>11}")
        return "\n".join(lines)


def choose(
    candidates: Sequence[WarmStart | None],
    x: Tensor,
    states: Callable[[float], Tensor],
    *,
    error: Callable[[WarmStart | None], float] | None = None,
    ode: ProbabilityFlowODE | None = None,
) -> Choice:
    """The best of some warm starts, None (to do without) among them, judged on states that none was made from.

    Among maps to the same time it is the one nearest to the teacher's states there. Between times the states cannot be
    compared: there, `error` decides, over the best map of each.

    Parameters
    ----------
    candidates : warm starts, from the same `t_start`; None stands for none.
    x : the teacher's states at `t_start`, [n, *shape], held out.
    states : the teacher's states at a time, [n, *shape]: ``trajectory`` of :mod:`iia_ode.reference`, for instance.
    error : what the sampler is worth that goes on from there, such as its error at the end on held-out noise.
    ode : the ODE with the conditions of x, where constants are per condition.

    Raises
    ------
    InputError : nothing to choose from, or several times without `error`.
    """
    found = list(candidates)
    levels = {None if w is None else w.t_1 for w in found}
    if not found or (error is None and len(levels) > 1):
        raise InputError(
            "warm starts to several times, or none at all, are compared by what follows: pass error=, a function of a "
            "warm start or None, and at least one candidate."
        )
    gaps = [None if w is None else _rmse(w.apply(x.double(), ode), states(w.t_1)) for w in found]
    winners = [
        min((i for i, w in enumerate(found) if (w and w.t_1) == t), key=lambda i: gaps[i] or 0.0) for t in levels
    ]
    errors = {i: None if error is None else float(error(found[i])) for i in winners}
    best = min(winners, key=lambda i: _or_worst(errors[i])) if error is not None else winners[0]
    rows = tuple(
        (
            "none" if w is None else str(w.about.get("map", "map")),
            None if w is None else w.level,
            gaps[i],
            errors.get(i),
        )
        for i, w in enumerate(found)
    )
    return Choice(found[best], rows, best)


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).square().mean().sqrt())


def _or_worst(error: float | None) -> float:
    return math.inf if error is None or math.isnan(error) else error
