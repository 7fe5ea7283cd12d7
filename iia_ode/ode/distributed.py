"""One ODE evaluated by several processes, each on its share of the samples."""

from __future__ import annotations

import hashlib
import re
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
from .clock import recorded_time
from .conditions import digest_of, held_by
from .guidance import recorded
from .wrapped import Wrapped, layers_of

__all__ = ["Distributed", "agree", "distributed", "ranks_of"]

_APART = (
    "the processes came to different decisions: their inputs or their arithmetic differ. Give all of them the same states, "
    "conditions and options, and run them on machines of one kind, with as many threads each."
)


def distributed(ode: ProbabilityFlowODE, group: Any = None) -> ProbabilityFlowODE:
    """Share every evaluation of an ODE among the processes of ``torch.distributed``.

    Every function that takes an ODE then runs in parallel: :func:`~iia_ode.sample`, :func:`~iia_ode.odeint`,
    :meth:`IIA.fit <iia_ode.IIA.fit>`, :func:`~iia_ode.fit` and :func:`~iia_ode.iia.refine`. Every process makes the same
    calls with the same states [B, ...], conditions and options. In each evaluation, a process runs the model on its share of
    the samples and receives the outputs of all shares. All processes get the same results, to the last bit. The results also
    equal the results of a single process, apart from rounding where the rounding of the model depends on the batch size.

    Processes exchange outputs, and gradients with respect to states and times. Gradients with respect to parameters of the
    model are not exchanged: each process has the gradient of its own share. Sum these gradients over the processes. Each
    process holds all states: a teacher of K knots keeps 2 K B states in each process. The memory of the model's activations is
    divided among the processes.

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
    return Distributed(ode, Ranks(group, ode.device)) if dist.get_world_size(group) > 1 else ode


def ranks_of(ode: ProbabilityFlowODE) -> Ranks | None:
    """The processes that share an ODE's evaluations; None where this process makes all evaluations."""
    return next((layer.ranks for layer in layers_of(ode) if isinstance(layer, Distributed)), None)


def agree(ode: ProbabilityFlowODE, *task: object) -> None:
    """Check that all processes of a distributed ODE were given the same task; a collective call.

    The ODE itself is part of the task: schedule, prediction type, guidance scale, told time, fingerprint and conditions.

    Parameters
    ----------
    ode : the ODE; nothing is checked unless the ODE is distributed.
    task : arguments of a call. Tensors are compared bit by bit, also inside tuples, lists and mappings; all other values by
        ``repr``, without addresses in memory.

    Raises
    ------
    RankError : the tasks differ, or another process does not answer.
    """
    ranks = ranks_of(ode)
    if ranks is None:
        return
    scale = ode.guidance_scale if isinstance(ode.guidance_scale, Tensor) else recorded(ode.guidance_scale, ode.schedule)
    time = recorded_time(ode.time, ode.time_rounding, ode.schedule)
    own = ode.schedule.config(), ode.prediction, scale, ode.fingerprint().values, time, ode.guidance_rescale
    ranks.meet(
        ("agree", own, digest_of(ode.conditioning, ode.unconditional, held_by(ode.model)), task),
        "the processes were asked for different things: give all of them the same noise or states, conditions, model, grid, "
        "options and teacher.",
    )


def _pieces(value: object) -> Iterator[bytes]:
    """The content of a value, the same in every process that has an equal value."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield bytes(bytes_of(value))
    elif isinstance(value, Mapping):
        yield from _pieces(sorted(value.items(), key=lambda item: repr(item[0])))
    elif isinstance(value, list | tuple):
        yield f"{len(value)}:".encode()
        for part in value:
            yield from _pieces(part)
    else:
        yield re.sub(" at 0x[0-9a-fA-F]+", "", f"{value!r}|").encode()


class Ranks:
    """The processes of a group. Every message is answered within the timeout of the group, or becomes a RankError.

    Parameters
    ----------
    group : a process group of ``torch.distributed``; None for all processes.
    device : device of the model; None for the host. Messages go from device to device where the group can send them by
        NCCL, and else from host to host.
    """

    def __init__(self, group: Any, device: torch.device | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        backends = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
        on_device = device is not None and device.type == "cuda" and "cuda:nccl" in backends
        self.on_host = "cpu:" in backends and not on_device
        if self.on_host:
            self.device = torch.device("cpu")
        else:
            self.device = device if on_device and device else torch.device("cuda", torch.cuda.current_device())

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a process group cannot be copied

    def share(self, samples: int, rank: int | None = None) -> slice:
        """The share of a process, this one by default: ranks in order have samples in order, as evenly as can be."""
        rank = self.rank if rank is None else rank
        return slice(rank * samples // self.size, (rank + 1) * samples // self.size)

    def rows(self, own: Tensor, samples: int, *call: object) -> Tensor:
        """The whole batch [samples, ...] from the shares of all processes, on the device of this process's own.

        `call` identifies the call. Where messages are on the host, all processes must make the same one.
        """
        if self.on_host:  # elsewhere reading the answers would wait for the device
            self.meet(("rows", samples, str(own.dtype), list(own.shape[1:]), call))
        most = -(-samples // self.size)
        message = own.new_zeros((most, *own.shape[1:]))
        message[: len(own)] = own
        parts = self._received(message)
        shares = (self.share(samples, rank) for rank in range(self.size))
        return torch.cat([part[: s.stop - s.start] for s, part in zip(shares, parts, strict=True)]).to(own.device)

    def gathered(self, values: Tensor, name: str) -> list[Tensor]:
        """A tensor of the same shape and dtype from every process, on the host; `name` identifies the call."""
        self.meet((name, list(values.shape)))
        return [v.cpu() for v in self._received(values)]

    def check_same(self, values: Tensor) -> None:
        """Raise RankError unless all processes have these numbers, to rounding."""
        if not all(
            torch.allclose(v, values, rtol=1e-6, atol=0.0, equal_nan=True) for v in self.gathered(values, "same")
        ):
            raise RankError(_APART)

    def meet(self, call: object, otherwise: str = _APART) -> None:
        """Raise RankError, with the message `otherwise`, unless all processes make the same call.

        Processes meet before they exchange tensors: gloo ends a process that receives a tensor of another size.
        """
        digest = hashlib.blake2b(digest_size=7)
        for piece in _pieces(call):
            digest.update(piece)
        mark = torch.tensor([int.from_bytes(digest.digest(), "big")], dtype=torch.int64, device="cpu")
        if any(not torch.equal(other.cpu(), mark) for other in self._received(mark)):
            raise RankError(otherwise)

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
        RankError : the model failed in this process, or another process does not answer or makes another call.
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
        time: object = t
        if isinstance(t, Tensor):  # read only where the message is on the host too
            time = float(t.detach().flatten()[0]) if ranks.on_host else None
        return _joined(out[: own.stop - own.start], samples, time, ranks)

    changes = False  # the results are those of the inner ODE

    def counting(self) -> AbstractContextManager[Ledger]:
        """A ledger of the evaluations of all processes in a ``with`` block; the end of the block is a collective call.

        Samples are summed over processes. The number of evaluations is the number of the busiest process. A block that ends in
        an exception has the counts of this process alone.
        """
        return self._summed()

    @contextmanager
    def _summed(self) -> Iterator[Ledger]:
        with self.inner.counting() as spent:
            yield spent
        own = torch.tensor([spent.evaluations, spent.samples], dtype=torch.int64, device="cpu")
        evaluations, samples = torch.stack(self.ranks.gathered(own, "counts")).unbind(dim=1)
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
            ctx.ranks.rows(g[:count], ctx.samples, "gradient") if needed else None
            for g, needed in zip(gradients, ctx.needs_input_grad[:2], strict=True)
        )
        return x, t, None, None


class _Join(torch.autograd.Function):
    """The whole batch from the shares of all processes; backward keeps the gradient of this process's share."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, samples: int, time: object, ranks: Ranks) -> Tensor:
        ctx.place = ranks.share(samples)
        return ranks.rows(own, samples, "output", time)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0][ctx.place], None, None, None


def _cut(x: Tensor, t: Tensor | None, taken: slice, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    parts: tuple[Tensor, Tensor | None] = _Cut.apply(x, t, taken, ranks)  # type: ignore[no-untyped-call]
    return parts


def _joined(own: Tensor, samples: int, time: object, ranks: Ranks) -> Tensor:
    whole: Tensor = _Join.apply(own, samples, time, ranks)  # type: ignore[no-untyped-call]
    return whole
