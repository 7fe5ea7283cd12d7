"""The ODE of a pipeline's call, whose model includes guidance, prompts and all other work of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..ode import ProbabilityFlowODE
from ..ode.clock import told
from ..ode.conditions import places_of
from ..ode.fingerprint import Fingerprint, fingerprint_of
from ..schedules import FlowMatching
from ..sharing.in_use import Sampled
from .arguments import count_of, picked
from .in_use import sampled_by
from .model import PipelineDenoiser
from .probe import Moment
from .scheduler import IIAScheduler
from .timesteps import Clock

__all__ = ["PipelineODE"]


class PipelineODE(ProbabilityFlowODE):
    """The probability-flow ODE of a pipeline's call; :func:`~iia_ode.diffusers.ode` makes it.

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
        return self.output_at(x, self.moment(float(t)))

    def output_at(self, x: Tensor, now: Moment) -> Tensor:
        """The same as :meth:`output`, at a time as the pipeline sees it."""
        rows = self.subset(slice(None), len(x)).conditioning
        self.ledger.add(len(x))
        found: Tensor = self.model(x, now, rows, self.guidance_scale)
        return found

    def sampled_in_use(self, x: Tensor, nfe: int, scheduler: Any = None) -> Sampled:
        """The final states of a scheduler of diffusers from x [B, ...], with at most `nfe` evaluations.

        By default the scheduler is that of the pipeline, or the scheduler that an :class:`IIAScheduler` replaced.
        """
        found = self.pipe.scheduler if scheduler is None else scheduler
        return sampled_by(found.replaced if isinstance(found, IIAScheduler) else found, self, x, nfe)

    def _by_times(self, x: Tensor, t: Tensor) -> Tensor:
        """The output for samples with a time each [B]: a call of the pipeline for each different time."""
        times, place = t.detach().cpu().double().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        found = torch.empty_like(x)
        for k, time in enumerate(times.tolist()):
            own = (place == k).nonzero()[:, 0]
            found[own] = self.subset(own, len(x)).output(x[own], time)
        return found

    def moment(self, t: float) -> Moment:
        """Time t of the schedule, as the pipeline sees it."""
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
