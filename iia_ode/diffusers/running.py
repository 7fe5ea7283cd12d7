"""A run of a plan inside of a pipeline's loop, which may change the state between two evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, MismatchError
from ..plan import Plan
from ..plan.checks import check_weights
from ..plan.run import Run, start

__all__ = ["PipelineRun", "check_step", "first_state", "mean_of"]


def mean_of(output: Tensor, sample: Tensor, config: Any) -> Tensor:
    """A model's output [B, C, ...] without the C channels of a learned variance, which some networks add."""
    learned = str(config.get("variance_type")).startswith("learned")
    return output[:, : sample.shape[1]] if learned and output.ndim == sample.ndim > 1 else output


def check_step(name: str, eta: float, others: Mapping[str, Any]) -> None:
    """Raise InputError if a step of the plan `name` asks for noise, or has arguments for schedulers of one kind."""
    if others:
        raise InputError(
            f"this pipeline passes {', '.join(others)} to its scheduler, which a plan cannot use: keep the scheduler of the "
            "pipeline."
        )
    if eta:
        raise InputError(f"{name} is deterministic, and eta = {eta} asks for noise: pass eta=0.")


def first_state(plan: Plan, x: Tensor, prediction: str) -> Tensor:
    """The state of the first evaluation of a run from x, in the dtype of x."""
    return start(plan, _wide(x), prediction, keeps_seen=False).current.to(x.dtype)


@dataclass(eq=False)
class PipelineRun:
    """A run with a state in the dtype of the pipeline; plain data.

    Attributes
    ----------
    run : the run, with states in float32 or float64.
    handed : the state that the pipeline got last, or None before the first step.
    version : version of the memory of `handed`; -1 for a tensor without versions.
    """

    run: Run
    handed: Tensor | None = None
    version: int = -1

    @classmethod
    def begin(cls, plan: Plan, sample: Tensor, prediction: str) -> PipelineRun:
        """Begin a run of a plan at state `sample` [B, ...].

        Raises
        ------
        MismatchError : weights of the plan belong to states of another shape.
        """
        try:
            check_weights(plan, tuple(sample.shape[1:]))
        except InputError as error:
            raise MismatchError(
                f"{str(error).rstrip('.')}: a fit with weights per channel, frequency or component runs at the resolution of "
                "the fit alone. Call the pipeline for states of that shape, or fit with weights='scalars' for all shapes."
            ) from error
        return cls(start(plan, _wide(sample), prediction, keeps_seen=False))

    def accept(self, sample: Tensor) -> None:
        """Take over the state of the next evaluation from the pipeline; nothing is read from a device.

        In half precision, entries that the pipeline did not change keep their digits in float32.

        Raises
        ------
        InputError : the state has another shape than before.
        """
        if sample is self.handed and self.version == _version(sample) >= 0:
            return
        state = self.run.current
        if sample.dtype != state.dtype and sample.shape == state.shape:
            sample = torch.where(sample == state.to(sample.dtype), state, sample.to(state.dtype))
        self.run.edit(sample.to(state.dtype))

    def give(self, output: Tensor, dtype: torch.dtype) -> Tensor:
        """Take the model's output, and return the next state in the dtype of the pipeline."""
        self.run.give(output)
        state = self.run.state.to(dtype)
        self.handed, self.version = state, _version(state)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineRun:
        handed = None if self.handed is None else self.handed.clone()
        if handed is not None:
            memo[id(self.handed)] = handed
        return replace(self, run=self.run.__deepcopy__(memo), handed=handed, version=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
