"""The scheduler of a pipeline in use: the final states of its own steps, for comparisons with a fit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..iia.batch import Batch
from ..iia.fitted import FittedSolver
from ..iia.provenance import finite
from ..ode import ProbabilityFlowODE
from ..sharing.in_use import Sampled, beside, is_noise
from ..teacher import Teacher
from .arguments import count_of
from .probe import Moment, Probe
from .timesteps import Clock

__all__ = ["against", "sampled_by", "settings_of"]

_CHUNK = 64
_SHOWN = (
    *("timestep_spacing", "solver_order", "algorithm_type", "solver_type", "final_sigmas_type", "clip_sample"),
    *("thresholding", "rescale_betas_zero_snr", "set_alpha_to_one", "skip_prk_steps", "shift", "flow_shift"),
)
"""Entries of a configuration that belong to the name of a scheduler, where they are not the default of its class."""


def against(
    fit: FittedSolver,
    ode: ProbabilityFlowODE,
    x: Tensor,
    schedulers: Sequence[Any] = (),
    *,
    sigma_min: float | None = None,
) -> FittedSolver:
    """Measure a fit against the scheduler in use of a pipeline, for the card of the fit.

    :func:`iia_ode.fit` measures the scheduler that the pipeline has at the time of the fit. This function measures the
    scheduler that the pipeline has now, or other schedulers, each with the most steps of at most ``fit.nfe`` evaluations. A
    scheduler runs as it is, with its clipping and its random draws. The errors are distances to accurate states from the same
    noise.

    Parameters
    ----------
    fit : a fit to the ODE of the pipeline.
    ode : the ODE of a call of the pipeline, made by :func:`iia_ode.diffusers.ode`.
    x : initial states [B, ...] at ``fit.grid[0]``, float32 or float64, of pure noise; best not the states of the fit. A
        scheduler cannot begin with noised images.
    schedulers : schedulers of diffusers, and None for the scheduler of the pipeline, or for the scheduler that an
        :class:`IIAScheduler` replaced. By default None alone.
    sigma_min : level sigma/alpha at which the accurate integration stops, as for :func:`iia_ode.fit`.

    Returns
    -------
    The fit with the errors in ``fit.record.in_use``, which replace earlier ones. ``fit.card()`` has a table of the errors.

    Raises
    ------
    InputError : the ODE is not the ODE of a pipeline, the fit begins in images with noise, or a scheduler cannot run.
    MismatchError : the ODE is not the ODE of the fit.

    Examples
    --------
    >>> fit = iia.diffusers.against(fit, ode, x, [diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)])
    >>> print(fit.card())
    """
    if not hasattr(ode, "sampled_in_use"):
        raise InputError(
            f"{type(ode).__name__} has no scheduler in use: make the ODE by iia_ode.diffusers.ode(pipe), or compare solvers "
            "by iia_ode.experiments.compare."
        )
    fit.check(ode, x)
    plan = fit.plan
    if fit.record.from_images or not is_noise(plan.schedule, plan.grid[0]):
        level = plan.schedule.noise_to_signal(plan.grid[0])
        raise InputError(
            f"{plan.name} begins at level sigma/alpha = {level:.3g}, in images with noise, and a scheduler begins with "
            "pure noise: compare solvers from these states by iia_ode.experiments.compare."
        )
    teacher = Teacher.solve(ode, x, plan.grid[0], plan.grid[-1], sigma_min=sigma_min, chunk_size=_CHUNK)
    batch = Batch(ode, x, teacher, _CHUNK)
    fit_error = finite(float(batch.errors(plan).square().mean().sqrt()))
    found = beside(batch, plan.nfe, fit_error, tuple(schedulers) or (None,))
    return replace(fit, record=replace(fit.record, in_use=found))


class _Settings(Exception):  # noqa: N818  (the way out of a pipeline)
    """The arguments of ``set_timesteps``. Raised to leave the pipeline."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values


class _Settler(Probe):
    """A scheduler that ends the pipeline with the arguments of its `set_timesteps`."""

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: Any = None,
    ) -> None:
        """Raise the arguments."""
        given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "timesteps": timesteps, "mu": mu}
        raise _Settings({k: v for k, v in given.items() if v is not None})


@torch.no_grad()
def sampled_by(scheduler: Any, ode: Any, x: Tensor, nfe: int) -> Sampled:
    """The final states of a scheduler of diffusers as it is, stochastic steps and clipping included.

    Parameters
    ----------
    scheduler : the scheduler, which stays as it is.
    ode : the :class:`PipelineODE`, which gives the outputs of the model.
    x : standard normal noise [B, ...], as the pipeline would draw.
    nfe : largest number of evaluations.

    Raises
    ------
    InputError : the scheduler cannot run with the pipeline.
    """
    clock = Clock.of(scheduler, False)
    try:
        own = _with_steps(scheduler, ode, nfe)
        takes = inspect.signature(own.step).parameters
        options = {"generator": torch.Generator(x.device).manual_seed(0)} if "generator" in takes else {}
        scaled = getattr(own, "scale_model_input", lambda state, t: state)
        state = x * getattr(own, "init_noise_sigma", 1.0)
        for t in own.timesteps:
            output = ode.output_at(scaled(state, t), _moment(ode, clock, t))
            state = own.step(output, t, state, **options).prev_sample
    except InputError:
        raise
    except Exception as error:  # of any kind: the scheduler is not ours
        raise InputError(
            f"{type(scheduler).__name__} cannot run with {type(ode.pipe).__name__}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    return Sampled(_name(scheduler), len(own.timesteps), state)


def _moment(ode: Any, clock: Clock, t: Tensor) -> Moment:
    """The time of a timestep, with the timestep itself."""
    ends = sorted((clock.schedule.t_data, clock.schedule.t_noise))
    time = float(clock.time_of(t.double()).clamp(*ends))
    now: Moment = ode.moment(time)
    return replace(now, timestep=float(t))


def _with_steps(scheduler: Any, ode: Any, nfe: int) -> Any:
    """A copy of a scheduler, with the most steps of at most `nfe` evaluations that the pipeline would set."""
    for n in range(nfe, 0, -1):
        own = copy.deepcopy(scheduler)
        own.set_timesteps(**settings_of(ode, n))
        if len(own.timesteps) <= nfe:
            return own
    raise InputError(f"{type(scheduler).__name__} has no run of at most {nfe} evaluations.")


def settings_of(ode: Any, n: int) -> dict[str, Any]:
    """The arguments that the pipeline gives to ``set_timesteps`` for n steps."""
    probe = _Settler(ode.pipe.scheduler, Moment(0.0, 1.0, 0.0, 0.0), None, "latents")
    try:
        ode.model.call(probe, ode.conditioning, count_of(ode.conditioning) or 1, steps=n)
    except _Settings as settings:
        return settings.values
    raise InputError(f"{type(ode.pipe).__name__} sets no timesteps.")


def _name(scheduler: Any) -> str:
    """The class of a scheduler, with the options that differ from the defaults of the class."""
    defaults = inspect.signature(type(scheduler).__init__).parameters
    options = (
        f"{k}={v!r}"
        for k, v in scheduler.config.items()
        if (k in _SHOWN or k.startswith("use_")) and k in defaults and v != defaults[k].default
    )
    return f"{type(scheduler).__name__}({', '.join(options)})"
