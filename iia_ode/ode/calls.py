"""Calls of a model: its arguments, the check of its answer, and the count of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .conditions import batched, paired

__all__ = ["Ledger", "answers", "counted", "own_device", "own_dtype"]


@dataclass
class Ledger:
    """The evaluations that an ODE spent. Evaluations in a graph of ``torch.compile`` or ``torch.export`` do not count.

    Attributes
    ----------
    evaluations : batched calls of the model. A guided evaluation is a single call on a doubled batch, or two calls.
    samples : sum of the batch sizes over all calls; a doubled batch counts with its undoubled size.
    """

    evaluations: int = 0
    samples: int = 0

    def add(self, samples: int) -> None:
        """Count a call of the model with a number of samples."""
        if not torch.compiler.is_compiling():  # a graph would be compiled again for every count
            self.evaluations += 1
            self.samples += samples

    def reset(self) -> None:
        """Back to zero."""
        self.evaluations = self.samples = 0


@contextmanager
def counted(ledger: Ledger) -> Iterator[Ledger]:
    """The evaluations of a block, filled in at its end."""
    before, spent = (ledger.evaluations, ledger.samples), Ledger()
    try:
        yield spent
    finally:
        spent.evaluations, spent.samples = ledger.evaluations - before[0], ledger.samples - before[1]


def answers(
    model: Callable[..., Tensor],
    ledger: Ledger,
    x: Tensor,
    t: Tensor | float,
    branches: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
    *,
    joint: bool,
    own: bool,
) -> Sequence[Tensor]:
    """The model's outputs [B, ...] under one condition or two, in the dtype of x.

    Parameters
    ----------
    model, ledger : the model, and the count of its calls.
    x, t : state [B, ...] and the time that the model is told: a number, or a tensor [], [1] or [B].
    branches : the conditions, checked for the batch.
    dtype : dtype of the model's arithmetic.
    joint : whether two branches share a call, if their conditions fit one batch.
    own : whether the outputs are copies. Memory of the model may change at the next call.
    """

    def called(condition: Mapping[str, Any], copies: int, own: bool) -> Tensor:
        """The answer for `copies` copies of the batch, which the model may write to."""
        time_dtype = dtype if dtype == torch.float64 else torch.float32
        if isinstance(t, Tensor):
            kept = time_dtype if t.is_floating_point() else t.dtype  # whole numbers may be the rows of an embedding
            times = t.to(device=x.device, dtype=kept, non_blocking=True).expand(batch).repeat(copies)
        else:
            times = torch.full((copies * batch,), t, dtype=time_dtype, device=x.device)
        y = _cast(x, dtype, copy=True) if copies == 1 else torch.cat([x.to(dtype)] * copies)
        ledger.add(batch)
        out = _checked(model(y, times, **condition), x.shape if copies == 1 else (copies * batch, *x.shape[1:]))
        return _cast(out, x.dtype, copy=own)

    batch = x.shape[0]
    if len(branches) == 2 and joint:
        both = paired(branches[0], branches[1], batch, x.device)
        if both is not None:
            return called(both, 2, own).chunk(2)
    # The second call may write to the memory of the first answer.
    own = own or len(branches) > 1
    return [called(batched(branch, batch, x.device), 1, own) for branch in branches]


def own_device(model: object) -> torch.device | None:
    """Device of a model's first parameter, if there is one."""
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None


def own_dtype(model: object) -> torch.dtype | None:
    """Dtype of a model's first floating-point parameter, if there is one."""
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def _cast(x: Tensor, dtype: torch.dtype, *, copy: bool) -> Tensor:
    """x in a dtype; where nothing is cast, a clone or x itself, which cost half of a cast to the same dtype."""
    if x.dtype != dtype:
        return x.to(dtype)
    return x.clone() if copy else x


def _checked(out: Any, shape: Sequence[int]) -> Tensor:
    """The output of a model, checked to be a real tensor of the right shape."""
    if not isinstance(out, Tensor) or out.shape != shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(
            f"the model returned {got} for a state of shape {list(shape)}; it must return one tensor of that shape."
        )
    if not out.is_floating_point():
        raise InputError(f"the model returned {out.dtype}; it must return real floating-point numbers.")
    return out
