"""Calls of the installed torchdiffeq: adaptive steps end at the given times, and misuse raises an error of this library.

The first call imports torchdiffeq, because the import takes as long as all other dependencies of the package together.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .errors import GridError, InputError, NonFiniteError
from .transforms import carries_derivative

__all__ = ["Event", "Flow", "Tolerance", "Visit", "find_event", "integrate", "is_adaptive", "method_names"]

_F64 = torch.float64

Flow: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""dy/dt as a function of a time [] and the state. The time is float64 and on the host; a time with a derivative on another
device than the host has the dtype and the device of the state."""

Event: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function of time and state; the event is where one of its entries changes sign."""

Tolerance: TypeAlias = float | Tensor

Visit: TypeAlias = Callable[[int, Tensor], None]
"""A function of the index of a time and the state there."""


def method_names() -> list[str]:
    """The methods of the installed torchdiffeq, sorted."""
    return sorted(_table())


def is_adaptive(method: str) -> bool:
    """Whether a method of torchdiffeq chooses its own steps."""
    base = importlib.import_module("torchdiffeq._impl.solvers").AdaptiveStepsizeODESolver
    return method in _table() and issubclass(_table()[method], base)


def integrate(
    func: Flow,
    y0: Tensor,
    t: Tensor,
    method: str,
    rtol: Tolerance,
    atol: Tolerance,
    options: Mapping[str, Any] | None = None,
    visit: Visit | None = None,
) -> Tensor:
    """The states at the times t by a method of torchdiffeq, [len(t), ...]; differentiable by y0, by t and through `func`.

    An adaptive method ends a step at every time of t and of ``options["step_t"]``. No method evaluates `func` outside of
    the range of t. torchdiffeq computes with times in the dtype and on the device of y0: not every device has float64.

    Parameters
    ----------
    func : dy/dt as a function of a time and the state.
    y0 : the state at ``t[0]``, float32 or float64.
    t : float64 [K], strictly monotone, on any device.
    method : a name in :func:`method_names`.
    rtol, atol : tolerances of an adaptive method.
    options : torchdiffeq's options of the method.
    visit : called as ``visit(k, state)`` once the state at ``t[k]`` is known, for k from 1. The calls do not change the steps.
        With ``scipy_solver``, and with the option ``interp="cubic"``, the calls follow the integration.

    Raises
    ------
    GridError : two times are equal in the dtype of y0.
    InputError : the method does not take one of the options; or a gradient by y0 or t through ``scipy_solver``.
    NonFiniteError : the step size vanished or the state is not finite.
    """
    if method == "scipy_solver" and any(map(carries_derivative, (y0, t))):
        raise InputError(
            "torchdiffeq's scipy_solver computes outside of torch, and no gradient flows through it: use method='dopri5', or "
            "give states and times without a gradient."
        )
    times, given = t.tolist(), dict(options or {})
    clock = t.to(y0.device, y0.dtype)
    _check_apart(times, y0.dtype)
    tolerances = {"rtol": rtol, "atol": atol, "method": method}
    odeint = _module().odeint
    with _errors_of(method, rtol, atol):
        if not is_adaptive(method):
            early = visit is not None and method != "scipy_solver" and given.get("interp", "linear") == "linear"
            known = _Watched(func, clock, visit) if visit is not None and early else None
            within = known or _Within(func, min(times), max(times))
            states: Tensor = odeint(within, y0, clock, **tolerances, options=given or None)
            if visit is not None:
                for k in range(1 if known is None else known.next, len(times)):
                    visit(k, states[k])
            return states
        # One call per interval: left alone, an adaptive method interpolates between its steps at a lower order than its
        # own, and its `step_t` is forgotten once a step happens to end on one (0.2.5).
        asked, jumps = (_times(given.pop(k, ())) for k in ("step_t", "jump_t"))
        inside = {u for u in asked if min(times) < u < max(times)}
        nodes = sorted({*times, *inside}, reverse=times[0] > times[-1])
        at = dict(zip(times, clock.unbind(), strict=True)) | {
            u: torch.tensor(u, dtype=y0.dtype, device=y0.device) for u in inside.difference(times)
        }
        found = {nodes[0]: y0}
        for a, b in pairwise(nodes):
            flow, ends = _Steps(func, min(a, b), max(a, b)), torch.stack([at[a], at[b]])
            here = torch.tensor([u for u in jumps if min(a, b) < u < max(a, b)], dtype=y0.dtype, device=y0.device)
            steps = {"dtype": y0.dtype, **given, "step_t": ends[1:], "jump_t": here}
            found[b] = odeint(flow, found[a], ends, **tolerances, options=steps)[-1]
            given["first_step"] = flow.proposed  # only the first interval has to search for a first step
            if visit is not None and b in times:
                visit(times.index(b), found[b])
        return torch.stack([found[u] for u in times])


def find_event(
    func: Flow,
    y0: Tensor,
    t: Tensor,
    method: str,
    event_fn: Event,
    rtol: Tolerance,
    atol: Tolerance,
    options: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The time of the first event between ``t[0]`` and ``t[-1]``, with the states at ``t[0]`` and at the event.

    The end of the range counts as an event, so the integration stops there; torchdiffeq alone would not stop.

    Parameters
    ----------
    event_fn : called as ``event_fn(t, y)`` with times in the dtype and on the device of y0; the event is the first sign
        change of any entry of its result.
    func, y0, t, method, rtol, atol, options : as for :func:`integrate`; of t only the ends count.

    Returns
    -------
    The time, float64 and 0-dimensional, on the host, and the states [2, ...].

    Raises
    ------
    GridError : no event in the range.
    InputError : the method has no events, or lacks an option that it needs for them.
    NonFiniteError : the step size vanished or the state is not finite.
    """
    start, end = float(t[0]), float(t[-1])
    given = dict(options or {})
    if method == "scipy_solver":
        raise InputError("torchdiffeq's scipy_solver finds no events: use method='dopri5'.")
    if not is_adaptive(method) and "step_size" not in given:
        raise InputError(
            f"torchdiffeq's {method} finds events at steps of one size: give options={{'step_size': 0.1}}, or use "
            "method='dopri5'."
        )

    def event_or_end(u: Tensor, y: Tensor) -> Tensor:
        values = torch.as_tensor(event_fn(u, y)).reshape(-1)
        return torch.cat([values, (ends[-1] - u).reshape(1).to(values)])

    ends = torch.stack([t[0], t[-1]]).to(y0.device, y0.dtype)
    if is_adaptive(method):
        asked = [u for u in _times(given.get("step_t", ())) if min(start, end) < u < max(start, end)]
        given = {
            "dtype": y0.dtype,
            **given,
            "step_t": torch.cat([torch.tensor(asked, dtype=y0.dtype, device=y0.device), ends[1:]]).sort().values,
        }
    with _errors_of(method, rtol, atol):
        within = _Within(func, min(start, end), max(start, end))
        time, states = _module().odeint(
            within, y0, ends, rtol=rtol, atol=atol, method=method, options=given, event_fn=event_or_end
        )
    rounding = 4 * torch.finfo(y0.dtype).eps * max(abs(start), abs(end))
    if abs(float(time) - end) <= 2 * float(torch.as_tensor(atol).max()) + rounding:
        raise GridError(f"event_fn does not change its sign between t = {start:g} and {end:g}: extend the grid.")
    return time.cpu().to(_F64), states


class _Within:
    """A function of time and state that is never called with a time outside of [low, high].

    torchdiffeq looks beyond the end for the size of its first step, and rounds times to the dtype of the state; beyond the
    end there may be no model.
    """

    def __init__(self, func: Flow, low: float, high: float) -> None:
        self.func, self.low, self.high = func, low, high

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if not carries_derivative(t):  # read as a number: torchdiffeq reads its times too
            t = torch.tensor(float(t), dtype=_F64, device="cpu")
        elif t.device.type == "cpu":
            t = t.to(_F64)
        return self.func(t.clamp(self.low, self.high), y)


class _Steps(_Within):
    """The same function, with torchdiffeq's callback that reports the size of every step before it is cut at the end."""

    proposed: Tensor

    def callback_step(self, t: Tensor, y: Tensor, size: Tensor) -> None:
        self.proposed = size.detach()


class _Watched(_Within):
    """The same function, with torchdiffeq's callback of fixed steps, which reports the states at the times t [K] early."""

    def __init__(self, func: Flow, t: Tensor, visit: Visit) -> None:
        super().__init__(func, float(t.min()), float(t.max()))
        self.t, self.visit, self.next = t, visit, 1
        self.forward = bool(t[-1] > t[0])
        self.before: tuple[Tensor, Tensor] | None = None

    def callback_step(self, t: Tensor, y: Tensor, size: Tensor) -> None:
        """Report the states in the step that ended at time t, with torchdiffeq's linear interpolation."""
        if self.before is not None:
            start, state = self.before
            while self.next < len(self.t) - 1 and bool(
                t >= self.t[self.next] if self.forward else t <= self.t[self.next]
            ):
                u = self.t[self.next]
                inside = y if bool(u == t) else state + (u - start) / (t - start) * (y - state)
                self.next += 1
                self.visit(self.next - 1, inside)
        self.before = t, y


def _module() -> ModuleType:
    return importlib.import_module("torchdiffeq")


def _table() -> Mapping[str, Any]:
    # torchdiffeq's own table of methods; its module is hidden behind the function of the same name.
    table: Mapping[str, Any] = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    return table


def _times(values: Any) -> list[float]:
    times: list[float] = torch.as_tensor(values, dtype=_F64, device="cpu").tolist()
    return times


def _check_apart(times: list[float], dtype: torch.dtype) -> None:
    """Raise GridError if two times of a monotone list are equal in a dtype."""
    if bool((torch.tensor(times, dtype=dtype, device="cpu").diff() == 0).any()):
        raise GridError(f"two times of the grid are equal in {dtype}, the dtype of the state: pass x.double().")


@contextmanager
def _errors_of(method: str, rtol: Tolerance, atol: Tolerance) -> Iterator[None]:
    """Raise torchdiffeq's complaints about its options and its step size as errors of this library."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*Unexpected arguments", category=UserWarning)
            yield
    except UserWarning as warning:  # torchdiffeq only warns of a misspelt option, and then ignores it
        if "Unexpected arguments" not in str(warning):
            raise
        raise InputError(f"torchdiffeq's {method} does not take these options: {warning}.") from warning
    except AssertionError as error:  # torchdiffeq's own error; the model's assertions pass through
        if not _raised_in_torchdiffeq(error):
            raise
        raise NonFiniteError(
            f"torchdiffeq's {method} failed at rtol={_shown(rtol)}, atol={_shown(atol)} ({error}): the model is not finite "
            "or not smooth there, or its own rounding is larger; use a float64 model or a larger tolerance."
        ) from error


def _shown(tolerance: Tolerance) -> str:
    return "a tensor" if isinstance(tolerance, Tensor) and tolerance.numel() != 1 else f"{float(tolerance):g}"


def _raised_in_torchdiffeq(error: AssertionError) -> bool:
    trace_back = error.__traceback__
    while trace_back is not None and trace_back.tb_next is not None:
        trace_back = trace_back.tb_next
    return trace_back is not None and trace_back.tb_frame.f_globals.get("__name__", "").startswith("torchdiffeq.")
