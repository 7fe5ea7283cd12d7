"""An ODE that several processes evaluate together, so that whatever one process can do with an ODE, several can do faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import IIAError, RankError, first_line
from ..ode import Ledger, ProbabilityFlowODE
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
    """

    def __init__(self, ode: ProbabilityFlowODE, ranks: Ranks) -> None:
        super().__init__(
            ode.model,
            ode.schedule,
            ode.prediction,
            conditioning=ode.conditioning,
            unconditional=ode.unconditional,
            guidance_scale=ode.guidance_scale,
            model_dtype=ode.model_dtype,
            state_shape=ode.state_shape,
        )
        self.ranks, self.ledger = ranks, ode.ledger
        self.own = ode.condition(**ode.conditioning)
        self.own.ledger = Ledger()  # what this process alone spends

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the model returns for all samples; every process makes this call.

        Raises
        ------
        RankError : the model failed in this process, or another one was not heard of.
        """
        samples = len(x)
        self.ledger.evaluations += 1
        self.ledger.samples += samples
        place = self.ranks.share(samples)
        count = place.stop - place.start
        # Whoever has no sample runs one all the same: the way back must be the same in every process.
        taken = place if count else slice(0, 1)
        part = _cut(x, taken, count, self.ranks)
        times = _cut(t.expand(samples), taken, count, self.ranks) if isinstance(t, Tensor) else t
        try:
            own = self.own.subset(taken, samples).output(part, times)
        except IIAError:
            raise
        except Exception as error:  # the others wait for this process: nothing that could be tried instead may follow
            rank, size = self.ranks.rank, self.ranks.size
            raise RankError(
                f"the model failed in process {rank} of {size}: {type(error).__name__}: {first_line(error)}"
            ) from error
        return _joined(own[:count], samples, self.ranks)

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> SharedODE:
        view = self.own._view(conditioning, unconditional)
        view.ledger = self.ledger
        return SharedODE(view, self.ranks)

    def fingerprint(self) -> str:
        """That of the ODE."""
        return self.own.fingerprint()


class _Cut(torch.autograd.Function):
    """A share of a batch that every process has; on the way back the gradients of all shares."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, taken: slice, count: int, ranks: Ranks) -> Tensor:
        ctx.samples, ctx.count, ctx.ranks = len(whole), count, ranks
        return whole[taken].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.ranks.rows(gradients[0][: ctx.count], ctx.samples), None, None, None


class _Join(torch.autograd.Function):
    """The whole batch from everyone's share; on the way back the gradient of one's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, samples: int, ranks: Ranks) -> Tensor:
        ctx.place = ranks.share(samples)
        return ranks.rows(own, samples)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.place], None, None


def _cut(whole: Tensor, taken: slice, count: int, ranks: Ranks) -> Tensor:
    part: Tensor = _Cut.apply(whole, taken, count, ranks)  # type: ignore[no-untyped-call]
    return part


def _joined(own: Tensor, samples: int, ranks: Ranks) -> Tensor:
    whole: Tensor = _Join.apply(own, samples, ranks)  # type: ignore[no-untyped-call]
    return whole
