"""Several processes for one fit or one run, as ``torchrun`` starts them: who this one is, and which samples are its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import torch
import torch.distributed as dist
from torch import Tensor

from ..iia.gather import hearing, share

__all__ = ["Process", "joined", "process_count", "processes_for"]


@dataclass(frozen=True)
class Process:
    """One of `size` processes that share the samples, on a device of its own."""

    rank: int
    size: int
    device: str

    @property
    def leads(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0

    def share(self, samples: int) -> slice:
        """Its part of a batch."""
        return share(self.rank, self.size, samples)

    def gathered(self, own: Tensor, samples: int) -> Tensor | None:
        """The whole batch from everyone's part of it, at the one that leads; None at the others.

        Raises
        ------
        RankError : another process failed.
        """
        if self.size == 1:
            return own
        if not self.leads:
            with hearing(self.rank, self.size):
                dist.send(own.contiguous(), 0)
            return None
        parts = [own.cpu()]
        for rank in range(1, self.size):
            part = share(rank, self.size, samples)
            theirs = own.new_empty((part.stop - part.start, *own.shape[1:]))
            with hearing(self.rank, self.size):
                dist.recv(theirs, rank)
            parts.append(theirs.cpu())
        return torch.cat(parts)


def process_count() -> int:
    """How many processes there are, by the environment that ``torchrun`` sets."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or text == "0":
        raise click.ClickException(f"WORLD_SIZE must be a number of processes, got {text!r}.")
    return int(text)


def processes_for(samples: int) -> int:
    """How many processes there are, if each gets a sample; a usage error if not."""
    if samples < (size := process_count()):
        raise click.UsageError(f"{samples} samples are too few for {size} processes.")
    return size


@contextmanager
def joined(device: str) -> Iterator[Process]:
    """Join the other processes if there are any: over gloo, or over NCCL if the model runs on CUDA devices.

    There each process takes the device of its LOCAL_RANK, unless `device` names one.
    """
    size = process_count()
    if size == 1:
        yield Process(0, 1, device)
        return
    if not dist.is_available():
        raise click.ClickException("this build of torch cannot join several processes.")
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index)
        torch.cuda.set_device(place)
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(f"the {size} processes that WORLD_SIZE speaks of cannot meet: {error}") from error
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), str(place))
    finally:
        dist.destroy_process_group()
