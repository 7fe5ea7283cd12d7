"""Calls of a model: its arguments, the check of its answer, and the count of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..transforms import has_tangent, transformed
from .conditions import batched, paired

__all__ = ["Ledger", "Loans", "SpoiledError", "answer", "both_answers", "counted", "own_device", "own_dtype"]


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


class SpoiledError(Exception):
    """A model wrote to a state that was lent to it; the run has to be made again with copies."""


class Loans:
    """States on the host that a run hands to a model without copies, and the watch over them.

    The first call of each network gets a copy. If the network leaves the copy as it was, later calls get the states
    themselves, and all states in use are looked at after each call: their versions, and whether the model asked for gradients
    by them. A write outside of torch's versions, such as by NumPy or to ``x.data``, is seen in the first call alone. States
    in a graph of autograd are never lent: the model may put hooks on its input.
    """

    def __init__(self) -> None:
        self._trusted: dict[int, bool] = {}
        self._lent: list[tuple[ref[Tensor], int]] = []

    def call(self, model: Callable[..., Any], x: Tensor, times: Tensor, condition: Mapping[str, Any]) -> Any:
        """The model's answer for the state x, or for a copy of x.

        Raises
        ------
        SpoiledError : the model wrote to a state that was lent.
        """
        if x.requires_grad or not self._trusted.get(id(model)):
            return self._first(model, x, times, condition)
        lent = self._lent
        lent.append((ref(x), x._version))
        out = model(x, times, **condition)
        self._lent = []
        for loan in lent:
            state = loan[0]()
            if state is not None:
                if not _is_untouched(state, loan[1]):
                    raise SpoiledError
                self._lent.append(loan)
        return out

    def _first(self, model: Callable[..., Any], x: Tensor, times: Tensor, condition: Mapping[str, Any]) -> Any:
        """The model's answer for a copy of x; the first copy of a network shows whether the network is trusted."""
        copy = x.clone()
        out = model(copy, times, **condition)
        if id(model) not in self._trusted and not x.requires_grad:
            self._trusted[id(model)] = _is_tracked(x) and _is_untouched(copy, 0) and _is_same(x, copy)
        return out


def _is_tracked(x: Tensor) -> bool:
    """Whether writes to a state are seen: on the host, not in inference mode, and not for what a transform wraps."""
    return x.is_cpu and not (transformed() or type(x) is not Tensor or x.is_inference() or has_tangent(x))


def _is_untouched(x: Tensor, version: int) -> bool:
    """Whether a tensor outside of graphs has its version, and no gradient by it was asked for."""
    return x._version == version and not x.requires_grad and x.grad is None


def _is_same(x: Tensor, y: Tensor) -> bool:
    # On the host, ``torch.equal`` costs five times as much.
    return bool((x.numpy() == y.numpy()).all())


def answer(
    model: Callable[..., Tensor],
    ledger: Ledger,
    x: Tensor,
    t: Tensor | float,
    condition: Mapping[str, Any],
    dtype: torch.dtype,
    own: bool,
    loans: Loans | None = None,
) -> Tensor:
    """The model's output [B, ...] under one condition, in the dtype of x.

    Parameters
    ----------
    model, ledger : the model, and the count of its calls.
    x, t : state [B, ...] and the time that the model is told: a number, or a tensor [], [1] or [B].
    condition : the condition, checked for the batch.
    dtype : dtype of the model's arithmetic.
    own : whether the output is a copy. Memory of the model may change at the next call.
    loans : of a run that may lend its states; without loans, the model gets a copy of x.
    """
    shape, device = x.shape, x.device
    batch = shape[0]
    if condition:
        condition = batched(condition, batch, device)
    times = _times(t, batch, dtype, device)
    ledger.add(batch)
    out: Any
    if loans is not None and x.dtype == dtype:
        out = loans.call(model, x, times, condition)
    else:
        out = model(_cast(x, dtype, copy=True), times, **condition)
    if own or not isinstance(out, Tensor) or out.shape != shape or out.dtype != x.dtype:
        return _cast(_checked(out, shape), x.dtype, copy=own)
    return out


def both_answers(
    model: Callable[..., Tensor],
    ledger: Ledger,
    x: Tensor,
    t: Tensor | float,
    branches: tuple[Mapping[str, Any], Mapping[str, Any]],
    dtype: torch.dtype,
    *,
    joint: bool,
    loans: Loans | None = None,
) -> Sequence[Tensor]:
    """The model's outputs [B, ...] under two conditions, in the dtype of x and in memory of their own; see :func:`answer`.

    Parameters
    ----------
    branches : the two conditions.
    joint : whether the branches share a call, if their conditions fit one batch.
    """
    batch, device = x.shape[0], x.device
    both = paired(branches[0], branches[1], batch, device) if joint else None
    if both is None:
        return [answer(model, ledger, x, t, branch, dtype, True, loans) for branch in branches]
    ledger.add(batch)
    doubled = torch.cat([x.to(dtype)] * 2)
    out = _checked(model(doubled, _times(t, batch, dtype, device, copies=2), **both), doubled.shape)
    return _cast(out, x.dtype, copy=True).chunk(2)


def _times(t: Tensor | float, batch: int, dtype: torch.dtype, device: torch.device, copies: int = 1) -> Tensor:
    """The times of `copies` copies of a batch, in memory that the model may write to."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not isinstance(t, Tensor):
        return torch.full((copies * batch,), t, dtype=wide, device=device)
    kept = wide if t.is_floating_point() else t.dtype  # whole numbers may be the rows of an embedding
    return t.to(device=device, dtype=kept, non_blocking=True).expand(batch).repeat(copies)


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
