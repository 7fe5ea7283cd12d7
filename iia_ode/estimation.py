"""Estimate the model statistics of DPM-Solver-v3 along a model's trajectories [Zheng et al. 2023, appendix C.1.1]."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_seed, check_whole
from .errors import FileFormatError, GridError, InputError, NonFiniteError, RankError, one_run, unknown_name
from .files import read_tensors, to_json
from .forms import conversion
from .integrate import sample
from .jacobians import Forward, Products, Reverse, check_derivatives, rounding_of
from .ode import ProbabilityFlowODE
from .ode.clock import recorded_time
from .ode.guidance import recorded
from .ode.hosted import in_float64
from .ode.mode import in_training
from .plan import check_grid, check_ode, check_states
from .schedules import Schedule
from .schedules.base import derivative_of
from .sizes import size_of_data
from .statistics import KIND, Curve, Header, StatisticsTables, check_file

__all__ = ["ModelStatistics", "read_statistics"]

_F64 = torch.float64
_SOLVER = "unipc"  # of the trajectories: order 4 at one evaluation a step
_STEP = 0.1  # its largest step in log-SNR
# From alpha = 0 the first step goes to this log-SNR, for data of size 1: until then the data estimate is the data's mean.
_PURE_NOISE = -8.0
_ROUNDING = 1e-6  # relative variation that the moments, in float64, still tell from rounding
_MODES = ("auto", "forward", "reverse")
_log = logging.getLogger(__name__)


class ModelStatistics(StatisticsTables):
    """The statistics of a model that DPM-Solver-v3 needs: tables of l, s and b over the half-log-SNR.

    :meth:`estimate` makes the tables for a model, :meth:`save` writes them to a file, and :func:`iia_ode.load` reads the file.
    Two instances are equal, and have one hash, if their tables and schedules are equal.

    Parameters
    ----------
    lam : half-log-SNR, float64 [K], increasing.
    l, s, b : float64 [K, *shape], where shape broadcasts against one sample: the shape of a sample for coefficients per
        component, [C, 1, 1] for one coefficient per channel, [] for one number. Data prediction is l = 1, s = 0, b = 0; noise
        prediction is l = 0, s = -1, b = 0.
    schedule : ``config()`` of the schedule of the tables; None fits any schedule.
    about : provenance, JSON-ready.

    Raises
    ------
    InputError : the tables do not fit together, are not finite or not in order.
    """

    @staticmethod
    @one_run()
    def estimate(
        ode: ProbabilityFlowODE,
        x: Tensor,
        grid: Tensor | Sequence[float],
        *,
        points: int = 120,
        probes: int = 1,
        shared: str | Sequence[int] = (),
        batch_size: int | None = None,
        mode: str = "auto",
        seed: int = 0,
        progress: bool = False,
    ) -> ModelStatistics:
        """Estimate l, s and b of a model along its trajectories [Zheng et al. 2023, appendix C.1.1].

        At every node, over samples and over Rademacher probes v,

            l = 1 - alpha E[v (dD/dx v)],    s = Cov(f, f') / Var(f),    b = E[f'] - s E[f],

        with D the data estimate, f = (1 - l) x / alpha - D and f' its derivative along the flow. The model's part of f' is
        one Jacobian-vector product with the tangent of the flow. The product is exact. A difference of evaluations along
        the trajectory would have an error of the size of the network's rounding divided by a small step. Where f varies
        by no more than rounding, s = 0 and b = E[f'].

        A sample keeps its probes along its trajectory. The errors of the tables are then smooth in lambda, and a solver keeps
        its order. With new probes or new samples at every node the errors would be rough in lambda, and the order would be
        lost.

        Parameters
        ----------
        ode : the model. For guided sampling the paper advises statistics of the model without guidance.
        x : states at ``grid[0]``, [B, ...], float32 or float64. States of pure noise are ``sigma_T * randn``; the paper takes
            1024 to 4096 samples.
        grid : times, as for a solver. The table is equidistant in log-SNR between the first and the last time with finite
            log-SNR; times in between have no effect.
        points : rows of the table, at least 2, joined by cubic splines. The rows must resolve how the model depends on the
            noise level: 60 for the digits network, up to 1200 in the paper.
        probes : Rademacher probes for each sample.
        shared : dimensions of one sample along which coefficients are equal: ``(-2, -1)`` for one coefficient per channel,
            or ``"all"``.
        batch_size : number of samples in one batch of evaluations; all by default.
        mode : ``"forward"`` for forward differentiation; ``"reverse"`` for reverse differentiation with central differences
            for f', which every model allows; or ``"auto"`` for the first of the two that works.
        seed : of the probes.
        progress : show a bar over the nodes.

        Returns
        -------
        The tables, float64 [points, *shape] on the CPU.

        Raises
        ------
        InputError, GridError, UnknownNameError : an argument is not usable, or the model cuts its derivatives, by ``detach``
            or ``torch.no_grad`` inside.
        NonFiniteError : the states, the model or its derivatives are not finite.

        Warns
        -----
        StateSizeWarning : the states are too small for the noise level at the start of the grid.
        """
        given = check_grid(check_ode(ode).schedule, grid if isinstance(grid, Tensor) else list(grid))
        check_states(ode, x, given[0])
        points, probes = check_whole("points", points, least=2), check_whole("probes", probes, least=1)
        size = len(x) if batch_size is None else check_whole("batch_size", batch_size, least=1)
        seed = check_seed(seed)
        if mode not in _MODES:
            raise unknown_name("mode", mode, _MODES)
        unit = 1.0 if ode.schedule.alpha(given[0]) > 0 else size_of_data(ode, x, given[0], _lowest(ode.schedule, given))
        times, nodes = _times(ode.schedule, given, points, _PURE_NOISE - math.log(unit))
        dims, generator = _shared_dims(shared, x.ndim - 1), torch.Generator("cpu").manual_seed(seed)
        signs = (
            torch.randint(0, 2, (len(x), probes, *x.shape[1:]), generator=generator, dtype=torch.int8, device="cpu") * 2
            - 1
        )
        bar = tqdm(total=points * -(-len(x) // size), desc="statistics", disable=not progress)
        collector = _Collector(mode, nodes, dims, bar)
        with ode.counting() as spent, torch.inference_mode(False), torch.no_grad():
            for first in range(0, len(x), size):
                part = slice(first, first + size)
                own, start = in_float64(ode.subset(part, len(x)), x[part])
                collector.follow(own, start, times, signs[part].transpose(0, 1).to(start))
        bar.close()
        scale = recorded(ode.guidance_scale, ode.schedule)
        about = {
            "samples": len(x),
            "probes": probes,
            "mode": collector.mode,
            "seed": seed,
            "prediction": ode.prediction,
            "guidance_scale": scale if isinstance(scale, float) else to_json(scale),
            "guidance_rescale": ode.guidance_rescale,
            "time": to_json(recorded_time(ode.time, ode.time_rounding, ode.schedule)),
            "fingerprint": str(ode.fingerprint()),
            "train_mode": bool(in_training(ode)),
            "evaluations": spent.evaluations,
        }
        lam = torch.tensor([ode.schedule.lam(times[k]) for k in nodes], dtype=_F64, device="cpu")
        return _solve(
            lam, collector.moments, max(_ROUNDING, 1e3 * rounding_of(*in_float64(ode, x[:1]))), ode.schedule, about
        )


def read_statistics(path: str | os.PathLike[str], schedule: Schedule | None = None) -> ModelStatistics:
    """Read a file of :meth:`ModelStatistics.save`.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file.
    MismatchError : `schedule` is not the schedule of the statistics.
    """
    tensors, header = read_tensors(path, KIND, Header)
    try:
        check_file(tensors, header)
        found = ModelStatistics(**tensors, schedule=header.schedule, about=header.about)
    except InputError as error:
        raise FileFormatError(f"{str(path)!r} does not hold model statistics: {error}.") from error
    if schedule is not None:
        found.check(schedule)
    return found


# ---- where -----------------------------------------------------------------------------------------------------------


def _lowest(schedule: Schedule, times: Sequence[float]) -> float:
    """The cleanest level sigma/alpha of a grid above the data."""
    return min(level for t in times if (level := schedule.noise_to_signal(t)) > 0)


def _times(
    schedule: Schedule, given: Sequence[float], points: int, pure_noise: float
) -> tuple[list[float], dict[int, int]]:
    """The times of the trajectories' steps, and the nodes among them: position to row of the table.

    From alpha = 0, the first step goes to the log-SNR `pure_noise`.
    """
    finite = [t for t in given if math.isfinite(schedule.lam(t))]
    if len(finite) < 2:
        raise GridError(
            "statistics need a range of noise levels: a grid with at least two times where neither sigma nor alpha is 0."
        )
    start, end = schedule.lam(finite[0]), schedule.lam(finite[-1])
    parts = math.ceil(abs(end - start) / (points - 1) / _STEP)  # steps between two nodes
    fine = torch.linspace(start, end, (points - 1) * parts + 1, dtype=_F64, device="cpu")
    times = [finite[0], *schedule.t_of_lam(fine[1:-1]).tolist(), finite[-1]]
    before: list[float] = []
    if given[0] != finite[0]:
        ramp = torch.arange(min(pure_noise, start - 1), start - _STEP / 2, _STEP, dtype=_F64, device="cpu")
        before = [given[0], *schedule.t_of_lam(ramp).tolist()]
    return before + times, {len(before) + k * parts: k for k in range(points)}


def _shared_dims(shared: str | Sequence[int], ndim: int) -> tuple[int, ...] | None:
    """Dimensions to average over, counted from the end of a batch; None for all dimensions."""
    if shared == "all":
        return None
    if isinstance(shared, str) or not all(isinstance(d, int) and -ndim <= d < ndim for d in shared):
        raise InputError(f"shared must be 'all' or dimensions of one sample, which has {ndim}, got {shared!r}.")
    return (-1 - ndim, *sorted({d - ndim if d >= 0 else d for d in shared}))


# ---- one node --------------------------------------------------------------------------------------------------------


class _Collector:
    """The moments of every node, collected along trajectories; `mode` "auto" becomes the first mode the model allows."""

    def __init__(self, mode: str, nodes: Mapping[int, int], dims: tuple[int, ...] | None, bar: Any) -> None:
        self.mode, self.nodes, self.bar = mode, nodes, bar
        self.moments = [_Moments(dims) for _ in nodes]

    def follow(self, ode: ProbabilityFlowODE, x: Tensor, times: Sequence[float], signs: Tensor) -> None:
        """Add the trajectories from states x [B, ...], with their probes [probes, B, ...]."""

        def visit(k: int, t: float, state: Tensor) -> None:
            if k in self.nodes:
                self.moments[self.nodes[k]].add(self._columns(ode, state, t, signs))
                if self.nodes[k] == len(self.nodes) // 2:
                    check_derivatives(ode, state, t, signs, self.products)
                self.bar.update()

        visit(0, times[0], x)
        sample(ode, x, torch.tensor(times, dtype=_F64, device="cpu"), _SOLVER, callback=visit)

    def _columns(self, ode: ProbabilityFlowODE, x: Tensor, t: float, signs: Tensor) -> Tensor:
        if self.mode == "auto":
            try:
                found = _columns(ode, x, t, signs, Forward())
                self.mode = "forward"
                return found
            except (RankError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:  # NotImplementedError is one
                _log.info("no forward differentiation of this model (%s); reverse it is", error)
                self.mode = "reverse"
        return _columns(ode, x, t, signs, self.products)

    @property
    def products(self) -> Products:
        """The products of the mode."""
        return Reverse() if self.mode == "reverse" else Forward()


def _columns(ode: ProbabilityFlowODE, x: Tensor, t: float, signs: Tensor, products: Products) -> Tensor:
    """y = x / alpha, D, dD/dlambda along the flow, and an estimate of l, stacked: float64 [4, B, ...]."""
    schedule, time = ode.schedule, torch.tensor(t, dtype=_F64, device="cpu")
    alpha, alpha_dt = schedule.alpha(t), schedule.alpha_prime(t)
    dt = 1 / (alpha_dt / alpha - schedule.sigma_prime(t) / schedule.sigma(t))  # by lambda, as all slopes here

    def factor(u: Tensor, i: int) -> Tensor:
        value: Tensor = u * 0 + conversion(schedule, u, ode.prediction, "data")[i]
        return value

    p, q = (float(factor(time, i)) for i in (0, 1))
    p_slope, q_slope = (dt * float(derivative_of(partial(factor, i=i), time)) for i in (0, 1))
    out, diagonal = products.diagonal(ode, x, t, signs)
    data, y = p * x + q * out, x / alpha
    dx = alpha_dt * dt * y + alpha * (data - y)
    slope = p_slope * x + p * dx + q_slope * out + q * products.along(ode, x, t, dx, dt)
    return torch.stack([y, data, slope, 1 - alpha * (p + q * diagonal)])


# ---- from moments to tables ------------------------------------------------------------------------------------------


class _Moments:
    """Means of (y, D, D', l) and covariances of y, D and D' at one node, over samples and shared dimensions.

    f and f' are combinations of y, D and D' with coefficients of l and its derivative, which are known after all nodes.
    """

    def __init__(self, dims: tuple[int, ...] | None) -> None:
        self.dims, self.count = dims, 0

    def add(self, columns: Tensor) -> None:
        """Merge a batch of columns [4, B, ...] [Chan, Golub, LeVeque 1983]."""
        mean = self._over(columns)
        centred = columns[:3] - self._over(columns, keepdim=True)[:3]
        covariance = torch.stack([self._over(centred * row) for row in centred]).cpu()
        mean, n = mean.cpu(), columns[0].numel()
        if self.count == 0:
            self.mean, self.covariance = mean, covariance
        else:
            share = n / (self.count + n)
            gap = mean - self.mean
            between = gap[:3].unsqueeze(1) * gap[:3].unsqueeze(0)
            self.covariance = (1 - share) * (self.covariance + share * between) + share * covariance
            self.mean = self.mean + share * gap
        self.count += n

    def _over(self, columns: Tensor, keepdim: bool = False) -> Tensor:
        """Mean over the batch and the shared dimensions; shared dimensions stay with size 1, unless all are shared."""
        if self.dims is None:
            out = columns.reshape(len(columns), -1).mean(1)
            return out.reshape(-1, *[1] * (columns.ndim - 1)) if keepdim else out
        out = columns.mean(self.dims, keepdim=True)
        return out if keepdim else out.squeeze(1)


def _solve(
    lam: Tensor, moments: Sequence[_Moments], resolution: float, schedule: Schedule, about: dict[str, Any]
) -> ModelStatistics:
    """The tables: l as estimated, then s and b by least squares with the derivative of the interpolant of l."""
    order = lam.argsort()
    lam, mean = lam[order], torch.stack([moments[k].mean for k in order.tolist()], dim=1)
    covariance = torch.stack([moments[k].covariance for k in order.tolist()], dim=2)
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise NonFiniteError("the model or its derivatives are not finite somewhere on the trajectories.")
    l = mean[3]  # noqa: E741
    l_slope = torch.from_numpy(Curve(lam.numpy(), l.numpy()).slope(lam.numpy()))
    one = torch.ones_like(l)
    f = torch.stack([1 - l, -one, 0 * one])  # in terms of y, D and D', where y' = D - y
    f_slope = torch.stack([-(1 - l) - l_slope, 1 - l, -one])
    variance, common = (torch.einsum("i...,ij...,j...->...", f, covariance, g) for g in (f, f_slope))
    scale = (f[:2].square() * (covariance.diagonal().movedim(-1, 0) + mean[:3].square())[:2]).sum(0)
    varies = variance > resolution**2 * scale
    s = torch.where(varies, common / torch.where(varies, variance, one), 0 * one)
    b = (f_slope * mean[:3]).sum(0) - s * (f * mean[:3]).sum(0)
    return ModelStatistics(lam, l, s, b, schedule.config(), about)
