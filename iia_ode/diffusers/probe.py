"""A pipeline as a model: one evaluation by a scheduler that stops the pipeline at its first step.

The evaluation includes all that the pipeline does to the inputs and outputs of its networks: guidance and its rescaling,
adapters, pooled and packed inputs, rounding of the timestep.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor, nn

from ..bounded import Bounded
from ..errors import InputError
from .borrowed import answered, borrowed, same_draws, states_of
from .identity import networks_of
from .running import mean_of

__all__ = ["Moment", "PipelineDenoiser"]

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size")
_ENTRIES = ("latents", "noise", "second step")
"""The ways of a state into a pipeline: as its latents, as the noised image, or as the result of a first step."""
_STRENGTH = re.compile("guidance|cfg|_scale$")
_PROMPTS = 32  # encodings of prompts in memory
_OUTPUTS = 8  # outputs without effect in memory, of each network and number of samples


@dataclass(frozen=True)
class Moment:
    """A time as a pipeline sees it.

    Attributes
    ----------
    timestep : time that the pipeline tells its networks.
    alpha, sigma : scales of data and noise.
    level : the entry of ``sigmas``: sigma of a flow, else sigma/alpha.
    """

    timestep: float
    alpha: float
    sigma: float
    level: float


class _Answer(Exception):  # noqa: N818  (the way out of a pipeline)
    """The output of a pipeline's model, and the evaluated state. Raised to leave the pipeline."""

    def __init__(self, output: Tensor, state: Tensor) -> None:
        super().__init__()
        self.output, self.state = output, state


class _Probe(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # the bases declare config_name differently
    """A scheduler whose `step` ends the pipeline with the model's output.

    Parameters
    ----------
    kept : the scheduler of the pipeline, for its configuration.
    now : the time of the evaluation.
    x : the state [B, ...]; None to let the pipeline make its own.
    entry : the way of the state into the pipeline.
    """

    order, init_noise_sigma = 1, 1.0
    _internal_dict: Any

    def __init__(self, kept: Any, now: Moment, x: Tensor | None, entry: str) -> None:
        self._internal_dict, self._kept, self._now = kept.config, kept, now
        self._x, self._waits = x, entry == "second step"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_kept"], name)

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: Any = None,
    ) -> None:
        n = next((len(v) for v in (sigmas, timesteps) if v is not None), num_inference_steps)
        self.timesteps = torch.tensor([self._now.timestep] * n, device=device)
        self.sigmas = torch.full((n + 1,), self._now.level)
        self.num_inference_steps = n

    def waits(self) -> bool:
        """Whether the state has not yet entered the pipeline."""
        return self._waits

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any = None) -> Tensor:
        x = None if self._x is None else _repeated(self._x, len(original_samples))
        if x is None or x.shape != original_samples.shape:
            return self._now.alpha * original_samples + self._now.sigma * noise
        return x.to(noise)

    def scale_noise(self, sample: Tensor, timestep: Any = None, noise: Any = None) -> Tensor:
        return self.add_noise(sample, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: Any = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if not self._waits or self._x is None:
            raise _Answer(mean_of(model_output, sample, self.config), sample)
        self._waits = False
        state = _repeated(self._x, len(sample)).to(sample)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)


def _repeated(x: Tensor, rows: int) -> Tensor:
    """x [B, ...], repeated up to `rows` rows; a pipeline may hold the batch twice, for guidance."""
    return x.repeat(rows // len(x), *[1] * (x.ndim - 1)) if rows > len(x) else x


class PipelineDenoiser(nn.Module):
    """The model of a pipeline's call: ``model(x, now, rows)`` is the output that the pipeline hands to its scheduler.

    Parameters
    ----------
    pipe : the pipeline.
    call : arguments of the call that all samples share.

    Attributes
    ----------
    networks : the pipeline's networks without encoders and decoders of images and texts.
    guidance : the numbers of the call about guidance and the strength of adapters, defaults included.
    held_conditions : the arguments of the call that all samples share, with the state of the generator.
    state_shape, dtype : of the states of the pipeline.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks_of(pipe))
        self._pipe = (pipe,)  # no module, and not copied with this one
        self._call = dict(call)
        self._names = inspect.signature(type(pipe).__call__).parameters
        self._generator = same_draws(call.get("generator"))  # the caller's generator may go on
        numbers = ((k, call.get(k, p.default)) for k, p in self._names.items() if _STRENGTH.search(k))
        self.guidance = {k: v for k, v in numbers if isinstance(v, bool | int | float)}
        held = {
            k: v for k, v in call.items() if k != "guidance_scale" or k not in self.guidance
        }  # the scale is the ODE's
        self.held_conditions = {**held, "generator": states_of(self._generator)}
        self._encodings: Bounded[Any, Any] = Bounded(_PROMPTS)
        self._outputs: Bounded[Any, Any] = Bounded(_OUTPUTS)
        self._entry, self.dtype = "latents", torch.float32
        self.state_shape: tuple[int, ...] = ()

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self._pipe[0]

    def settle(self, now: Moment, rows: Mapping[str, Any], count: int) -> tuple[Tensor, Tensor]:
        """Find the shape of a state and the way of a state into the pipeline, by two to four evaluations of `count` samples.

        Returns
        -------
        The pipeline's own initial state [count, ...], and the model's output for it.

        Raises
        ------
        InputError : the pipeline makes no step, or changes every state before its evaluation.
        """
        first = self._answer(None, now, rows, count, "latents")
        state, output = first.state[:count].float(), first.output[:count].float()
        self.state_shape, self.dtype = tuple(state.shape[1:]), first.state.dtype
        x = -first.state[:count]  # another state than the pipeline's own
        problem: Exception | None = None
        for entry in _ENTRIES:
            if entry == "latents" and "latents" not in self._names:
                continue
            try:
                found = self._answer(x, now, rows, count, entry)
            except Exception as error:  # of any kind: the pipeline may expect latents of another shape
                problem = error
                continue
            if torch.equal(found.state[:count], x):
                self._entry = entry
                return state, output
        raise InputError(
            f"{type(self.pipe).__name__} evaluates other states than it is given, and its call is no ODE: wrap the network, "
            "see iia_ode.diffusers.denoiser."
        ) from problem

    def forward(self, x: Tensor, now: Moment, rows: Mapping[str, Any], scale: float = 1.0) -> Tensor:
        """The output for states x [B, ...], in the shape and dtype of x; no gradient flows through a pipeline.

        Parameters
        ----------
        x : states of the pipeline.
        now : the time.
        rows : arguments of the call with an entry for each sample.
        scale : the guidance scale, for pipelines that take a number.
        """
        found = self._answer(x.detach().to(self.dtype), now, rows, len(x), self._entry, scale)
        return found.output[: len(x)].to(x)

    def _answer(
        self, x: Tensor | None, now: Moment, rows: Mapping[str, Any], count: int, entry: str, scale: float | None = None
    ) -> _Answer:
        call = {**self._call, **{k: v.tolist() if k == "class_labels" else v for k, v in rows.items()}}
        if not rows:
            call |= {name: count for name in _COUNTS if name in self._names}
        call |= {k: v for k, v in (("num_inference_steps", 2), ("strength", 1.0)) if k in self._names}
        if "generator" in self._names:  # the same draws in each evaluation, and none from the user's generator
            call["generator"] = same_draws(self._generator)
        if scale is not None and "guidance_scale" in self.guidance:
            call["guidance_scale"] = scale
        if x is not None and entry == "latents":
            call["latents"] = x
        probe = _Probe(self.pipe.scheduler, now, x, entry)
        with (
            borrowed(self.pipe, probe, self._encodings),
            answered(dict(self.networks.items()), probe.waits, self._outputs, count),
        ):
            try:
                self.pipe(**call)
            except _Answer as answer:
                return answer
        raise InputError(
            f"{type(self.pipe).__name__} made no step: the call of an ODE covers all noise levels, without denoising_start or "
            "denoising_end."
        )
