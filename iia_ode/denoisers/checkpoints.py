"""State of a training on disk: an interrupted training continues from it, with the same result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, MismatchError
from ..files import read_tensors, write_tensors

__all__ = ["load_training", "save_training"]

_RANDOM = "random state"


@dataclass(frozen=True)
class _Header:
    """The header of a file of a training's state."""

    step: int
    options: dict[str, Any]


def _tensors(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """List every tensor of a training by name, without the state of the random numbers."""
    for prefix, module in modules.items():
        yield from ((f"{prefix}.{name}", value) for name, value in module.state_dict().items())
    for k, parameter in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state[parameter]
        if not state:  # Adam before its first step
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.zeros(()), **moments}
        yield from ((f"optimizer.{k}.{name}", value) for name, value in state.items())


def save_training(
    path: str | os.PathLike[str],
    step: int,
    options: dict[str, Any],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state of a training as one safetensors file, atomically.

    Parameters
    ----------
    path : file to write; an existing file is replaced.
    step : number of finished steps.
    options : options of the training, JSON-ready.
    modules : modules of the training by name.
    optimizer : Adam over one group of parameters.
    """
    state = dict(_tensors(modules, optimizer)) | {_RANDOM: torch.get_rng_state()}
    write_tensors(path, "training", state, {"step": step, "options": options})


def load_training(
    path: str | os.PathLike[str],
    options: dict[str, Any],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Read a state written by :func:`save_training` into modules, optimizer and the random numbers of the CPU.

    Parameters
    ----------
    path : file to read.
    options : options of this training, equal to the options in the file.
    modules, optimizer : receive the state.

    Returns
    -------
    The number of finished steps.

    Raises
    ------
    FileFormatError : the file is damaged, or does not hold the state of this network.
    MismatchError : the file belongs to a training with other options.
    """
    stored, header = read_tensors(path, "training", _Header)
    if header.options != options:
        raise MismatchError(
            f"{str(path)!r} belongs to a training with {header.options}; delete the file to start anew."
        )
    try:
        torch.set_rng_state(stored.pop(_RANDOM))
        with torch.no_grad():
            for name, value in _tensors(modules, optimizer):
                value.copy_(stored.pop(name))
    except (KeyError, RuntimeError, TypeError) as error:
        raise FileFormatError(f"{str(path)!r} does not hold the state of this network's training: {error}.") from error
    return header.step
