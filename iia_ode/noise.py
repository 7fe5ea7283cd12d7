"""Noise with one seed per sample, independent of how the samples are batched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .checks import check_shape, check_whole
from .errors import InputError

__all__ = ["MOST", "sample_seeds", "seed_generators", "seeded_noise"]

MOST = 2**32  # torch's generator on the host drops the bits of a seed above 32


def sample_seeds(seed: int, index: Iterable[int]) -> list[int]:
    """Seeds of the samples `index` of a run. Each seed depends on `seed` and on the number of the sample alone.

    In a run of several processes, each process passes the numbers of its own samples. All seeds of a run differ. Runs with
    different `seed` begin at different places among 2**32 seeds: two runs of n samples share a seed with a probability of
    about n / 2**31.

    Parameters
    ----------
    seed : seed of the run, a whole number from 0.
    index : numbers of samples, whole numbers from 0 to below 2**32, such as ``range(64)``.

    Returns
    -------
    One seed per sample, from 0 to below 2**32.

    Raises
    ------
    InputError : `seed` or a number of a sample is not a whole number in its range.
    """
    if not isinstance(index, Iterable):
        raise InputError(f"index must be the numbers of samples, such as range(64), got {index!r}.")
    first = int(np.random.SeedSequence(check_whole("seed", seed, least=0)).generate_state(1)[0])
    return [(first + check_whole("the number of a sample", k, least=0, below=MOST)) % MOST for k in index]


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws of standard normal noise; sample k depends on ``seeds[k]`` alone.

    The numbers are drawn on the host and are the same on every device.

    Parameters
    ----------
    seeds : one seed per sample, whole numbers from 0 to below 2**32, as from :func:`sample_seeds`.
    shape : shape of one sample.
    dtype : floating-point dtype of the noise.
    device : device of the noise.

    Returns
    -------
    The noise, [len(seeds), *shape].

    Raises
    ------
    InputError : a seed is out of range, or `shape` or `dtype` is not usable.
    """
    if not isinstance(seeds, Sequence):
        raise InputError(f"seeds must be a sequence of whole numbers, such as [0, 1], got {seeds!r}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point dtype, such as torch.float32, got {dtype!r}.")
    size = check_shape("shape", shape)
    rows = [torch.randn(size, generator=generator_of(s), dtype=dtype, device="cpu") for s in seeds]
    return torch.stack(rows).to(device) if rows else torch.empty((0, *size), dtype=dtype, device=device)


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator on the host for each seed, as diffusers' pipelines take them: ``pipe(generator=seed_generators(seeds))``.

    ``diffusers.utils.torch_utils.randn_tensor`` draws the numbers of :func:`seeded_noise` from the generators: image k of a
    pipeline starts from the noise of ``seeded_noise([seeds[k]], shape)``, on every device. Every call makes new generators,
    because a generator moves on with each draw.

    Parameters
    ----------
    seeds : one seed per sample, whole numbers from 0 to below 2**32.

    Returns
    -------
    One generator per seed.

    Raises
    ------
    InputError : a seed is out of range.
    """
    if not isinstance(seeds, Sequence):
        raise InputError(f"seeds must be a sequence of whole numbers, such as [0, 1], got {seeds!r}.")
    return [generator_of(seed) for seed in seeds]


def generator_of(seed: int) -> torch.Generator:
    """A generator on the host; InputError unless the seed is from 0 to below 2**32."""
    return torch.Generator("cpu").manual_seed(check_whole("the seed of a generator", seed, least=0, below=MOST))
