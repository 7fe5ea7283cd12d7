"""A pipeline as a model: one evaluation by a scheduler that stops the pipeline at its first step.

The evaluation includes all that the pipeline does to the inputs and outputs of its networks: guidance and its rescaling,
adapters, pooled and packed inputs, rounding of the timestep.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bounded import Bounded
from ..errors import InputError
from .borrowed import answered, borrowed, same_draws, states_of
from .encodings import Encodings
from .identity import networks_of
from .probe import Answer, Moment, Probe

__all__ = ["PipelineDenoiser"]

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size")
_ENTRIES = ("latents", "noise", "second step")
"""The ways of a state into a pipeline: as its latents, as the noised image, or as the result of a first step."""
_STRENGTH = re.compile("guidance|cfg|_scale$")
_OUTPUTS = 8  # outputs without effect in memory, of each network and number of samples


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
        self._encodings = Encodings()
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

    def call(self, probe: Probe, rows: Mapping[str, Any], count: int, steps: int = 2, **more: Any) -> None:
        """Call the pipeline with a probe as its scheduler; an exception of the probe ends the call.

        Parameters
        ----------
        probe : the scheduler.
        rows : arguments of the call with an entry for each sample.
        count : number of samples.
        steps : number of steps, ``num_inference_steps``.
        more : further arguments.
        """
        call = {**self._call, **{k: v.tolist() if k == "class_labels" else v for k, v in rows.items()}}
        if not rows:
            call |= {name: count for name in _COUNTS if name in self._names}
        call |= {k: v for k, v in (("num_inference_steps", steps), ("strength", 1.0)) if k in self._names}
        if "generator" in self._names:  # the same draws in each evaluation, and none from the user's generator
            call["generator"] = same_draws(self._generator)
        with (
            borrowed(self.pipe, probe),
            self._encodings.used(self.pipe, probe.level),
            answered(dict(self.networks.items()), probe.waits, self._outputs, count),
        ):
            self.pipe(**(call | more))

    def _answer(
        self, x: Tensor | None, now: Moment, rows: Mapping[str, Any], count: int, entry: str, scale: float | None = None
    ) -> Answer:
        more: dict[str, Any] = {}
        if scale is not None and "guidance_scale" in self.guidance:
            more["guidance_scale"] = scale
        if x is not None and entry == "latents":
            more["latents"] = x
        probe = Probe(self.pipe.scheduler, now, x, entry)
        try:
            self.call(probe, rows, count, **more)
        except Answer as answer:
            return answer
        raise InputError(
            f"{type(self.pipe).__name__} made no step: the call of an ODE covers all noise levels, without denoising_start or "
            "denoising_end."
        )
