"""Callbacks at grid points, with the estimate of the data for callbacks that take it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..errors import InputError, ScheduleError

__all__ = ["Callback", "Notifier", "notifier"]

Callback: TypeAlias = Callable[..., Any]
"""Called as ``callback(k, t, state)`` or ``callback(k, t, state, data)`` at grid point k; see :func:`notifier`."""


@dataclass(frozen=True)
class Notifier:
    """A callback as runs call it.

    Attributes
    ----------
    callback : the function of the user, or None.
    takes_data : whether the function takes the estimate of the data.
    by_name : whether the estimate is passed by the name ``data``.
    """

    callback: Callback | None
    takes_data: bool = False
    by_name: bool = False

    def __call__(self, k: int, t: Any, state: Tensor, estimate: Callable[[], Tensor | None]) -> None:
        """Call the function at grid point k, with time t and the state [B, ...] there.

        `estimate` makes the estimate of x_0, or None before the first evaluation. An estimate not determined by the last
        evaluation is None too.
        """
        if self.callback is None:
            return
        if not self.takes_data:
            self.callback(k, t, state)
            return
        try:
            data = estimate()
        except ScheduleError:  # a noise estimate where alpha = 0 says nothing about the data
            data = None
        if self.by_name:
            self.callback(k, t, state, data=data)
        else:
            self.callback(k, t, state, data)


def notifier(callback: Callback | None) -> Notifier:
    """The callback with its signature looked up.

    A function with a parameter named ``data``, or with four required positional parameters, takes the estimate of the data.

    Raises
    ------
    InputError : `callback` is not callable.
    """
    if callback is None:
        return Notifier(None)
    if not callable(callback):
        raise InputError(
            f"callback must be a function callback(k, t, state) or callback(k, t, state, data), got {callback!r}."
        )
    try:
        parameters = inspect.signature(callback).parameters
    except (TypeError, ValueError):  # a function of C without a signature
        return Notifier(callback)
    named = parameters.get("data")
    if named is not None and named.kind is not inspect.Parameter.POSITIONAL_ONLY:
        return Notifier(callback, takes_data=True, by_name=True)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in positional and p.default is inspect.Parameter.empty]
    return Notifier(callback, takes_data=len(required) >= 4)
