"""Noise that does not depend on how samples are batched: each from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

__all__ = ["sample_seeds", "seeded_noise"]

_MOST = 2**32  # torch's generator on the host drops what a seed has above 32 bits


def sample_seeds(seed: int, index: Iterable[int]) -> list[int]:
    """Seeds of the samples `index` of a run: they depend on `seed` and the sample's number, not on how many there are.

    Processes that share a run each take the part of the numbers that is theirs. Seeds of different samples differ; those of
    runs with another `seed` are elsewhere.

    Parameters
    ----------
    seed : of the run, from 0.
    index : numbers of samples from 0, such as ``range(64)``.

    Raises
    ------
    InputError : not such numbers.
    """
    numbers = list(index)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed must be a whole number from 0, got {seed!r}.")
    if wrong := [k for k in numbers if not isinstance(k, int) or not 0 <= k < _MOST]:
        raise InputError(f"samples are numbered by whole numbers from 0 to below 2**32, got {wrong[0]!r}.")
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [(first + k) % _MOST for k in numbers]


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
    InputError : a seed is not such a number.
    """
    rows = [torch.randn(tuple(shape), generator=generator_of(s), dtype=dtype, device="cpu") for s in seeds]
    noise = torch.stack(rows) if rows else torch.empty((0, *shape), dtype=dtype, device="cpu")
    return noise.to(device)


def generator_of(seed: int) -> torch.Generator:
    """A generator on the host with this seed (InputError where it would not be used whole)."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _MOST:
        raise InputError(f"the seed of a sample is a whole number from 0 to below 2**32, got {seed!r}.")
    return torch.Generator("cpu").manual_seed(seed)
