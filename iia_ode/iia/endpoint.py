"""How far final states are from where they should be, and which of several solvers that makes the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..metrics import paired_ratio
from ..ode import ProbabilityFlowODE
from ..plan import Plan
from .teacher import Teacher

__all__ = ["Ends", "by_robust_error", "chunks_of", "endpoint_errors", "known_ratio", "per_sample", "robust_mean"]

T = TypeVar("T")

_SPREAD = 0.25  # of the logarithms of ratios of plain means, among solvers that one has to choose from


def chunks_of(first: int, last: int, size: int) -> list[slice]:
    """The samples from `first` to before `last`, `size` at a time."""
    return [slice(i, min(i + size, last)) for i in range(first, last, size)]


@dataclass(frozen=True, eq=False)
class Ends:
    """Initial states and where they should end: what plans are measured on.

    Attributes
    ----------
    ode : the model with the conditions of the states.
    x, target : [B, ...], each on any device.
    chunk_size : how many go through the model at once.
    """

    ode: ProbabilityFlowODE
    x: Tensor
    target: Tensor
    chunk_size: int

    @classmethod
    def solve(
        cls,
        ode: ProbabilityFlowODE,
        x: Tensor,
        t: float,
        s: float,
        *,
        steps: int,
        sigma_min: float,
        chunk_size: int,
        progress: bool = False,
    ) -> Ends:
        """Those of a :class:`Teacher` from t to s, of whose trajectories only the ends are kept."""
        ends = [
            Teacher.solve(ode.subset(part, len(x)), x[part], t, s, steps=steps, sigma_min=sigma_min).final
            for part in tqdm(chunks_of(0, len(x), chunk_size), desc="ends", disable=not progress)
        ]
        return cls(ode, x, torch.cat(ends), chunk_size)

    def errors(self, plan: Plan, samples: slice | None = None) -> Tensor:
        """Root mean square error of each final state, float64 on the host, [samples]; of all by default."""
        samples = slice(0, len(self.x)) if samples is None else samples
        return endpoint_errors(plan, self.ode, self.x, self.target, samples, chunk_size=self.chunk_size)


@torch.no_grad()
def endpoint_errors(
    plan: Plan,
    ode: ProbabilityFlowODE,
    x: Tensor,
    target: Tensor,
    samples: slice,
    *,
    chunk_size: int,
) -> Tensor:
    """Root mean square error of each final state, float64 on the host, [samples].

    Parameters
    ----------
    plan, ode : what runs.
    x, target : initial states of the whole batch [B, ...] and where they should end, each on any device.
    samples : those of the batch that are asked for.
    chunk_size : how many go through the model at once.
    """
    found = []
    for part in chunks_of(samples.start, samples.stop, chunk_size):
        final = plan.run(ode.subset(part, len(x)), x[part], check_finite=False).double()
        found.append(per_sample(final - target[part].to(final.device).double()).cpu())
    return torch.cat(found)


def per_sample(difference: Tensor) -> Tensor:
    """Root mean square of each sample of [B, ...], [B]."""
    return difference.flatten(1).square().mean(dim=1).sqrt()


def robust_mean(errors: Tensor, scale: float) -> float:
    """The mean of errors, root mean square for those far below `scale` and growing like a logarithm beyond it."""
    squares = errors.double().square()
    if not bool(torch.isfinite(squares).all()):
        return math.inf
    if math.isfinite(scale):
        squares = scale * scale * (squares / (scale * scale)).log1p()
    return math.sqrt(float(squares.mean()))


def by_robust_error(items: Sequence[T], errors: Callable[[T], Tensor], *, outliers_too: bool = False) -> list[T]:
    """The items, best first, by the robust mean of their errors per sample.

    What counts as an outlier is the same for all: more than four times the lowest of their medians. With `outliers_too` by
    the product of that and the plain mean, as far as these samples know the latter: for a last choice, where a solver that
    loses more samples should have to be much better on the others. One sample that ends in another mode may make most of a
    plain mean, and says little of how rare such samples are. So the ratio of an item's plain mean to that of the item with the
    best robust mean is drawn in, as one drawn from ratios that spread by `_SPREAD` and known to its standard error.
    """
    if not items:
        return []
    medians = [float(errors(item).median()) for item in items]
    scale = 4 * min((m for m in medians if math.isfinite(m)), default=math.inf)
    scale = scale if scale > 0 else math.inf
    ranked = sorted(items, key=lambda item: robust_mean(errors(item), scale))
    if not outliers_too:
        return ranked
    best = errors(ranked[0])

    def score(item: T) -> float:
        robust = robust_mean(errors(item), scale)
        return robust * known_ratio(errors(item), best) if math.isfinite(robust) else math.inf

    return sorted(ranked, key=score)


def known_ratio(errors: Tensor, to: Tensor) -> float:
    """The ratio of two plain means of paired errors, drawn in toward 1 as far as it hangs on few samples."""
    squares, others = errors.double().square(), to.double().square()
    if not float(squares.sum()) > 0 or not float(others.sum()) > 0:
        return 1.0 if float(squares.sum()) == float(others.sum()) else math.sqrt(float(squares.sum() / others.sum()))
    ratio, error = paired_ratio(squares, others)
    return float(ratio ** (_SPREAD**2 / (_SPREAD**2 + (error / ratio) ** 2)))
