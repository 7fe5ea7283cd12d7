"""Several processes for one fit or one run, as started by ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import torch
import torch.distributed as dist

__all__ = ["Process", "joined", "process_count", "ranked"]


@dataclass(frozen=True)
class Process:
    """A process among several that share the evaluations, each on its own device.

    Attributes
    ----------
    rank : number of the process, from 0.
    size : number of processes.
    device : device of the process.
    """

    rank: int
    size: int
    device: str

    @property
    def leads(self) -> bool:
        """Whether the process prints and writes: only rank 0 does."""
        return self.rank == 0


def process_count() -> int:
    """Read the number of processes from the environment variable WORLD_SIZE, set by ``torchrun``; by default 1.

    Raises
    ------
    click.ClickException : WORLD_SIZE is not a positive whole number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or text == "0":
        raise click.ClickException(f"WORLD_SIZE must be a number of processes, got {text!r}.")
    return int(text)


@contextmanager
def joined(device: str) -> Iterator[Process]:
    """Join the other processes, if there are any, for the duration of the block.

    Processes communicate over NCCL if the model runs on CUDA devices, else over gloo. On CUDA, a process takes the device
    numbered LOCAL_RANK unless `device` has a number.

    Parameters
    ----------
    device : device of the model, such as ``"cpu"`` or ``"cuda"``.

    Raises
    ------
    click.ClickException : torch cannot join processes, or the processes cannot reach each other.
    """
    size = process_count()
    if size == 1:
        yield Process(0, 1, device)
        return
    if not dist.is_available():
        raise click.ClickException("this build of torch cannot join several processes: run one, without torchrun.")
    place = _place(device)
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(f"cannot join the {size} processes announced by WORLD_SIZE: {error}") from error
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), str(place))
    finally:
        dist.destroy_process_group()


def ranked(device: str) -> Process:
    """This process among those of a launcher, for work without communication; devices as for :func:`joined`.

    Raises
    ------
    click.ClickException : RANK or WORLD_SIZE is not a number.
    """
    size, rank = process_count(), os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise click.ClickException(f"RANK must be the number of a process, got {rank!r}.")
    return Process(int(rank), size, str(_place(device)) if size > 1 else device)


def _place(device: str) -> torch.device:
    """The device of one of several processes."""
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index)
        torch.cuda.set_device(place)
    return place
