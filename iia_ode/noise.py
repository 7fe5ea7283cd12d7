"""Noise that does not depend on how samples are batched: each from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .checks import check_shape, check_whole
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
    first = int(np.random.SeedSequence(check_whole("seed", seed, least=0)).generate_state(1)[0])
    return [(first + check_whole("the number of a sample", k, least=0, below=_MOST)) % _MOST for k in index]


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
    if not isinstance(seeds, Sequence):
        raise InputError(f"seeds must be a sequence of whole numbers, such as [0, 1], got {seeds!r}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"noise has a dtype of floating point, such as torch.float32, got {dtype!r}.")
    size = check_shape("shape", shape)
    rows = [torch.randn(size, generator=generator_of(s), dtype=dtype, device="cpu") for s in seeds]
    return torch.stack(rows).to(device) if rows else torch.empty((0, *size), dtype=dtype, device=device)


def generator_of(seed: int) -> torch.Generator:
    """A generator on the host with this seed (InputError where it would not be used whole)."""
    return torch.Generator("cpu").manual_seed(check_whole("the seed of a generator", seed, least=0, below=_MOST))
