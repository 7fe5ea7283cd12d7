"""Several processes for one fit or one run, as started by ``torchrun``: joining them, and sharing the samples."""

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
    """A process among several that share the samples, each on its own device.

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

    def share(self, samples: int) -> slice:
        """Return the slice of a batch for the process."""
        return share(self.rank, self.size, samples)

    def gathered(self, own: Tensor, samples: int) -> Tensor | None:
        """Gather the whole batch in rank 0.

        Parameters
        ----------
        own : the samples of the process, [b, ...].
        samples : size of the whole batch, B.

        Returns
        -------
        The whole batch [B, ...] in rank 0, None in the others. With several processes it is on the CPU.

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
    """Read the number of processes from the environment variable WORLD_SIZE, set by ``torchrun``; by default 1.

    Raises
    ------
    click.ClickException : WORLD_SIZE is not a positive whole number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or text == "0":
        raise click.ClickException(f"WORLD_SIZE must be a number of processes, got {text!r}.")
    return int(text)


def processes_for(samples: int) -> int:
    """Return the number of processes, after checking that each gets a sample.

    Raises
    ------
    click.UsageError : there are fewer samples than processes.
    """
    if samples < (size := process_count()):
        raise click.UsageError(f"{samples} samples are too few for {size} processes: give each at least one sample.")
    return size


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
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index)
        torch.cuda.set_device(place)
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(f"cannot join the {size} processes announced by WORLD_SIZE: {error}") from error
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), str(place))
    finally:
        dist.destroy_process_group()
