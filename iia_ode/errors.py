"""The errors and warnings of the library.

All errors derive from :class:`IIAError`: ``except iia_ode.IIAError`` catches the errors of the library, and no others. Each
error also derives from the nearest built-in exception (``ValueError``, ``LookupError``, ...).
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = [
    "ConformanceError",
    "DuplicateWarning",
    "FileFormatError",
    "FingerprintWarning",
    "GridError",
    "GuardWarning",
    "IIAError",
    "InputError",
    "MismatchError",
    "MismatchWarning",
    "MissingDependencyError",
    "NonFiniteError",
    "PlanError",
    "PredictionWarning",
    "RankError",
    "ScheduleError",
    "StateSizeWarning",
    "TrainModeWarning",
    "UnknownNameError",
    "first_line",
    "one_run",
    "unknown_name",
    "warn",
    "warn_once",
]

_INSIDE = ("iia_ode", "torch", "contextlib")  # modules that stand between a warning and the user's line


class IIAError(Exception):
    """Base class of every error raised by ``iia_ode``."""


class InputError(IIAError, ValueError):
    """An argument has a wrong value, shape or dtype."""


class GridError(InputError):
    """A time grid is not usable: not monotone, too short, outside the schedule."""


class ScheduleError(InputError):
    """A noise schedule is ill-defined where it is used."""


class PlanError(InputError):
    """A plan, or the step function it was traced from, is not a valid solver."""


class UnknownNameError(IIAError, LookupError):
    """A name is not registered; the message lists the registered names, nearest first."""


class NonFiniteError(IIAError, ArithmeticError):
    """A model or a solver produced NaN or infinity."""


class MismatchError(IIAError, ValueError):
    """A fitted solver or a plan is used with another schedule, guidance or grid than its own."""


class FileFormatError(IIAError, ValueError):
    """A file is missing, damaged, not written by this library, or of a newer version of the format."""


class MissingDependencyError(IIAError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class ConformanceError(IIAError, AssertionError):
    """A solver fails a check of the conformance suite; see :mod:`iia_ode.testing`."""


class RankError(IIAError, RuntimeError):
    """One of several processes failed, did not answer in time, or was given another fit than the others."""


class DuplicateWarning(UserWarning):
    """Some draws of noise occur more than once in a batch."""


class FingerprintWarning(UserWarning):
    """A fitted solver is used with another model than the model of the fit."""


class MismatchWarning(UserWarning):
    """A fitted solver is used in another way than it was made for: guidance, told times, initial states, or steps by index."""


class GuardWarning(UserWarning):
    """A fit was not clearly better than its base, and was replaced by the base."""


class PredictionWarning(UserWarning):
    """A model does not behave as its prediction type says."""


class TrainModeWarning(UserWarning):
    """A model is used in train mode, where its output is random or depends on the batch."""


class StateSizeWarning(UserWarning):
    """Initial states are too small or too large for the first time of the grid."""


def first_line(error: Exception) -> str:
    """The first line of an error's message; torch's messages go on with advice for its developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning that names the user's line: the innermost frame outside of this package and of torch's decorators."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


_issued: ContextVar[set[str] | None] = ContextVar("issued", default=None)


@contextmanager
def one_run() -> Iterator[None]:
    """A block, or a decorated function, in which :func:`warn_once` issues a message once; blocks inside count as one."""
    if _issued.get() is not None:
        yield
        return
    token = _issued.set(set())
    try:
        yield
    finally:
        _issued.reset(token)


def warn_once(message: str, category: type[Warning]) -> None:
    """:func:`warn`, unless the same message was issued in this run."""
    issued = _issued.get()
    if issued is None or message not in issued:
        warn(message, category)
    if issued is not None:
        issued.add(message)


def unknown_name(kind: str, name: object, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """An :class:`UnknownNameError` for `name` that lists `known`, nearest match first.

    Parameters
    ----------
    kind : kind of thing with a name, such as ``"solver"``.
    name : the unknown name.
    known : the valid names.
    hint : a sentence that explains the name; it replaces the nearest matches.
    """
    names = sorted(set(known))
    folded = {n.lower(): n for n in names}
    close = [folded[c] for c in difflib.get_close_matches(str(name).lower(), folded, n=3, cutoff=0.5)]
    if close and not hint:
        hint = f"Did you mean {' or '.join(repr(c) for c in close)}?"
    rest = ", ".join(close + [n for n in names if n not in close])
    return UnknownNameError(f"unknown {kind} {name!r}.{' ' * bool(hint)}{hint} Known: {rest}.")
