"""Calls of a pipeline by this library: another scheduler during the call, and an unchanged pipeline after the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bounded import Bounded

__all__ = ["answered", "borrowed", "same_draws", "states_of"]

_DENOISERS = ("unet", "transformer")


@contextmanager
def borrowed(pipe: Any, scheduler: Any) -> Iterator[None]:
    """A block in which a pipeline has another scheduler, and no progress bar."""
    own = vars(pipe)  # past the pipeline's __setattr__, which would enter the scheduler into the configuration
    kept = {k: own[k] for k in ("scheduler", "_progress_bar_config") if k in own}
    own |= {"scheduler": scheduler, "_progress_bar_config": {"disable": True}}
    try:
        yield
    finally:
        for name in ("scheduler", "_progress_bar_config"):
            own.pop(name, None)
        own |= kept
        if getattr(pipe, "_all_hooks", None):
            pipe.maybe_free_model_hooks()


@contextmanager
def answered(
    networks: Mapping[str, nn.Module], waits: Callable[[], bool], known: Bounded[Any, Any], count: int
) -> Iterator[None]:
    """A block in which networks return memoized outputs while ``waits()`` is true.

    A pipeline that takes no initial state makes a first step before the state enters. The outputs of its denoiser in the first
    step have no effect on the answer, except by their shapes. The outputs are computed once for each number of samples.
    Other networks, such as projections of prompts, compute in every call.
    """
    own = {
        name: net
        for name, net in networks.items()
        if name.startswith(_DENOISERS) and not hasattr(net, "_orig_mod")  # compiled ones compute
    }
    kept: dict[str, Any] = {name: vars(net).get("forward") for name, net in own.items()}

    def answer(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = known.get((name, count)) if waits() else None
        if found is not None:
            return found
        output = forward(*args, **kwargs)
        return known.put((name, count), output) if waits() else output

    for name, net in own.items():
        net.forward = partial(answer, name, net.forward)
    try:
        yield
    finally:
        for name, net in own.items():
            del net.forward
            if (own_forward := kept[name]) is not None:
                net.forward = own_forward  # as a hook of offloading has it


def same_draws(generator: Any) -> Any:
    """A copy of a generator, or of each generator in a list; for None, a generator with seed 0."""
    if isinstance(generator, list):
        return [same_draws(g) for g in generator]
    if generator is None:
        return torch.Generator("cpu").manual_seed(0)
    return torch.Generator(generator.device).set_state(generator.get_state())


def states_of(generator: Any) -> list[Tensor]:
    """The states of a generator, or of a list of generators."""
    return [g.get_state() for g in (generator if isinstance(generator, list) else [generator])]
