"""Checks of options: each returns the plain Python value, or raises an error that names the option and its valid range.

NumPy's integers and floats are accepted and returned as ``int`` and ``float``. Booleans are never numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index
from typing import Any, NoReturn, TypeVar

from .errors import IIAError, InputError

__all__ = ["check_choice", "check_flag", "check_number", "check_seed", "check_shape", "check_share", "check_whole"]

T = TypeVar("T")
ErrorType = type[IIAError]


def check_whole(
    name: str,
    value: object,
    *,
    least: int | None = None,
    most: int | None = None,
    below: int | None = None,
    such_as: object = None,
    error: ErrorType = InputError,
) -> int:
    """Return `value` as an int, or raise an error unless `value` is a whole number in the range.

    Parameters
    ----------
    name : of the option, the subject of the error message.
    least, most : inclusive bounds.
    below : exclusive upper bound, an alternative to `most`.
    such_as : a valid value to show in the error message.
    error : class of the error.

    Raises
    ------
    InputError : or another `error`: not a whole number, or out of range.
    """
    number = _as_index(value)
    if (
        number is None
        or (least is not None and number < least)
        or (most is not None and number > most)
        or (below is not None and number >= below)
    ):
        _refuse(error, name, "a whole number" + _range(least=least, most=most, below=below), such_as, value)
    return number


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    finite: bool = True,
    such_as: object = None,
    error: ErrorType = InputError,
) -> float:
    """Return `value` as a float, or raise an error unless `value` is a finite number in the range.

    Numbers are real numbers of Python, NumPy and torch, and arrays and tensors without dimensions.

    Parameters
    ----------
    name : of the option, the subject of the error message.
    least, most : inclusive bounds.
    above, below : exclusive bounds.
    finite : whether infinity is an error; NaN always is.
    such_as : a valid value to show in the error message.
    error : class of the error.

    Raises
    ------
    InputError : or another `error`: not a number, not finite, or out of range.
    """
    number = _as_real(value)
    if (
        math.isnan(number)
        or (finite and math.isinf(number))
        or (least is not None and number < least)
        or (most is not None and number > most)
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    ):
        bounds = _range(least=least, most=most, above=above, below=below)
        kind = (
            "a finite positive number" if bounds == " above 0" else f"a number{bounds}" if bounds else "a finite number"
        )
        _refuse(error, name, kind, such_as, value)
    return number


def check_share(name: str, value: object, *, such_as: object = None, error: ErrorType = InputError) -> float:
    """Return `value` as a float, or raise `error` unless `value` is a number from 0 to 1, both included."""
    return check_number(name, value, least=0, most=1, such_as=such_as, error=error)


def check_flag(name: str, value: object, *, error: ErrorType = InputError) -> bool:
    """Return `value`, or raise `error` unless `value` is True or False; 0, 1 and strings are errors too."""
    if not isinstance(value, bool):
        _refuse(error, name, "True or False", None, value)
    return value


def check_seed(seed: object, name: str = "seed") -> int:
    """Return `seed` as an int, or raise InputError unless torch's generators take `seed`: from -2**63 to below 2**64."""
    number = _as_index(seed)
    if number is None or not -(2**63) <= number < 2**64:
        _refuse(InputError, name, "a whole number from -2**63 to below 2**64", None, seed)
    return number


def check_shape(name: str, value: object, *, error: ErrorType = InputError) -> tuple[int, ...]:
    """Return `value` as a tuple, or raise `error` unless `value` is a sequence of whole numbers from 0."""
    lengths = [_as_index(n) for n in value] if isinstance(value, Sequence) and not isinstance(value, str) else [None]
    shape = tuple(n for n in lengths if n is not None and n >= 0)
    if len(shape) != len(lengths):
        _refuse(error, name, "a sequence of whole numbers from 0", (3, 32, 32), value)
    return shape


def check_choice(name: str, value: T, choices: Iterable[T], *, error: ErrorType = InputError) -> T:
    """Return `value`, or raise `error` with the list of `choices` unless `value` is among them."""
    known = list(choices)
    if value not in known:
        _refuse(error, name, f"one of {', '.join(map(repr, known))}", None, value)
    return value


def _as_index(value: Any) -> int | None:
    """`value` as an int for an integer of Python, NumPy or torch; None for everything else."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def _as_real(value: Any) -> float:
    """`value` as a float for a real number of Python, NumPy or torch; NaN for everything else."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _range(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> str:
    """The range in words, with a space before it; empty without bounds."""
    low = f" above {_brief(above)}" if above is not None else "" if least is None else f" from {_brief(least)}"
    if above is not None and below is not None:
        return f" between {_brief(above)} and {_brief(below)}"
    if most is not None:
        high = f"at most {_brief(most)}"
        return f"{low} to {_brief(most)}" if least is not None else f"{low} and {high}" if low else f", {high}"
    if below is not None:
        high = f"below {_brief(below)}"
        return f"{low} to {high}" if least is not None else f"{low} and {high}" if low else f" {high}"
    return low if least is None else f", at least {_brief(least)}"


def _brief(bound: float) -> str:
    """A bound in the usual notation: ``2**32`` for a large power of two."""
    power = int(bound).bit_length() - 1
    return f"2**{power}" if isinstance(bound, int) and power > 16 and bound == 2**power else f"{bound:g}"


def _refuse(error: ErrorType, name: str, expected: str, such_as: object, value: object) -> NoReturn:
    example = "" if such_as is None else f", such as {such_as!r}"
    raise error(f"{name} must be {expected}{example}, got {value!r}.")
