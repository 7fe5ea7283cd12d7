"""What the installed torchdiffeq offers, and a call of it that ends its steps where it is told to."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from .errors import InputError, NonFiniteError

__all__ = ["integrate", "is_adaptive", "torchdiffeq_methods"]

_F64 = torch.float64


def _table() -> Mapping[str, Any]:
    # torchdiffeq's own table of methods; its module is hidden behind the function of the same name.
    table: Mapping[str, Any] = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    return table


def torchdiffeq_methods() -> list[str]:
    """The methods that the installed torchdiffeq offers, sorted."""
    return sorted(_table())


def is_adaptive(method: str) -> bool:
    """Whether a method of torchdiffeq chooses its own steps."""
    base = importlib.import_module("torchdiffeq._impl.solvers").AdaptiveStepsizeODESolver
    return method in _table() and issubclass(_table()[method], base)


def integrate(
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t: Tensor,
    method: str,
    rtol: float,
    atol: float,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """The states at the times t by a method of torchdiffeq, [len(t), ...]; differentiable.

    An adaptive method ends a step at every time of t and of ``options["step_t"]``, and no method evaluates `func` outside
    of the range of t.

    Parameters
    ----------
    func : dy/dt as a function of a float64 time and the state.
    t : float64 [K], strictly monotone, on any device.

    Raises
    ------
    InputError : the method does not take one of the options.
    NonFiniteError : the step size vanished or the state is not finite.
    """
    times, given = t.tolist(), dict(options or {})
    tolerances = {"rtol": rtol, "atol": atol, "method": method}
    with _errors_of(method, rtol, atol):
        if not is_adaptive(method):
            within = _Within(func, min(times), max(times))
            states: Tensor = torchdiffeq.odeint(within, y0, t.to(y0.device), **tolerances, options=given or None)
            return states
        # One call per interval: left alone, an adaptive method interpolates between its steps at a lower order than its
        # own, and its `step_t` is forgotten once a step happens to end on one (0.2.5).
        asked, jumps = (
            torch.as_tensor(given.pop(k, ()), dtype=_F64, device="cpu").tolist() for k in ("step_t", "jump_t")
        )
        inside = {u for u in asked if min(times) < u < max(times)}
        nodes = sorted({*times, *inside}, reverse=times[0] > times[-1])
        found = {nodes[0]: y0}
        for a, b in pairwise(nodes):
            flow, ends = _Steps(func, min(a, b), max(a, b)), torch.tensor([a, b], dtype=_F64, device=y0.device)
            here = torch.tensor([u for u in jumps if min(a, b) < u < max(a, b)], dtype=_F64, device=y0.device)
            steps = {**given, "step_t": ends[1:], "jump_t": here}
            found[b] = torchdiffeq.odeint(flow, found[a], ends, **tolerances, options=steps)[-1]
            given["first_step"] = flow.proposed  # so that only the first interval has to look for one
        return torch.stack([found[u] for u in times])


class _Within:
    """A function of time and state that sees no time outside of [low, high].

    torchdiffeq looks beyond the end for the size of its first step, and rounds times to the dtype of the state; beyond the
    end there may be no model.
    """

    def __init__(self, func: Callable[[Tensor, Tensor], Tensor], low: float, high: float) -> None:
        self.func, self.low, self.high = func, low, high

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.func(t.to(_F64).clamp(self.low, self.high), y)


class _Steps(_Within):
    """The same, which torchdiffeq also tells the size of every step it tries, before it is cut at the end."""

    proposed: Tensor

    def callback_step(self, t: Tensor, y: Tensor, size: Tensor) -> None:
        self.proposed = size.detach()


@contextmanager
def _errors_of(method: str, rtol: float, atol: float) -> Iterator[None]:
    """torchdiffeq's complaints about its options and its step size as errors of this library."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*Unexpected arguments", category=UserWarning)
            yield
    except UserWarning as warning:  # a misspelt option would only warn, and then be ignored
        if "Unexpected arguments" not in str(warning):
            raise
        raise InputError(f"torchdiffeq's {method} does not take these options: {warning}.") from warning
    except AssertionError as error:  # torchdiffeq's way to say so; the model's own assertions pass through
        if not _raised_in_torchdiffeq(error):
            raise
        raise NonFiniteError(
            f"torchdiffeq's {method} failed at rtol={rtol:g}, atol={atol:g} ({error}): the model is not finite or not "
            "smooth there, or its own rounding is larger; use a float64 model or a larger tolerance."
        ) from error


def _raised_in_torchdiffeq(error: AssertionError) -> bool:
    trace_back = error.__traceback__
    while trace_back is not None and trace_back.tb_next is not None:
        trace_back = trace_back.tb_next
    return trace_back is not None and trace_back.tb_frame.f_globals.get("__name__", "").startswith("torchdiffeq.")
