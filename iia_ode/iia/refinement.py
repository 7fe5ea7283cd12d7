"""Endpoint refinement: Gauss-Newton or Adam over all weights and times of a plan, through the sampler.

A sequential fit is greedy: each step aims at the trajectory, even where an error would be harmless at the end. A refinement
minimizes the mean of rho(|x_N(theta) - x*|) over theta, the :class:`~iia_ode.iia.Parameters` of the plan, with rho the
Cauchy loss. A :class:`~iia_ode.iia.Minimizer` lowers the loss; held-out samples choose the iteration, and stop it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_flag, check_number, check_whole
from ..errors import InputError, one_run, unknown_name
from ..metrics import flat
from ..ode import ProbabilityFlowODE
from ..ode.distributed import agree
from ..plan import Plan, check_states
from ..plan.checks import check_samples
from .batch import Batch, per_sample
from .minimizers import Adam, GaussNewton, IncrementalGaussNewton, Minimizer, Status
from .plan_parameters import Parameters
from .ranking import cauchy_mean

__all__ = ["EndpointError", "Iteration", "Refinement", "refine"]

_F64 = torch.float64
_METHODS = {"gauss-newton": (12, 1), "adam": (250, 25)}  # iterations, and the unit of the patience
_SIGHT = 32  # samples that tell the usual error
_SHARE = 0.5  # of the data's size, below which a moved state no longer shrinks with its noise; by trial
_RATES = (5e-3, 2e-2)  # of Adam, for weights and for log sigma/alpha


class EndpointError:
    """The endpoint error of a plan as a function of its parameters: root of the mean Cauchy loss over samples.

    Gauss-Newton needs J^T J, with J the derivative of all final components of all samples; a backward pass gives a single
    combination of rows of J per sample. The gradient J^T r of a sample with residual r is exact, and gives the part of the
    matrix along r. The other part is a Hutchinson estimate: E[(v^T J)^T (v^T J)] = J^T P J for random vectors v with
    E[v v^T] = P, the projection orthogonal to r. All samples give far more rows than there are parameters. A mini-batch does
    not; the sums over earlier steps make up for it.

    Parameters
    ----------
    parameters : the plan as a function of theta.
    batch : the samples with their true final states; a chunk of them shares a graph.
    probes : probes v per sample.
    checkpointed : see :meth:`Parameters.run`.
    seed : of the probes.

    Attributes
    ----------
    scale : error of a sample beyond which the Cauchy loss grows like a logarithm; infinity is the plain mean of squares.
    backward : cost of all backward passes so far, those of the parts included, in sample evaluations.
    seen : loss at the point of the last derivatives.
    """

    def __init__(
        self, parameters: Parameters, batch: Batch, *, probes: int = 3, checkpointed: bool = False, seed: int = 0
    ) -> None:
        self.parameters, self.batch, self.probes, self.checkpointed = parameters, batch, probes, checkpointed
        self.scale, self.seen, self._spent = math.inf, math.nan, [0]
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __len__(self) -> int:
        return len(self.batch)

    def part(self, first: int, count: int, /) -> EndpointError:
        """The same error of `count` samples from `first` on, in a circle; all samples at most."""
        index = (first + torch.arange(min(count, len(self.batch)), device="cpu")) % len(self.batch)
        own = EndpointError(self.parameters, self.batch[index], probes=self.probes, checkpointed=self.checkpointed)
        own.scale, own._generator, own._spent = self.scale, self._generator, self._spent
        return own

    @property
    def backward(self) -> int:
        """Cost of all backward passes so far."""
        return self._spent[0]

    def errors(self, theta: Tensor) -> Tensor:
        """Root mean square error of each sample, float64 [B] on the host; infinity where theta gives no plan."""
        if not self.parameters.valid(theta):
            return torch.full((len(self.batch),), math.inf, dtype=_F64, device="cpu")
        return self.batch.errors(self.parameters.plan(theta))

    def loss(self, theta: Tensor, /) -> float:
        """Root of the mean over samples of scale^2 log(1 + error^2 / scale^2)."""
        error = cauchy_mean(self.errors(theta), self.scale)
        return error if math.isfinite(error) else math.inf

    def derivatives(self, theta: Tensor, /) -> tuple[Tensor, Tensor]:
        """The gradient of half the summed loss, [P], and the estimate of J^T J, [P, P]; float64 on the host."""
        gradient = torch.zeros(len(theta), dtype=_F64, device="cpu")
        square = torch.zeros(len(theta), len(theta), dtype=_F64, device="cpu")
        errors: list[Tensor] = []
        for part in self.batch.chunks():
            slope, *rows = self._rows(theta, part, errors)
            gradient += slope.sum(dim=0)
            for row in rows:
                square += row.T @ row
        self.seen = cauchy_mean(torch.cat(errors), self.scale)
        return gradient, square

    def _rows(self, theta: Tensor, part: Batch, errors: list[Tensor]) -> list[Tensor]:
        """The gradient of each sample of a chunk, then v^T J for each probe, weighted by the loss; [B, P] each.

        The errors of the samples are appended to `errors`.
        """
        with torch.enable_grad():
            final, leaf = self.parameters.run(part.ode, part.x, theta, checkpointed=self.checkpointed)
        residual = final.detach().cpu().double() - part.target.cpu().double()
        errors.append(per_sample(residual))
        weight = 1 / (1 + (errors[-1] / self.scale).square())  # derivative of the Cauchy loss
        rest = flat(residual)
        length = rest.norm(dim=1, keepdim=True).clamp_min(1e-300)
        vectors = [weight[:, None] * rest, *(self._probe(rest / length) for _ in range(self.probes))]
        rows = [
            torch.autograd.grad(final, leaf, v.reshape(final.shape).to(final), retain_graph=k < self.probes)[0].cpu()
            for k, v in enumerate(vectors)
        ]
        self._spent[0] += 2 * (1 + self.probes) * self.parameters.evaluations * len(part)
        root = weight.sqrt()[:, None]
        scale = root / max(self.probes, 1) ** 0.5
        return [rows[0], rows[0] / (root * length), *(scale * row for row in rows[1:])]

    def _probe(self, along: Tensor) -> Tensor:
        """Random vectors v [B, D] orthogonal to unit vectors, with E[v v^T] the projection; zero where D is 1."""
        v = torch.randn(along.shape, generator=self._generator, dtype=_F64, device="cpu")
        v -= (v * along).sum(dim=1, keepdim=True) * along
        room = (
            along.shape[1] - along.square().sum(dim=1, keepdim=True)
        ).round()  # dimensions orthogonal to the unit vector
        probe: Tensor = v * (room.sqrt() / v.norm(dim=1, keepdim=True).clamp_min(1e-300))
        return probe


@dataclass(frozen=True)
class Iteration:
    """An iteration of a refinement.

    Attributes
    ----------
    train, held_out : root mean Cauchy loss after the iteration, on training and on held-out samples; None without any. With
        mini-batches and held-out samples, `train` is the loss of the last mini-batch, and NaN at the start.
    damping : of Levenberg and Marquardt; 0 at the start, and with Adam.
    """

    train: float
    held_out: float | None
    damping: float

    @property
    def error(self) -> float:
        """The loss that chooses the best iteration: of the held-out samples, or of the training samples without any."""
        return self.train if self.held_out is None else self.held_out


@dataclass(frozen=True, eq=False)
class Refinement:
    """The result of :func:`refine`.

    Attributes
    ----------
    plan : the refined plan, or the given plan where no iteration lowered the error.
    iterations : the start, then each iteration.
    best : index of the plan's iteration; 0 is the start.
    status : why the refinement stopped; in words, ``status.value``.
    sample_evaluations : cost of the refinement; a backward pass counts as two evaluations.
    backward : cost of the backward passes alone.
    """

    plan: Plan
    iterations: tuple[Iteration, ...]
    best: int
    status: Status
    sample_evaluations: int
    backward: int

    @property
    def gain(self) -> float:
        """Error of the result over the error of the start, at most 1; on held-out samples if there are any."""
        start = self.iterations[0].error
        return self.iterations[self.best].error / start if start else 1.0


@one_run()
@torch.inference_mode(False)
def refine(
    ode: ProbabilityFlowODE,
    x: Tensor,
    plan: Plan,
    target: Tensor,
    *,
    method: str = "gauss-newton",
    held_out: float = 0.25,
    learn_grid: bool = True,
    sigma_min: float = 0.0,
    iterations: int | None = None,
    minibatch: int | None = None,
    probes: int = 3,
    outliers: float = 4.0,
    tolerance: float = 2e-3,
    patience: int = 3,
    chunk_size: int = 64,
    checkpointed: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Refinement:
    """Lower the error of the final states over all weights and times of a plan at once.

    Parameters
    ----------
    ode : the model; gradients must flow through it.
    x : initial states [B, ...] at the start of the plan's grid.
    plan : the starting point; weights must be numbers, or linear maps over a single decomposition.
    target : final states to reach, [B, ...].
    method : ``"gauss-newton"`` or ``"adam"``. Adam needs more iterations, and gains more on very few samples and from plans
        far from a minimum, such as unfitted plans.
    held_out : share of held-out samples, the last of the batch. These samples choose the best iteration and stop the search.
    learn_grid : whether the interior times move.
    sigma_min : level sigma/alpha below which no time moves; for a network, the smallest level of its training.
    iterations : maximum number of iterations; by default 12, or 250 with Adam.
    minibatch : number of training samples of a step of Gauss-Newton, three steps per iteration, with other samples in each
        step (:class:`~iia_ode.iia.IncrementalGaussNewton`). By default an iteration is one step with all samples. Small
        batches reach nearly the same error at a fraction of the cost.
    probes : random probes per sample; Adam needs none.
    outliers : multiple of the median error beyond which the loss of a sample grows like a logarithm; ``math.inf`` is the
        plain mean of squares. Near the border of two modes a small error becomes a large error at the end. A few samples
        there would make up most of a plain mean, and their derivatives do not predict where the samples end.
    tolerance : stop after an iteration of Gauss-Newton that lowers the training error by less than this fraction; not with
        `minibatch`.
    patience : stop after this many iterations without a lower held-out error; 25 times as many with Adam; not with
        `minibatch`.
    chunk_size : samples per graph.
    checkpointed : recompute evaluations in the backward pass, for models with large graphs; see :meth:`Parameters.run`.
    seed : of the probes.
    progress : show a bar over the iterations.

    Returns
    -------
    The refined plan with the course of the refinement. The held-out error of the plan is never above the error of the start.

    Raises
    ------
    InputError : an argument is not usable, the plan has other weights, or no gradient flows through the model.
    RankError : for a distributed ODE: another process failed, or was asked for another refinement.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"refine takes a plan, such as fit.plan, got {type(plan).__name__}.")
    if not isinstance(target, Tensor):
        raise InputError(f"targets are a torch.Tensor of the shape of the states, got {type(target).__name__}.")
    check_states(ode, x, plan.grid[0])
    if method not in _METHODS:
        raise unknown_name("method of refinement", method, _METHODS)
    newton, (default, unit) = method == "gauss-newton", _METHODS[method]
    most = default if iterations is None else iterations
    for name, value in {"iterations": most, "probes": probes, "patience": patience, "chunk_size": chunk_size}.items():
        check_whole(name, value, least=1)
    if minibatch is not None:
        check_whole("minibatch", minibatch, least=1)
        if not newton:
            raise InputError("minibatch is for method='gauss-newton': Adam uses all samples.")
    if target.is_complex():
        raise InputError(f"targets must be real, as the states are, got {target.dtype}.")
    if x.shape != target.shape:
        raise InputError(f"targets {list(target.shape)} must have the shape of the states {list(x.shape)}.")
    check_samples(target)
    held_out = check_number("held_out", held_out, least=0, below=1)
    outliers = check_number("outliers (infinity for plain means)", outliers, above=0, finite=False)
    sigma_min = check_number("sigma_min", sigma_min, least=0)
    tolerance = check_number("tolerance", tolerance, least=0)
    check_flag("learn_grid", learn_grid)
    x, target = (
        v.clone() if v.is_inference() else v for v in (x, target)
    )  # autograd keeps no tensors of inference mode
    search = (
        method,
        most,
        held_out,
        learn_grid,
        sigma_min,
        probes,
        outliers,
        tolerance,
        patience,
        chunk_size,
        seed,
        minibatch,
    )
    agree(ode, "refine", x, plan, target, search)
    n = len(x)
    held = min(max(1, round(held_out * n)), n - 1) if held_out > 0 and n >= 2 else 0
    size = _SHARE * _data_size(plan, x, target)
    parameters = Parameters(plan, learn_grid=learn_grid, sigma_min=sigma_min, data_size=size)

    def over(part: Batch) -> EndpointError:
        return EndpointError(parameters, part, probes=probes if newton else 0, checkpointed=checkpointed, seed=seed)

    train, others = Batch(ode, x, None, chunk_size, target).split(held)
    if minibatch is not None:  # samples may be in the order of their conditions
        order = torch.randperm(len(train), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        train = train[order]
    objective, judge = over(train), over(others) if held else None
    with ode.counting() as spent:
        sighted = objective if minibatch is None else objective.part(0, max(minibatch, _SIGHT))
        scale = outliers * float(sighted.errors(parameters.initial).median())
        objective.scale = scale if scale > 0 else math.inf
        if judge is not None:
            judge.scale = objective.scale
        start, limit = parameters.initial, parameters.clipped
        rates = torch.tensor([_RATES[k >= parameters.weights] for k in range(len(start))], dtype=_F64, device="cpu")
        minimizer: Minimizer
        if minibatch is not None:
            minimizer = IncrementalGaussNewton(objective, start, minibatch=minibatch, whole=judge is None, limit=limit)
        elif newton:
            minimizer = GaussNewton(objective, start, tolerance=tolerance, limit=limit)
        else:
            minimizer = Adam(objective, start, rates=rates, limit=limit)
        wait = most if minibatch is not None else unit * patience  # mini-batches are noisy
        judged = None if judge is None else judge.loss
        found, best, theta, status = _best_so_far(minimizer, judged, most, wait, progress)
    result = plan if best == 0 else parameters.plan(theta, plan.name)
    return Refinement(result, found, best, status, spent.samples + objective.backward, objective.backward)


def _data_size(plan: Plan, x: Tensor, target: Tensor) -> float:
    """Root mean square of the data, from the states at the cleaner end of a plan without the variance of their noise."""
    level = plan.schedule.noise_to_signal
    t, states = min((plan.grid[0], x), (plan.grid[-1], target), key=lambda end: level(end[0]))
    alpha, sigma = plan.schedule.alpha(t), plan.schedule.sigma(t)
    square = float(states.detach().cpu().double().square().mean())
    # States of noise alone tell no size: that of data as small as a hundredth of the noise is as good as any.
    return math.sqrt(max(square - sigma * sigma, 1e-4 * square)) / alpha if square > 0 and alpha > 0 else 1.0


def _best_so_far(
    search: Minimizer, judge: Callable[[Tensor], float] | None, most: int, patience: int, progress: bool
) -> tuple[tuple[Iteration, ...], int, Tensor, Status]:
    """Run a minimization and keep the point that `judge` likes best; by default the judge is the loss itself."""

    def iteration() -> Iteration:
        return Iteration(search.loss, None if judge is None else judge(search.theta), search.damping)

    found, best, theta, status = [iteration()], 0, search.theta, Status.ITERATIONS
    for i in tqdm(range(1, most + 1), desc="refine", disable=not progress):
        if not search.step():
            status = search.status or Status.STALLED
            break
        found.append(iteration())
        if found[i].error < found[best].error:
            best, theta = i, search.theta
        elif i - best >= patience:
            status = Status.PATIENCE
            break
    return tuple(found), best, theta, status
