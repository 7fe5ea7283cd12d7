"""Noise that does not depend on how samples are batched: each from a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import index as as_index
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

__all__ = ["sample_seeds", "seeded_noise"]

_MOST = 2**32  # torch's generator on the host drops what a seed has above 32 bits


def sample_seeds(seed: int, index: Iterable[int]) -> list[int]:
    """Seeds of the samples `index` of a run: they depend on `seed` and the sample's number, not on how many there are.

    Processes that share a run each take the part of the numbers that is theirs. Within a run all seeds differ. Those of
    another `seed` begin elsewhere among 2**32: that two runs of n samples have any in common has a chance of about n in 2**31.

    Parameters
    ----------
    seed : of the run, from 0.
    index : numbers of samples from 0, such as ``range(64)``.

    Raises
    ------
    InputError : not such numbers.
    """
    if not isinstance(index, Iterable):
        raise InputError(f"index is the numbers of some samples, such as range(64), got {index!r}.")
    first = int(np.random.SeedSequence(_whole(seed, "seed")).generate_state(1)[0])
    return [(first + _whole(k, "the number of a sample", _MOST)) % _MOST for k in index]


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws of standard normal noise, sample k from ``seeds[k]`` alone, [len(seeds), *shape].

    They are made on the host, so that they are the same on every device.

    Parameters
    ----------
    seeds : one for each sample, from 0 to below 2**32; :func:`sample_seeds` makes them.
    shape : of one sample.

    Raises
    ------
    InputError : a seed is not such a number, or another argument is not usable.
    """
    if not isinstance(seeds, Sequence) or not isinstance(shape, Sequence):
        raise InputError(f"seeds and shape are sequences, such as [0, 1] and (3, 32, 32), got {seeds!r} and {shape!r}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"noise has a dtype of floating point, such as torch.float32, got {dtype!r}.")
    size = tuple(_whole(n, "a length in shape") for n in shape)
    rows = [torch.randn(size, generator=generator_of(s), dtype=dtype, device="cpu") for s in seeds]
    return torch.stack(rows).to(device) if rows else torch.empty((0, *size), dtype=dtype, device=device)


def generator_of(seed: int) -> torch.Generator:
    """A generator on the host with this seed (InputError where it would not be used whole)."""
    return torch.Generator("cpu").manual_seed(_whole(seed, "the seed of a generator", _MOST))


def _whole(value: object, what: str, below: float = math.inf) -> int:
    """A whole number from 0, NumPy's too."""
    if not isinstance(value, SupportsIndex) or isinstance(value, bool) or not 0 <= (number := as_index(value)) < below:
        limit = f" to below {below}" if below < math.inf else ""
        raise InputError(f"{what} is a whole number from 0{limit}, got {value!r}.")
    return number
