"""Solvers as samplers of k-diffusion, ComfyUI and A1111: ``f(model, x, sigmas, extra_args, callback, disable)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .errors import InputError, MismatchError
from .iia import FittedSolver
from .integrate import fixed_method
from .plan import Plan, traced
from .schedules import EDM, FlowMatching, Schedule
from .solvers import Solver

__all__ = ["Sampler", "sampler", "sigmas_of"]

_CLOSE = 1e-4  # relative difference of levels that count as equal; float32 has 1e-7, float16 1e-3


class Sampler(Protocol):
    """The contract of k-diffusion's samplers."""

    def __call__(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """Integrate x from ``sigmas[0]`` to ``sigmas[-1]``."""


def sampler(solver: str | Solver | FittedSolver | Plan, *, flow: bool = False) -> Sampler:
    """Make a sampler with the contract of k-diffusion's functions, such as ``sample_euler``.

    The result is a function ``f(model, x, sigmas, extra_args=None, callback=None, disable=None)``:

    - `model` is called as ``model(x, sigma, **extra_args)`` with states [B, ...] and sigmas [B], and returns its estimate of
      x_0;
    - `x` is the state x_0 + ``sigmas[0]`` noise, [B, ...], of any floating dtype; half precision is integrated in float32;
    - `sigmas` [N + 1] are decreasing levels on any device; the last may be 0. The levels are read once, before the first call
      of the model;
    - `callback` is called once for each step with a dict: ``x`` and ``denoised`` [B, ...], the step ``i``, and ``sigma`` and
      ``sigma_hat``, the level of the step. A step without an evaluation of its own has no call;
    - `disable` hides the progress bar; None hides the bar outside of terminals.

    Parameters
    ----------
    solver : a registered name, a :class:`~iia_ode.Solver`, a fitted solver or a plan. Fitted solvers and plans have a grid of
        their own, for a schedule of any kind: pass ``sigmas=sigmas_of(solver)``.
    flow : the model is a flow model with states (1 - sigma) x_0 + sigma noise, as ComfyUI runs SD3 and Flux.

    Returns
    -------
    The sampler.

    Raises
    ------
    UnknownNameError : no such solver.
    InputError : `solver` is no solver of fixed steps; in the sampler, a shape or a value is not usable.
    MismatchError : in the sampler, `sigmas` are not the levels of the fitted solver or plan.
    GridError : in the sampler, `sigmas` do not decrease.

    Examples
    --------
    >>> sample_unipc = iia.kdiffusion.sampler("unipc")
    >>> x_0 = sample_unipc(model, sigmas[0] * noise, sigmas, extra_args={"cond": cond})
    """
    method, schedule = fixed_method(solver), FlowMatching() if flow else EDM()

    @torch.no_grad()
    def sample(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        levels = _levels(sigmas)
        if len(levels) < 2:
            return x
        plan = _plan(method, schedule, levels)
        return _run(plan, schedule, levels, model, x, sigmas, dict(extra_args or {}), callback, disable)

    sample.__name__ = sample.__qualname__ = f"sample_{method.name}"
    return sample


def sigmas_of(solver: FittedSolver | Plan, *, flow: bool = False) -> Tensor:
    """The levels of a fitted solver or a plan, the `sigmas` of its sampler.

    Parameters
    ----------
    solver : a fitted solver or a plan, on a schedule of any kind.
    flow : as for :func:`sampler`.

    Returns
    -------
    float32 [N + 1] on the host: sigma/alpha, or for flow models sigma/(alpha + sigma).

    Raises
    ------
    InputError : `solver` has no grid, or starts at an infinite level that no sigma of the model has.
    """
    if not isinstance(solver, FittedSolver | Plan):
        raise InputError(f"only fitted solvers and plans have levels of their own, got {solver!r}.")
    plan = solver.plan if isinstance(solver, FittedSolver) else solver
    return torch.tensor(_own_levels(plan, flow), dtype=torch.float32, device="cpu")


def _own_levels(plan: Plan, flow: bool) -> list[float]:
    """The sigmas of the times of a plan, as the model knows them."""
    found = []
    for t in plan.grid:
        alpha, sigma = plan.schedule.alpha(t), plan.schedule.sigma(t)
        if alpha == 0 and not flow:
            raise InputError(
                f"{plan.name} starts at pure noise, an infinite level, unknown to models with states x_0 + sigma noise: "
                "use flow=True for a flow model, or fit from a lower sigma_max."
            )
        found.append(sigma / (alpha + sigma) if flow else sigma / alpha)
    return found


def _levels(sigmas: object) -> list[float]:
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or not sigmas.is_floating_point():
        found = f"a tensor {list(sigmas.shape)}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise InputError(f"sigmas must be a float tensor [N + 1] of decreasing levels, got {found}.")
    levels: list[float] = sigmas.detach().cpu().double().tolist()
    return levels


def _plan(method: Solver | FittedSolver | Plan, schedule: Schedule, levels: list[float]) -> Plan:
    """The plan of a solver on the levels; the plan of a fit, if the levels are its own."""
    if isinstance(method, Solver):
        return traced(method, schedule, torch.tensor(levels, dtype=torch.float64, device="cpu"))
    plan = method.plan if isinstance(method, FittedSolver) else method
    own = _own_levels(plan, isinstance(schedule, FlowMatching))
    if len(own) != len(levels) or any(
        not math.isclose(a, b, rel_tol=_CLOSE, abs_tol=1e-9) for a, b in zip(own, levels, strict=True)
    ):
        ours, theirs = (", ".join(f"{v:.4g}" for v in values[:30]) for values in (own, levels))
        raise MismatchError(
            f"{plan.name} has the sigmas {ours}, and got {theirs}: pass sigmas=iia_ode.kdiffusion.sigmas_of(solver)."
        )
    return plan


def _run(
    plan: Plan,
    schedule: Schedule,
    levels: list[float],
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], object] | None,
    disable: bool | None,
) -> Tensor:
    """Run a plan. States of a plan on another schedule are scaled by the ratio of the alphas of the two schedules."""
    own = plan.schedule.config() == schedule.config()
    flow = isinstance(schedule, FlowMatching)

    def scale(t: float) -> float:
        alpha, sigma = plan.schedule.alpha(t), plan.schedule.sigma(t)
        return 1.0 if own else alpha + sigma if flow else alpha

    def level(t: float) -> float:
        alpha, sigma = plan.schedule.alpha(t), plan.schedule.sigma(t)
        return sigma / (alpha + sigma) if flow else sigma / alpha

    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    run, steps = plan.start(scale(plan.grid[0]) * wide, "data"), _steps(plan)
    with tqdm(total=len(levels) - 1, disable=disable) as bar:
        while not run.done:
            i, t = steps.get(run.evaluation), run.t
            state = (run.state / scale(t)).to(x.dtype)
            sigma = state.new_full((len(state),), level(t) if i is None else levels[i])
            denoised = model(state, sigma, **extra_args)
            if i is not None and callback is not None:
                told = {"x": state, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised}
                callback(told)
            run.give(denoised.to(run.current.dtype))
            bar.update(run.point - bar.n)
    return (run.state / scale(plan.grid[-1])).to(x.dtype)


def _steps(plan: Plan) -> dict[int, int]:
    """The step of each first evaluation: at the state of the start of the step, or else at the time of the start."""
    found: dict[int, int] = {}
    for k, t in enumerate(plan.grid[:-1]):
        exact = [e for e, start in enumerate(plan.starts) if start == k]
        near = [e for e, time in enumerate(plan.evaluation_times) if time == t and e not in found]
        for e in [*exact, *near][:1]:
            found[e] = k
    return found
