"""An approximation of the model along a teacher's trajectories, which ranks the candidates of a search without evaluations.

A teacher has states x*(t) and data estimates D*(t) at every time. Near its trajectories, a data estimate is about

    D(x, t) = D*(t) + gain(t) (x - x*(t)) / alpha(t).

For isotropic Gaussian data of root mean square s, this is exact with the gain s^2 / (s^2 + level^2), level = sigma/alpha. Runs
of the model measure how far the gain of each sample departs from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..bounded import Bounded
from ..iia.batch import Batch, per_sample
from ..metrics import flat
from ..ode import ProbabilityFlowODE
from ..ode.origin import Origin
from ..plan import Plan
from ..reference import Trajectory
from ..teacher import Teacher

__all__ = ["Gains", "Nearby", "Watched", "watched"]

_F64 = torch.float64
_WIDTH = 0.5  # of the kernel over log levels
_PRIOR = 0.2  # weight of the Gaussian gain beside a measured gain at the same level
_LARGEST = 3.0  # gain of a sample; a sample between two modes has gains above 1
_COMPONENTS = 4096  # of a sample: a search of scalar weights sees no more, evenly spaced
_MEMORY = 2**28  # bytes of interpolated states
_DEVIATION, _LENGTH, _NOISE = 0.3, 0.7, 0.03  # of the ratio of real to predicted errors
_SAMPLE = "_sample"  # condition with the index of each sample


@dataclass(eq=False)
class Gains:
    """Derivatives of the data estimate by the state / alpha: per sample, as a function of the noise level.

    Attributes
    ----------
    size : root mean square s of the data.
    levels : log sigma/alpha of the measurements.
    weights, ratios : weights of the measurements, and measured gains over Gaussian gains; a tensor [B] per measurement.
    """

    size: float
    levels: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)

    def gaussian(self, level: float) -> float:
        """The gain of isotropic Gaussian data."""
        return self.size**2 / (self.size**2 + level**2)

    def add(self, level: float, squares: Tensor, products: Tensor) -> None:
        """Add a measurement: means over components of e^2 and of e (D - D*), with e = x/alpha - x*/alpha, [B] each."""
        usual = float(squares.mean())
        if not 0 < level < math.inf or not 0 < usual < math.inf or not bool(torch.isfinite(products).all()):
            return
        gains = (products / squares.clamp_min(1e-30 * usual)).clamp(-_LARGEST, _LARGEST)
        self.levels.append(math.log(level))
        self.weights.append((squares / usual).clamp_max(4.0))
        self.ratios.append(gains / self.gaussian(level))

    def at(self, level: float) -> Tensor | float:
        """The gains at a level, [B], no lower than the Gaussian gain; one number where nothing was measured.

        Without the bound, errors would be predicted too low: a gain measured along a small error has errors of its own.
        """
        if not self.levels or not 0 < level < math.inf:
            return self.gaussian(level) if level < math.inf else 0.0
        near = [math.exp(-0.5 * ((math.log(level) - v) / _WIDTH) ** 2) for v in self.levels]
        total = torch.full_like(self.ratios[0], _PRIOR)
        sums = total.clone()
        for own, weight, ratio in zip(near, self.weights, self.ratios, strict=True):
            total += own * weight
            sums += own * weight * ratio
        return (sums / total).clamp_min(1.0) * self.gaussian(level)


class _Along:
    """The data estimate near the trajectories of a teacher, as a model."""

    def __init__(self, path: Trajectory, gains: Gains) -> None:
        self.path, self.gains, self.schedule = path, gains, path.schedule
        self.tag = "along a teacher"
        self._known: Bounded[float, tuple[Tensor, Tensor]] = Bounded(2**12, _bytes, _MEMORY)

    def __call__(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        time, index = float(t.reshape(-1)[0]), conditions[_SAMPLE]
        found = self._known.get(time)
        if found is None:
            found = self.path(time).double(), self.path.data_estimate(time).double()
            self._known.put(time, found)
        state, data = (v[index] for v in found)
        alpha = self.schedule.alpha(time)
        if alpha == 0:
            return data.to(x)
        gain = self.gains.at(self.schedule.noise_to_signal(time))
        if isinstance(gain, Tensor):
            gain = gain[index].reshape(-1, *[1] * (x.ndim - 1))
        return (data + gain / alpha * (x - state)).to(x)


@dataclass(frozen=True, eq=False)
class Nearby:
    """Samples with an approximate ODE in place of their own.

    Attributes
    ----------
    batch : the samples with the approximate ODE and their teacher, in float64 on the host.
    gains : the gains behind the ODE; the ODE changes as gains are measured.
    """

    batch: Batch
    gains: Gains

    @classmethod
    def of(cls, batch: Batch, gains: Gains | None = None, *, thin: bool = False) -> Nearby:
        """The approximation from the teacher of a batch alone.

        Parameters
        ----------
        batch : samples with a teacher.
        gains : measured gains; by default those of isotropic Gaussian data.
        thin : whether samples may be reduced to some of their components, [B, d], where they have many.
        """
        teacher, x = batch.taught, batch.x.detach().cpu().double()
        target = batch.target.cpu().double()
        if thin and x[0].numel() > _COMPONENTS:
            keep = torch.arange(_COMPONENTS, device="cpu") * x[0].numel() // _COMPONENTS
            x, target, teacher = flat(x)[:, keep], flat(target)[:, keep], _thinned(teacher, keep)
        gains = Gains(teacher.record.data_size) if gains is None else gains
        index = {_SAMPLE: torch.arange(len(x), device="cpu")}
        model = _Along(teacher.path, gains)
        conditions = index | dict(batch.ode.conditioning)
        ode = ProbabilityFlowODE(model, batch.ode.schedule, "data", conditioning=conditions, tag=model.tag)
        # A fit may check that the teacher is that of the ODE.
        teacher = replace(teacher, record=replace(teacher.record, origin=Origin.of(ode, x), conditions=None))
        return cls(replace(batch, ode=ode, x=x, teacher=teacher, final=target, signal=None), gains)


@dataclass(frozen=True, eq=False)
class Correction:
    """The ratio of real to predicted errors as a function of the levels of a grid: a Gaussian process on its logarithm.

    The process has the mean of the known ratios, standard deviation 0.3, and a length of 0.7 in the root mean square of
    differences of log levels [Rasmussen & Williams 2006, section 2.2].

    Attributes
    ----------
    places : log levels of the known grids, float64 [n, N - 1].
    weights : weights of the kernel at each, float64 [n].
    """

    places: Tensor
    weights: Tensor

    @classmethod
    def of(cls, places: Sequence[Tensor], ratios: Sequence[float]) -> Correction:
        """The process through known logarithms of ratios."""
        at = torch.stack(list(places)) if places else torch.zeros(0, 0, dtype=_F64, device="cpu")
        values = torch.tensor(ratios, dtype=_F64, device="cpu")
        matrix = _kernel(at, at) + _NOISE**2 * torch.eye(len(at), dtype=_F64, device="cpu")
        return cls(at, torch.linalg.solve(matrix, values - values.mean()) if len(at) else values)

    def __call__(self, place: Tensor) -> float:
        """The ratio at a place, relative to the mean ratio."""
        return math.exp(float(_kernel(place[None], self.places)[0] @ self.weights)) if len(self.places) else 1.0


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    distance = (a[:, None] - b[None]).square().mean(2) / _LENGTH**2
    return _DEVIATION**2 * (-0.5 * distance).exp()


@dataclass(frozen=True, eq=False)
class Watched:
    """Endpoint errors of a run, and changes of its data estimates.

    Attributes
    ----------
    errors : errors of the final states, as :meth:`Batch.errors`, float64 [B] on the host.
    changes : root mean square change D - D* of the data estimate at the evaluation where it is largest, float64 [B]; None
        where it is not known.
    """

    errors: Tensor
    changes: Tensor | None = None

    @property
    def risk(self) -> float:
        """Root mean square of the errors and of the changes; infinite where one is not finite.

        Few samples do not show how many end in another mode. Those near the border between two modes are more, and their data
        estimates change, whichever mode they end in.
        """
        squares = self.errors.square()
        risk = float((squares if self.changes is None else squares + self.changes.square()).mean().sqrt())
        return risk if math.isfinite(risk) else math.inf


def watched(plan: Plan, batch: Batch, gains: Gains | None = None) -> Watched:
    """Run a plan over a batch with a teacher, and add the measurements of the run to `gains`, if any."""
    schedule = plan.schedule
    chunks: list[list[tuple[float, Tensor]]] = []  # for each chunk, levels and squares, products and changes [3, b]
    errors: list[Tensor] = []
    with torch.no_grad():
        for part in batch.chunks():
            run = plan.start(part.x, part.ode.prediction, conditioning=part.ode.conditioning)
            path, seen = part.taught.path, []
            while not run.done:
                state, t = run.current, run.t
                run.give(part.ode.borrowed(state, t))
                alpha = schedule.alpha(t)
                if alpha > 0 and t != part.taught.t_start:
                    error = flat((state.cpu().double() - path(t)) / alpha)
                    change = flat(run.data.cpu().double() - path.data_estimate(t))
                    found = error.square().mean(1), (error * change).mean(1), change.square().mean(1).sqrt()
                    seen.append((schedule.noise_to_signal(t), torch.stack(found)))
            chunks.append(seen)
            errors.append(per_sample(run.current.cpu().double() - part.target.cpu().double()))
    largest = torch.zeros(len(batch), dtype=_F64, device="cpu")
    for evaluation in zip(*chunks, strict=True):
        squares, products, changes = torch.cat([values for _, values in evaluation], dim=1)
        if gains is not None:
            gains.add(evaluation[0][0], squares, products)
        largest = torch.maximum(largest, changes)
    return Watched(torch.cat(errors), largest)


def _thinned(teacher: Teacher, keep: Tensor) -> Teacher:
    """The teacher of some components of the samples, [B, d]."""

    def part(values: Tensor, lead: int) -> Tensor:
        return values.reshape(*values.shape[:lead], -1)[..., keep]

    path = teacher.path
    data = None if path.data is None else part(path.data, 1)
    thin = replace(path, states=part(path.states, 2), slopes=part(path.slopes, 2), data=data)
    return Teacher(part(teacher.initial, 1), thin, replace(teacher.record, conditions=None))


def _bytes(found: Iterable[Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in found)
