"""An ODE that several processes evaluate together, so that whatever one process can do with an ODE, several can do faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import RankError, first_line
from ..ode import Ledger, ProbabilityFlowODE, check_wrapped
from .gather import Ranks

__all__ = ["SharedODE"]


class SharedODE(ProbabilityFlowODE):
    """An ODE whose every evaluation is shared out: each process runs the model on its share of the samples.

    All processes make the same calls with the same states, in the same order, and each gets the output of the whole batch, to
    the last bit the same. So they come to the same decisions, and nothing but outputs, and on the way back their gradients, is
    exchanged. The states and what is made of them are everyone's; the model's own memory is shared out too.

    Parameters
    ----------
    ode : the ODE, the same in every process; its ledger counts what all of them spend.
    ranks : the processes.

    Raises
    ------
    InputError : the ODE has an `evaluate` or `forward` of its own, which would be passed over.
    """

    def __init__(self, ode: ProbabilityFlowODE, ranks: Ranks) -> None:
        check_wrapped(ode)
        super().__init__(ode.model, **ode.settings)
        self.ranks, self.ledger = ranks, ode.ledger
        self.own = ode.condition(**ode.conditioning)
        self.own.ledger = Ledger()  # what this process alone spends

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the model returns for all samples; every process makes this call.

        Raises
        ------
        RankError : the model failed in this process, or another one was not heard of, or is at another call than this one.
        """
        samples, ranks = len(x), self.ranks
        self.check_conditions(samples)
        self.ledger.evaluations += 1
        self.ledger.samples += samples
        own = ranks.share(samples)
        # Whoever has no sample runs one all the same: the way back must be the same in every process.
        taken = own if own.stop > own.start else slice(0, 1)
        times = t.expand(samples) if isinstance(t, Tensor) else None
        part, part_times = _cut(x, times, taken, ranks)
        try:
            out = self.own.subset(taken, samples).output(part, t if part_times is None else part_times)
        except Exception as error:  # whatever it is: the others wait, so nothing that could be tried instead may follow
            raise RankError(
                f"the model failed in process {ranks.rank} of {ranks.size}: {type(error).__name__}: {first_line(error)}"
            ) from error
        mark = 0.0
        if ranks.on_host:  # where reading a time takes no waiting for a device
            mark = float(t.detach().flatten()[0]) if isinstance(t, Tensor) else t
        return _joined(out[: own.stop - own.start], samples, mark, ranks)

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> SharedODE:
        view = self.own._view(conditioning, unconditional)
        view.ledger = self.ledger
        return SharedODE(view, self.ranks)

    def fingerprint(self) -> str:
        """That of the ODE."""
        return self.own.fingerprint()


class _Cut(torch.autograd.Function):
    """A share of states and times that every process has; on the way back the gradients of all shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor | None, taken: slice, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
        ctx.samples, ctx.ranks = len(x), ranks
        return x[taken].clone(), None if t is None else t[taken].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # Both in one place, so that every process sends them in the same order.
        place = ctx.ranks.share(ctx.samples)
        count = place.stop - place.start
        x, t = (
            ctx.ranks.rows(g[:count], ctx.samples) if needed else None
            for g, needed in zip(gradients, ctx.needs_input_grad[:2], strict=True)
        )
        return x, t, None, None


class _Join(torch.autograd.Function):
    """The whole batch from everyone's share; on the way back the gradient of one's own."""

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
