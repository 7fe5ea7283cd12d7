"""A scheduler that stops a pipeline at its first step, with the output of the pipeline's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from .running import mean_of

__all__ = ["Answer", "Moment", "Probe"]


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


class Answer(Exception):  # noqa: N818  (the way out of a pipeline)
    """The output of a pipeline's model, and the evaluated state. Raised to leave the pipeline."""

    def __init__(self, output: Tensor, state: Tensor) -> None:
        super().__init__()
        self.output, self.state = output, state


class Probe(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # the bases declare config_name differently
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
        """Take the moment of the evaluation as every timestep."""
        n = next((len(v) for v in (sigmas, timesteps) if v is not None), num_inference_steps)
        self.timesteps = torch.tensor([self._now.timestep] * n, device=device)
        self.sigmas = torch.full((n + 1,), self._now.level)
        self.num_inference_steps = n

    @property
    def level(self) -> float:
        """Level of the evaluation."""
        return self._now.level

    def waits(self) -> bool:
        """Whether the state has not yet entered the pipeline."""
        return self._waits

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Take an index without effect."""
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any = None) -> Tensor:
        """The state of the evaluation, or noised samples where the shapes differ."""
        x = None if self._x is None else _repeated(self._x, len(original_samples))
        if x is None or x.shape != original_samples.shape:
            return self._now.alpha * original_samples + self._now.sigma * noise
        return x.to(noise)

    def scale_noise(self, sample: Tensor, timestep: Any = None, noise: Any = None) -> Tensor:
        """The same as :meth:`add_noise`."""
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
        """Raise the answer; in a first step without the state, return the state."""
        if not self._waits or self._x is None:
            raise Answer(mean_of(model_output, sample, self.config), sample)
        self._waits = False
        state = _repeated(self._x, len(sample)).to(sample)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)


def _repeated(x: Tensor, rows: int) -> Tensor:
    """x [B, ...], repeated up to `rows` rows; a pipeline may hold the batch twice, for guidance."""
    return x.repeat(rows // len(x), *[1] * (x.ndim - 1)) if rows > len(x) else x
