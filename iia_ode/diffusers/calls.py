"""`ode`: a call of a pipeline as an ODE."""

from __future__ import annotations

import math
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import InputError, PredictionWarning, warn
from ..schedules.levels import default_levels
from .arguments import arguments, count_of
from .in_use import settings_of
from .model import PipelineDenoiser
from .pipeline import PipelineODE
from .scheduler import IIAScheduler
from .timesteps import Clock, check_told
from .translation import prediction_of

__all__ = ["ode"]

_STEPS = 8  # whose timesteps are compared with the levels
_SHARE = 0.5  # of the noise in an output, between predictions with and without the noise


def ode(pipe: Any, *, whole_timesteps: bool | None = None, **call: Any) -> PipelineODE:
    """The probability-flow ODE of a pipeline's call, for fits, samples and comparisons.

    The model of the ODE returns the output that the pipeline hands to its scheduler. The output includes guidance and its
    rescaling, pooled and packed inputs, and adapters. The function calls the pipeline a few times, to learn the shape of its
    states. A pipeline whose call takes no initial state makes two steps at each evaluation, and its networks compute in the
    second step only. Pipelines compute without gradients, so a fit takes its weights in closed form. Where the call draws
    random numbers, as for masked images, every evaluation has the same draws, those of ``generator`` if given. Networks that
    depend on the index of a step get the first index. Prompts and images are encoded once.

    Parameters
    ----------
    pipe : a pipeline of diffusers, on its device.
    whole_timesteps : whether the networks are told whole numbers; by default as in the pipeline's :class:`IIAScheduler`, and
        False with another scheduler.
    call : arguments of the call, such as ``prompt`` and ``guidance_scale``. Lists and tensors with an entry per prompt
        become conditions: more samples than prompts take the prompts in turn, or in the order of ``num_images_per_prompt``.
        Arguments about steps, outputs and initial states have no effect.

    Returns
    -------
    The ODE. ``ode.state_shape`` is the shape of one sample. Initial states at the noisiest level are standard normal noise.

    Raises
    ------
    InputError : no pipeline, an argument that its call does not take, or a call that does not cover all noise levels.
    MismatchError : the pipeline tells its networks other timesteps than those of the noise levels, as CogView4.

    Warns
    -----
    PredictionWarning : the output of the model on noise does not look like the prediction type of the scheduler.
    MismatchWarning : an argument, such as ``control_guidance_end`` or ``skip_guidance_layers``, or a callback of diffusers
        changes the model by the index of the step.

    Examples
    --------
    >>> ode = iia.diffusers.ode(pipe, prompt=prompts, guidance_scale=7.5)
    >>> fit = iia.fit(ode, nfe=6, shape=ode.state_shape, budget="closed-form")
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(
            f"ode takes a pipeline of diffusers, such as StableDiffusionPipeline, got {type(pipe).__name__}."
        )
    rows, shared, repeats = arguments(pipe, call)
    scheduler: Any = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise InputError(f"{type(pipe).__name__} has no scheduler, and its call is no ODE.")
    if isinstance(scheduler, IIAScheduler):
        whole = scheduler.whole_timesteps if whole_timesteps is None else whole_timesteps
        scheduler = scheduler.replaced
    else:
        whole = bool(whole_timesteps)
    clock, prediction = Clock.of(scheduler, whole), prediction_of(scheduler)
    model = PipelineDenoiser(pipe, shared)
    found = PipelineODE(model, clock, prediction, rows, repeats=repeats)
    count = count_of(rows) or 1
    state, output = model.settle(found.moment(_start(clock)), found.conditioning, count)
    found.state_shape = model.state_shape
    check_told(scheduler, settings_of(found, _STEPS), clock)
    _check_prediction(prediction, state, output)
    return found


def _start(clock: Clock) -> float:
    """The noisiest time that the networks can be told."""
    schedule = clock.schedule
    if schedule.knows(schedule.t_noise) and math.isfinite(clock.timestep(schedule.t_noise)):
        return schedule.t_noise
    return schedule.t_of_noise_to_signal(default_levels(schedule)[1])


def _check_prediction(prediction: str, x: Tensor, output: Tensor) -> None:
    """Warn if a model's output on noise x [B, ...] does not look like its prediction type.

    Outputs of noise and velocity prediction contain the noise; outputs of other prediction types contain nearly no noise.
    """
    share = float((x * output).sum() / (x * x).sum())
    if not math.isfinite(share):
        return
    if (prediction in ("noise", "velocity")) == (share > _SHARE):
        return
    others = ("'v_prediction' or 'sample'", "'epsilon'")[prediction in ("data", "v")]
    warn(
        f"the configuration of the scheduler says {prediction} prediction, and on noise the model returns {share:.2g} times "
        f"this noise: check prediction_type, which may be {others}.",
        PredictionWarning,
    )
