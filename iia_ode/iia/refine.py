"""Endpoint refinement: all weights and the grid of a plan together, by Gauss-Newton or Adam through the sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError, unknown_name
from ..ode import ProbabilityFlowODE
from ..plan import Plan, check_start
from .endpoint import chunks_of, endpoint_errors, per_sample, robust_mean
from .plan_parameters import Parameters

__all__ = ["METHODS", "Iteration", "Refinement", "refine"]

_F64 = torch.float64
METHODS = ("gauss-newton", "adam")
_NOT_FINITE = "the derivatives are not finite"
_TRIES = 6  # dampings that a Gauss-Newton iteration tries before it gives up
_STRETCHES = 12  # of Adam
_WORSE = 1.5  # times the training error at the start of a stretch, where it ends
_STALLED = 12  # iterations without a lower training error, after which a stretch ends


@dataclass(frozen=True)
class Iteration:
    """One iteration of a refinement.

    Attributes
    ----------
    train, held_out : root mean square endpoint error after it, on the samples of the fit and on the others.
    damping : of Levenberg and Marquardt, or 0.
    """

    train: float
    held_out: float
    damping: float


@dataclass(frozen=True, eq=False)
class Refinement:
    """The outcome of :func:`refine`.

    Attributes
    ----------
    plan : the refined plan, or the given one where no iteration lowered the held-out error.
    iterations : the start, then each iteration.
    best : which of them the plan is from; 0 is the start.
    reason : why it stopped.
    sample_evaluations : what it spent; a backward pass counts as two evaluations.
    backward : the part of that which is backward passes.
    """

    plan: Plan
    iterations: tuple[Iteration, ...]
    best: int
    reason: str
    sample_evaluations: int
    backward: int

    @property
    def gain(self) -> float:
        """Held-out error of the result over that of the start, at most 1."""
        start = self.iterations[0].held_out
        return self.iterations[self.best].held_out / start if start else 1.0


def refine(
    plan: Plan,
    ode: ProbabilityFlowODE,
    x: Tensor,
    target: Tensor,
    *,
    held_out: float = 0.25,
    method: str = "gauss-newton",
    learn_grid: bool = True,
    sigma_min: float = 0.0,
    iterations: int | None = None,
    probes: int = 3,
    rates: tuple[float, float] = (5e-3, 2e-2),
    outliers: float = 4.0,
    tolerance: float = 2e-3,
    patience: int = 3,
    chunk_size: int = 64,
    checkpointed: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Refinement:
    """Lower the error of the final states over all weights and times of a plan at once.

    A sequential fit is greedy: every step aims at the trajectory, also where an error there would be harmless at the end.
    Here the mean of |x_N(theta) - target|^2 is minimised over theta, the plan's :class:`Parameters`, from where the plan is.

    Gauss-Newton needs J^T J, J the derivative of all final components of all samples, and one backward pass gives only one
    of its rows per sample. So each sample contributes `probes` random combinations v^T J of its rows, v of independent
    signs, which have E[(v^T J)^T (v^T J)] = J^T J: a sketch with far more rows than there are parameters. The gradient
    itself is exact. Steps are damped as by Levenberg and Marquardt, in the scale of the diagonal.

    Parameters
    ----------
    plan : where to start; its weights must be numbers, or linear maps over one decomposition.
    ode : the model; gradients must flow through it.
    x : initial states [B, ...] at the start of the plan's grid.
    target : where they should end, [B, ...].
    held_out : share of the batch, its last samples, by whose error the best iteration is chosen and the search is stopped.
    method : ``"gauss-newton"`` or ``"adam"``.
    learn_grid : whether the interior times move.
    sigma_min : level sigma/alpha below which no time is moved: the smallest that the model was trained on.
    iterations : at most so many; by default 12 of Gauss-Newton, 250 of Adam.
    probes : sketched rows per sample.
    rates : of Adam, for weights and for log sigma; halved, and the plan with the lowest training error so far taken up again,
        where they lead to a much higher error, to none lower for a while, or to no plan at all.
    outliers : errors of a sample beyond so many times the median one count less and less. Near the border of two modes a
        small error becomes a large one at the end: a few such samples would make up the whole of a plain mean of squares,
        and their derivatives say nothing of where they would land. ``math.inf`` is the plain mean.
    tolerance : stop once the training error falls by less than this part in an iteration of Gauss-Newton.
    patience : iterations of Gauss-Newton without a lower held-out error before it stops (25 times as many of Adam).
    chunk_size : samples whose graph is held at a time.
    checkpointed : see :meth:`Parameters.run`; for models whose graphs are large.
    seed : of the random signs.
    progress : show a bar.

    Raises
    ------
    InputError : an argument is not usable, the plan has weights that are no numbers, or no gradient flows through the model.
    """
    check_start(ode, x)
    if method not in METHODS:
        raise unknown_name("method of refinement", method, METHODS)
    counts = {"probes": probes, "chunk_size": chunk_size, "iterations": 1 if iterations is None else iterations}
    if wrong := [f"{k}={v!r}" for k, v in counts.items() if not isinstance(v, int) or v < 1]:
        raise InputError(f"{' and '.join(wrong)}: a refinement takes whole numbers from 1.")
    if x.shape != target.shape:
        raise InputError(f"targets {list(target.shape)} must have the shape of the states {list(x.shape)}.")
    if not 0 <= held_out < 1:
        raise InputError(f"held_out is a share of the batch, from 0 to below 1, got {held_out!r}.")
    n = len(x)
    held = min(max(1, round(held_out * n)), n - 1) if held_out > 0 and n >= 2 else 0
    job = _Job(
        Parameters(plan, learn_grid=learn_grid, sigma_min=sigma_min),
        ode,
        x,
        target,
        n - held,
        chunk_size,
        checkpointed,
    )
    steps: Iterator[tuple[Tensor, float]]
    if method == "gauss-newton":
        steps = _gauss_newton(job, probes, seed, tolerance)
        most, wait = 12 if iterations is None else iterations, patience
    else:
        steps = _adam(job, rates)
        most, wait = 250 if iterations is None else iterations, 25 * patience
    theta = job.parameters.initial
    best, best_theta, reason = 0, theta, ""
    with ode.counting() as spent:
        job.set_scale(theta, outliers)
        found = [Iteration(job.loss(theta, train=True), job.loss(theta, train=False), 0.0)]
        for i, (theta, damping) in enumerate(tqdm(steps, desc="refine", total=most, disable=not progress), start=1):
            found.append(Iteration(job.loss(theta, train=True), job.loss(theta, train=False), damping))
            if found[-1].held_out < found[best].held_out:
                best, best_theta = i, theta
            elif i - best >= wait:
                reason = "the held-out error no longer fell"
                break
            if i == most:
                reason = "it had made as many iterations as allowed"
                break
    result = plan if best == 0 else job.parameters.plan(best_theta, plan.name)
    return Refinement(result, tuple(found), best, reason or job.reason, spent.samples + job.backward, job.backward)


class _Job:
    """The error as a function of the parameters, with its derivatives; counts its backward passes."""

    def __init__(
        self,
        parameters: Parameters,
        ode: ProbabilityFlowODE,
        x: Tensor,
        target: Tensor,
        train: int,
        chunk_size: int,
        checkpointed: bool,
    ) -> None:
        self.parameters, self.ode, self.x, self.target, self.train = parameters, ode, x, target, train
        self.chunk_size, self.checkpointed = chunk_size, checkpointed
        self.backward = 0
        self.reason = "the training error no longer fell"  # why there is no next iteration, once there is none
        self._known: dict[tuple[bytes, bool], float] = {}

    def set_scale(self, theta: Tensor, outliers: float) -> None:
        """Fix what counts as an outlier: errors beyond `outliers` times the median over the training samples."""
        errors = self._errors(theta, 0, self.train)
        self.scale = outliers * float(errors.median()) if math.isfinite(outliers) else math.inf
        self.scale = self.scale if self.scale > 0 else math.inf
        self._known.clear()

    def loss(self, theta: Tensor, *, train: bool) -> float:
        """Root of the mean over samples of scale^2 log(1 + error^2 / scale^2); infinity where there is no such plan."""
        if not train and self.train == len(self.x):
            return self.loss(theta, train=True)
        key = (theta.numpy().tobytes(), train)
        if key not in self._known:
            errors = self._errors(theta, 0 if train else self.train, self.train if train else len(self.x))
            error = robust_mean(errors, self.scale)
            self._known[key] = error if math.isfinite(error) else math.inf
        return self._known[key]

    def _errors(self, theta: Tensor, first: int, last: int) -> Tensor:
        """Root mean square error of each sample, float64 on the host."""
        if not self.parameters.valid(theta):
            return torch.full((last - first,), math.inf, dtype=_F64, device="cpu")
        plan, samples = self.parameters.plan(theta), slice(first, last)
        return endpoint_errors(plan, self.ode, self.x, self.target, samples, chunk_size=self.chunk_size)

    def derivatives(self, theta: Tensor, probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The gradient of half the squared error over the training samples, [P], and the sketch of J^T J, [P, P]."""
        gradient = torch.zeros(len(theta), dtype=_F64, device="cpu")
        square = torch.zeros(len(theta), len(theta), dtype=_F64, device="cpu")
        for part in chunks_of(0, self.train, self.chunk_size):
            ode = self.ode.subset(part, len(self.x))
            with torch.enable_grad():
                final, leaf = self.parameters.run(ode, self.x[part], theta, checkpointed=self.checkpointed)
                residual = final.detach().double() - self.target[part].to(final.device).double()
                weight = 1 / (1 + (per_sample(residual) / self.scale).square())  # derivative of the loss, per sample
                residual = residual * weight.reshape(-1, *[1] * (residual.ndim - 1))
                signs = [
                    2.0 * torch.randint(0, 2, final.shape, generator=generator, device="cpu") - 1 for _ in range(probes)
                ]
                root = weight.sqrt()[:, None].cpu()
                rows = [
                    torch.autograd.grad(final, leaf, v.to(final), retain_graph=k < probes)[0].double().cpu()
                    for k, v in enumerate((residual, *signs))
                ]
            self.backward += 2 * (1 + probes) * self.parameters.evaluations * (part.stop - part.start)
            gradient += rows[0].sum(dim=0)
            for row in rows[1:]:
                square += (root * row).T @ (root * row) / probes
        return gradient, square


def _gauss_newton(job: _Job, probes: int, seed: int, tolerance: float) -> Iterator[tuple[Tensor, float]]:
    generator = torch.Generator("cpu").manual_seed(seed)
    theta, damping = job.parameters.initial, 1e-3
    error = job.loss(theta, train=True)
    while True:
        gradient, square = job.derivatives(theta, probes, generator)
        if not bool(torch.isfinite(gradient).all() and torch.isfinite(square).all()):
            job.reason = _NOT_FINITE
            return
        scale = square.diagonal().clamp_min(1e-12 * float(square.diagonal().max()) + 1e-300)
        for _ in range(_TRIES):
            # In units of the diagonal, where the matrix is a correlation matrix and rounding has no scale to hide in.
            unit = scale.sqrt()
            matrix = square / unit / unit[:, None] + damping * torch.eye(len(theta), dtype=_F64, device="cpu")
            tried = job.parameters.clipped(theta, theta - torch.linalg.solve(matrix, gradient / unit) / unit)
            tried_error = job.loss(tried, train=True)
            if tried_error < error:
                break
            damping *= 8
        else:
            return
        gained = 1 - tried_error / error
        theta, error = tried, tried_error
        yield theta, damping
        damping = max(damping / 4, 1e-9)
        if gained < tolerance:
            job.reason = f"the training error fell by less than {tolerance:g} of itself"
            return


def _adam(job: _Job, rates: tuple[float, float]) -> Iterator[tuple[Tensor, float]]:
    """Stretches of Adam, each from the lowest training error so far, at half the rates of the one before.

    How far a weight may move in an iteration depends on the model and on the number of evaluations: rates that are right for
    one plan throw another farther off than it ever comes back from.
    """

    def slope(theta: Tensor) -> Tensor:
        """The gradient of the mean square error; it has no random signs."""
        return job.derivatives(theta, 0, torch.Generator("cpu"))[0] / (job.train * job.x[0].numel())

    weights = job.parameters.weights
    best, lowest = job.parameters.initial, job.loss(job.parameters.initial, train=True)
    steepest = slope(best)  # the gradient at the best
    for stretch in range(_STRETCHES):
        if not bool(torch.isfinite(steepest).all()):
            job.reason = _NOT_FINITE
            return
        groups = [best[:weights].clone().requires_grad_(True), best[weights:].clone().requires_grad_(True)]
        own = [rate / 2**stretch for rate in rates]
        optimiser = torch.optim.Adam([{"params": [g], "lr": rate} for g, rate in zip(groups, own, strict=True)])
        gradient, begun, since = steepest, lowest, 0
        while bool(torch.isfinite(gradient).all()):
            for g, part in zip(groups, (gradient[:weights], gradient[weights:]), strict=True):
                g.grad = part
            optimiser.step()
            theta = job.parameters.floored(torch.cat([g.detach() for g in groups]))
            groups[1].data.copy_(theta[weights:])
            if not job.parameters.valid(theta):
                why = "times that cross or leave the schedule, or numbers that are not finite"
                break
            yield theta, 0.0
            error, since = job.loss(theta, train=True), since + 1
            lower = error < lowest
            if not lower and (since == _STALLED or error > _WORSE * begun):
                why = "no lower training error"
                break
            gradient = slope(theta)
            if lower:
                best, lowest, steepest, since = theta, error, gradient, 0
        else:
            why = "derivatives that are not finite"
    job.reason = f"rates of {own[0]:.1g} and {own[1]:.1g} still led to {why}"
