"""One ODE evaluated by several processes, each on its share of the samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError, RankError, first_line
from ..files import bytes_of
from .base import Ledger, ProbabilityFlowODE
from .wrapped import Wrapped, layers_of

__all__ = ["Distributed", "agree", "distributed", "ranks_of"]

_APART = (
    "the processes came to different decisions: their inputs or their arithmetic differ. Give all of them the same states, "
    "conditions and options, and run them on machines of one kind, with as many threads each."
)


def distributed(ode: ProbabilityFlowODE, group: Any = None) -> ProbabilityFlowODE:
    """The ODE with every evaluation shared out among the processes of ``torch.distributed``.

    Whatever takes an ODE then runs in parallel: :func:`~iia_ode.sample`, :meth:`IIA.fit <iia_ode.IIA.fit>`,
    :func:`~iia_ode.fit` and :func:`~iia_ode.iia.refine`. Every process makes the same calls with the same states
    [B, ...], conditions and options. In each evaluation, a process runs the model on its share of the samples and receives the
    outputs of all. All processes get the same results, to the last bit.

    Only outputs and their gradients are exchanged. Each process holds all states: a teacher of K knots keeps 2 K B states
    in each process. The memory of the model's own activations is shared out.

    Parameters
    ----------
    ode : the ODE, the same in every process.
    group : a process group of ``torch.distributed``; by default all processes.

    Returns
    -------
    The distributed ODE; `ode` itself where ``torch.distributed`` is not initialized or has one process.

    Raises
    ------
    InputError : the ODE is distributed already, or this process is not in the group.
    RankError : in evaluations, where another process fails, does not answer within the timeout of the group, or makes
        another call.
    """
    if not isinstance(ode, ProbabilityFlowODE):
        raise InputError(f"distributed takes a ProbabilityFlowODE, got {type(ode).__name__}.")
    if ranks_of(ode) is not None:
        raise InputError("this ODE is distributed already: pass the one that it was made of.")
    if not dist.is_available() or not dist.is_initialized():
        return ode
    if dist.get_rank(group) < 0:
        raise InputError("this process is not in the group: call distributed in the processes of the group alone.")
    return Distributed(ode, Ranks(group)) if dist.get_world_size(group) > 1 else ode


def ranks_of(ode: ProbabilityFlowODE) -> Ranks | None:
    """The processes that share an ODE's evaluations; None where this process makes all of them."""
    return next((layer.ranks for layer in layers_of(ode) if isinstance(layer, Distributed)), None)


def agree(ode: ProbabilityFlowODE, *task: object) -> None:
    """Raise RankError unless every process of a distributed ODE has the same task: tensors by value, all else by repr."""
    ranks = ranks_of(ode)
    if ranks is None:
        return
    digest = hashlib.sha256()
    for part in (
        ode.schedule.config(),
        ode.prediction,
        ode.guidance_scale,
        ode.fingerprint(),
        *_conditions(ode),
        *task,
    ):
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(bytes_of(part))
        else:
            digest.update(f"{part!r}|".encode())
    mark = torch.tensor([int.from_bytes(digest.digest()[:7], "big")], dtype=torch.int64, device="cpu")
    if any(not torch.equal(other, mark) for other in ranks.gathered(mark)):
        raise RankError(
            "the processes were asked for different things: give all of them the same noise or states, conditions, model, "
            "grid, options and teacher."
        )


def _conditions(ode: ProbabilityFlowODE) -> Iterator[object]:
    for values in (ode.conditioning, ode.unconditional):
        for key, value in sorted(values.items()):
            yield from (key, value)


class Ranks:
    """The processes of a group. Every message is answered within the timeout of the group, or becomes a RankError."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.on_host = "gloo" in dist.get_backend(group) or "mpi" in dist.get_backend(group)
        self.device = torch.device("cpu") if self.on_host else torch.device("cuda", torch.cuda.current_device())

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a process group cannot be copied

    def share(self, samples: int, rank: int | None = None) -> slice:
        """The share of a process, this one by default: ranks in order have samples in order, as evenly as can be."""
        rank = self.rank if rank is None else rank
        return slice(rank * samples // self.size, (rank + 1) * samples // self.size)

    def rows(self, own: Tensor, samples: int, mark: float = 0.0) -> Tensor:
        """The whole batch [samples, ...] from the shares of all processes, on the device of this process's own.

        Where messages are on the host, the marks of all processes must agree: a mark identifies the call.
        """
        most = -(-samples // self.size)
        message = own.new_full((most + 1, *own.shape[1:]), mark)
        message[: len(own)] = own
        parts = self._received(message)
        if self.on_host and not all(torch.equal(part[most], parts[0][most]) for part in parts):
            raise RankError(_APART)
        shares = (self.share(samples, rank) for rank in range(self.size))
        return torch.cat([part[: s.stop - s.start] for s, part in zip(shares, parts, strict=True)]).to(own.device)

    def gathered(self, values: Tensor) -> list[Tensor]:
        """A tensor of the same shape from every process, on the host."""
        return [v.cpu() for v in self._received(values)]

    def check_same(self, values: Tensor) -> None:
        """Raise RankError unless all processes have these numbers, to rounding."""
        lengths = self.gathered(torch.tensor([len(values)], dtype=torch.int64, device="cpu"))
        same = all(torch.equal(n, lengths[0]) for n in lengths)
        if not same or not all(
            torch.allclose(v, values, rtol=1e-6, atol=0.0, equal_nan=True) for v in self.gathered(values)
        ):
            raise RankError(_APART)

    def _received(self, values: Tensor) -> list[Tensor]:
        mine = values.to(self.device)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(theirs, mine, group=self.group)
        except RuntimeError as error:
            raise RankError(
                f"process {self.rank} of {self.size} heard nothing from another process, which failed or is too slow for "
                f"the timeout of the group: {error}"
            ) from error
        return theirs


class Distributed(Wrapped):
    """See :func:`distributed`."""

    def __init__(self, inner: ProbabilityFlowODE, ranks: Ranks) -> None:
        super().__init__(inner)
        self.ranks = ranks

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The model's output for all samples x [B, ...] at time t; a collective call.

        Raises
        ------
        RankError : the model failed in this process, or another process is not heard of or makes another call.
        """
        samples, ranks = len(x), self.ranks
        self.check_conditions(samples)
        own = ranks.share(samples)
        # Backward collectives must match, so with gradients a process without samples evaluates one all the same.
        idle = own.stop == own.start
        taken = slice(0, 1) if idle else own
        times = t.expand(samples) if isinstance(t, Tensor) else None
        part, part_times = _cut(x, times, taken, ranks)
        try:
            if idle and not torch.is_grad_enabled():
                out = part
            else:
                out = self.inner.subset(taken, samples).output(part, t if part_times is None else part_times)
        except Exception as error:  # of any kind: the other processes wait, so this one must not try anything else
            raise RankError(
                f"the model failed in process {ranks.rank} of {ranks.size}: {type(error).__name__}: {first_line(error)}"
            ) from error
        mark = 0.0
        if ranks.on_host:  # elsewhere reading a time would wait for the device
            mark = float(t.detach().flatten()[0]) if isinstance(t, Tensor) else t
        return _joined(out[: own.stop - own.start], samples, mark, ranks)

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> Distributed:
        return self.over(self.inner._view(conditioning, unconditional))

    def counting(self) -> AbstractContextManager[Ledger]:
        """A ledger of what all processes spend in a ``with`` block; its end is a collective call.

        Samples are summed over processes; evaluations are those of the busiest process. A block that ends in an exception
        has the counts of this process alone.
        """
        return self._summed()

    @contextmanager
    def _summed(self) -> Iterator[Ledger]:
        with self.inner.counting() as spent:
            yield spent
        own = torch.tensor([spent.evaluations, spent.samples], dtype=torch.int64, device="cpu")
        evaluations, samples = torch.stack(self.ranks.gathered(own)).unbind(dim=1)
        spent.evaluations, spent.samples = int(evaluations.max()), int(samples.sum())


class _Cut(torch.autograd.Function):
    """A share of states and times that all processes have; backward gathers the gradients of all shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor | None, taken: slice, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
        ctx.samples, ctx.ranks = len(x), ranks
        return x[taken].clone(), None if t is None else t[taken].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # Both gradients in one place, so that every process sends them in the same order.
        place = ctx.ranks.share(ctx.samples)
        count = place.stop - place.start
        x, t = (
            ctx.ranks.rows(g[:count], ctx.samples) if needed else None
            for g, needed in zip(gradients, ctx.needs_input_grad[:2], strict=True)
        )
        return x, t, None, None


class _Join(torch.autograd.Function):
    """The whole batch from the shares of all processes; backward keeps the gradient of this process's share."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, samples: int, mark: float, ranks: Ranks) -> Tensor:
        ctx.place = ranks.share(samples)
        return ranks.rows(own, samples, mark)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0][ctx.place], None, None, None


def _cut(x: Tensor, t: Tensor | None, taken: slice, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    parts: tuple[Tensor, Tensor | None] = _Cut.apply(x, t, taken, ranks)  # type: ignore[no-untyped-call]
    return parts


def _joined(own: Tensor, samples: int, mark: float, ranks: Ranks) -> Tensor:
    whole: Tensor = _Join.apply(own, samples, mark, ranks)  # type: ignore[no-untyped-call]
    return whole
