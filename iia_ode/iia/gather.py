"""One fit over several processes: each has some of the samples, and all of them solve the same least squares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, RankError
from .least_squares import LeastSquares

__all__ = ["Alone", "Gather", "Ranks", "gather_over", "hearing", "ranks_of", "share"]


_APART = (
    "the processes came to different decisions: they were not given the same, or their arithmetic differs. Run them on "
    "machines of one kind, with as many threads each."
)


class Gather(Protocol):
    """How the processes of a fit share what each has seen of its own samples."""

    def begin(self, samples: int, task: object) -> tuple[int, int]:
        """The place of this process's first sample in the whole batch, and the size of that; `task` must be everyone's."""

    def all(self, flag: bool) -> bool:
        """Whether it is so in every process."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes of float64 tensors on the host, a few numbers for each sample at most; the same on all."""

    def merged(self, system: LeastSquares) -> LeastSquares:
        """The least squares of the samples of all processes, in their order."""


class Alone:
    """A single process."""

    def begin(self, samples: int, task: object) -> tuple[int, int]:
        """From 0, all of them."""
        return 0, samples

    def all(self, flag: bool) -> bool:
        """As it is here."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def merged(self, system: LeastSquares) -> LeastSquares:
        """The system itself."""
        return system


class Ranks:
    """The processes of a group of ``torch.distributed``. Nothing but tensors of numbers is exchanged.

    Every message is answered within the timeout of the group (``init_process_group(timeout=...)``), or is a RankError.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.on_host = "gloo" in dist.get_backend(group) or "mpi" in dist.get_backend(group)
        self.device = torch.device("cpu") if self.on_host else torch.device("cuda", torch.cuda.current_device())

    def begin(self, samples: int, task: object) -> tuple[int, int]:
        """Samples count in the order of the ranks."""
        counts = self.agree(samples, task, "the same method, ODE and grid, and a teacher to all or to none")
        return sum(counts[: self.rank]), sum(counts)

    def agree(self, number: int, task: object, wanted: str) -> list[int]:
        """Everyone's number, once it is known that all have the same task; else a RankError that says what is `wanted`."""
        mark = int.from_bytes(hashlib.sha256(repr(task).encode()).digest()[:7], "big")
        rows = self._even(torch.tensor([number, mark], dtype=torch.int64, device="cpu"))
        if len({int(row[1]) for row in rows}) > 1:
            raise RankError(f"the processes were asked for different fits: give all of them {wanted}.")
        return [int(row[0]) for row in rows]

    def all(self, flag: bool) -> bool:
        """Whether it is so in every process."""
        return all(bool(row) for row in self._even(torch.tensor([flag], dtype=torch.int64, device="cpu")))

    def share(self, samples: int) -> slice:
        """This process's share of a batch that all of them have."""
        return share(self.rank, self.size, samples)

    def rows(self, own: Tensor, samples: int, mark: float = 0.0) -> Tensor:
        """The whole batch [samples, ...] from everyone's share of it, on the device of this process's own.

        Where messages are on the host, everyone's mark must be the same: it says which call this is.
        """
        most = -(-samples // self.size)
        message = own.new_full((most + 1, *own.shape[1:]), mark)
        message[: len(own)] = own
        parts = self._gathered(message)
        if self.on_host and not all(torch.equal(part[most], parts[0][most]) for part in parts):
            raise RankError(_APART)
        shares = (share(rank, self.size, samples) for rank in range(self.size))
        return torch.cat([part[: s.stop - s.start] for s, part in zip(shares, parts, strict=True)]).to(own.device)

    def check_same(self, values: Tensor) -> None:
        """Raise RankError unless these numbers are everyone's, to rounding."""
        lengths = self._even(torch.tensor([len(values)], dtype=torch.int64, device="cpu"))
        if not all(torch.equal(n, lengths[0]) for n in lengths):
            raise RankError(_APART)
        if not all(torch.allclose(v, values, rtol=1e-6, atol=0.0, equal_nan=True) for v in self._even(values)):
            raise RankError(_APART)

    def sum(self, values: Tensor) -> Tensor:
        """Added in the order of the ranks."""
        return torch.stack(self._even(values)).sum(0)

    def merged(self, system: LeastSquares) -> LeastSquares:
        """The factors of every sample, in the order of the ranks."""
        factors, total = system.state()
        sizes = torch.tensor([len(factors), len(total), system.samples, system.rows], dtype=torch.int64, device="cpu")
        shapes = [row.tolist() for row in self._even(sizes)]
        most = max(n + m for n, m, _, _ in shapes)
        message = torch.zeros(most, system.columns + 1, dtype=torch.float64, device="cpu")
        message[: len(factors) + len(total)] = torch.cat([factors, total])
        whole = LeastSquares(system.columns, intercept=system.intercept)
        for (n, m, samples, rows), part in zip(shapes, self._even(message), strict=True):
            numbers = {"samples": samples, "rows": rows, "intercept": system.intercept}
            whole.merge(LeastSquares.of_state(part[:n], part[n : n + m], shape=system.sample_shape, **numbers))
        return whole

    def _even(self, values: Tensor) -> list[Tensor]:
        """A tensor of the same shape from every rank, on the host."""
        return [v.cpu() for v in self._gathered(values)]

    def _gathered(self, values: Tensor) -> list[Tensor]:
        mine = values.to(self.device)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        with hearing(self.rank, self.size):
            dist.all_gather(theirs, mine, group=self.group)
        return theirs


def share(rank: int, size: int, samples: int) -> slice:
    """The part of a batch that is for process `rank` of `size`: ranks in order have samples in order, as evenly as can be."""
    return slice(rank * samples // size, (rank + 1) * samples // size)


@contextmanager
def hearing(rank: int, size: int) -> Iterator[None]:
    """Where process `rank` of `size` waits for another one: what torch raises if none answers becomes a RankError."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"process {rank} of {size} heard nothing from another one, which failed or is too slow for the timeout of the "
            f"group: {error}"
        ) from error


def gather_over(group: Any) -> Gather:
    """That of a group of ``torch.distributed``; of the default one, where there is one, if `group` is None."""
    return group if isinstance(group, Alone) else ranks_of(group) or Alone()


def ranks_of(group: Any) -> Ranks | None:
    """The processes of a group; of the default one if `group` is None; None where there is only this process.

    Raises
    ------
    InputError : this process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    if dist.get_rank(group) < 0:
        raise InputError("this process is not in the group that it was told to fit with.")
    return Ranks(group) if dist.get_world_size(group) > 1 else None
