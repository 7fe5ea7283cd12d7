"""Networks and the state of their training on disk: an interrupted training continues with the same result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, MismatchError
from ..files import read_tensors, write_tensors

__all__ = ["filled", "load_training", "save_training"]

_Module = TypeVar("_Module", bound=nn.Module)

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


def filled(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], make: Callable[[], _Module], least: int
) -> _Module:
    """Make the network that a file's header describes, with the weights of the file.

    Parameters
    ----------
    path : the file, for messages.
    tensors : its tensors.
    make : makes the network. It runs on device ``"meta"``: the file has the memory of the weights.
    least : a lower bound of the network's number of tensors, so that a damaged header cannot ask for a gigantic network.

    Returns
    -------
    The network in evaluation mode, with channels-last weights that require no gradients.

    Raises
    ------
    FileFormatError : the tensors do not fit the network, or the weights have no common floating-point dtype.
    """
    try:
        if least > len(tensors):
            raise ValueError(f"more layers than the {len(tensors)} tensors")
        with torch.device("meta"):
            module = make()
        module.load_state_dict(tensors, assign=True)
        kinds = {value.dtype for value in module.parameters()}
        if len(kinds) != 1 or not kinds.pop().is_floating_point:
            raise ValueError("the weights have several dtypes, or are not floating-point numbers")
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{str(path)!r} does not hold the network that its header describes: {error}.") from error
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # see EDMDenoiser.frozen
    return module.eval().requires_grad_(False)
