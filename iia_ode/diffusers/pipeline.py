"""Calls of pipelines as ODEs, whose models include guidance, prompts and all other work of the pipelines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import InputError, PredictionWarning, warn
from ..ode import ProbabilityFlowODE
from ..ode.clock import told
from ..ode.conditions import places_of
from ..ode.fingerprint import Fingerprint, fingerprint_of
from ..schedules import FlowMatching
from ..schedules.levels import default_levels
from .arguments import arguments, count_of, picked
from .probe import Moment, PipelineDenoiser
from .scheduler import IIAScheduler
from .timesteps import Clock
from .translation import prediction_of

__all__ = ["PipelineODE", "ode"]

_SHARE = 0.5  # of the noise in an output, between predictions with and without the noise


class PipelineODE(ProbabilityFlowODE):
    """The probability-flow ODE of a pipeline's call; :func:`ode` makes it.

    Conditions are the arguments of the call with an entry per prompt. More samples than prompts take the prompts in turn.
    ``guidance_scale`` is that of the call, and may be set to another number.

    Attributes
    ----------
    pipe : the pipeline.
    repeats : number of neighboring samples with one prompt, as with ``num_images_per_prompt``. None to take the prompts in
        turn.
    """

    model: PipelineDenoiser

    def __init__(
        self, model: PipelineDenoiser, clock: Clock, prediction: str, rows: Mapping[str, Any], **options: Any
    ) -> None:
        self.repeats = options.pop("repeats", None)
        super().__init__(model, clock.schedule, prediction, conditioning=rows, **options)
        self.time, self.time_rounding = clock.time, clock.rounding
        self.guidance_scale = float(model.guidance.get("guidance_scale", 1.0))

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.model.pipe

    @property
    def settings(self) -> dict[str, Any]:
        """All arguments except model and tag, for an ODE over the same model, whose output includes the guidance."""
        return {**super().settings, "guidance_scale": 1.0}

    def _check_guidance(self) -> None:
        scale = self.guidance_scale
        if not isinstance(scale, int | float) or (scale != 1.0 and "guidance_scale" not in self.model.guidance):
            raise InputError(
                f"the guidance scale of a pipeline is a number, for pipelines that take guidance_scale, got {scale!r} for "
                f"{type(self.pipe).__name__}."
            )

    @property
    def device(self) -> torch.device | None:
        """Device on which the pipeline runs."""
        found: torch.device = self.pipe._execution_device
        return found

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the pipeline's states."""
        return self.model.dtype

    def check_conditions(self, batch: int) -> None:
        """Raise InputError unless the prompts can serve `batch` samples."""
        count = count_of(self.conditioning)
        if count is not None and (batch < count or (self.repeats and batch != count * self.repeats)):
            raise InputError(
                f"this pipeline call has {count} prompts"
                + (f" with {self.repeats} images each" if self.repeats else "")
                + f", and the batch has {batch} samples: give as many samples, or more for several samples per prompt."
            )

    def subset(self, index: slice | Tensor, batch: int) -> Self:
        """The ODE of some samples of a batch, with their prompts.

        Parameters
        ----------
        index : the samples, a slice or an integer or boolean tensor [n].
        batch : size of the whole batch.

        Returns
        -------
        The ODE, with the same model and ledger.
        """
        count = count_of(self.conditioning)
        if count is None:
            return self._view(self.conditioning, {})
        self.check_conditions(batch)
        own = [k // self.repeats if self.repeats else k % count for k in places_of(index, batch)]
        view = self._view({k: picked(v, own) for k, v in self.conditioning.items()}, {})
        view.repeats = None
        return view

    @torch.no_grad()
    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The output that the pipeline hands to its scheduler; one evaluation, through which no gradient flows.

        Parameters
        ----------
        x : state [B, ...], float32 or float64.
        t : time, a number or a tensor [] or [B].

        Returns
        -------
        The output [B, ...], in the dtype of x.
        """
        self._check_guidance()
        if isinstance(t, Tensor) and t.ndim and len(t) > 1:
            return self._by_times(x, t)
        rows = self.subset(slice(None), len(x)).conditioning
        self.ledger.add(len(x))
        found: Tensor = self.model(x, self._moment(float(t)), rows, self.guidance_scale)
        return found

    def _by_times(self, x: Tensor, t: Tensor) -> Tensor:
        """The output for samples with a time each [B]: a call of the pipeline for each different time."""
        times, place = t.detach().cpu().double().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        found = torch.empty_like(x)
        for k, time in enumerate(times.tolist()):
            own = (place == k).nonzero()[:, 0]
            found[own] = self.subset(own, len(x)).output(x[own], time)
        return found

    def _moment(self, t: float) -> Moment:
        schedule = self.schedule
        level = schedule.sigma(t) if isinstance(schedule, FlowMatching) else schedule.noise_to_signal(t)
        return Moment(
            float(told(self.time, self.time_rounding, schedule, t)), schedule.alpha(t), schedule.sigma(t), level
        )

    def fingerprint(self) -> Fingerprint:
        """The identity of the pipeline's networks, with its class and the guidance of the call, except for the scale."""
        found = fingerprint_of(self.model.networks, self.tag)
        settings = ", ".join(f"{k}={v!r}" for k, v in sorted(self.model.guidance.items()) if k != "guidance_scale")
        return Fingerprint(f"{found}+{type(self.pipe).__name__}({settings})")


def ode(pipe: Any, *, whole_timesteps: bool | None = None, **call: Any) -> PipelineODE:
    """The probability-flow ODE of a pipeline's call, for fits, samples and comparisons.

    The model of the ODE returns the output that the pipeline hands to its scheduler. The output includes guidance and its
    rescaling, pooled and packed inputs, and adapters. The function calls the pipeline a few times, to learn the shape of its
    states. A pipeline whose call takes no initial state makes two steps at each evaluation, and its networks compute in the
    second step only. Pipelines compute without gradients, so a fit takes its weights in closed form. Where the call draws
    random numbers, as for masked images, every evaluation has the same draws. Networks that depend on the index of a step get
    the first index.

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
    state, output = model.settle(found._moment(_start(clock)), found.conditioning, count)
    found.state_shape = model.state_shape
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
