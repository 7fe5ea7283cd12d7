"""Checks of options that say what was wrong and what to write instead."""

from __future__ import annotations

from .errors import InputError

__all__ = ["check_flag", "check_seed", "check_whole"]


def check_whole(name: str, value: object, *, least: int) -> None:
    """Raise InputError unless it is a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise InputError unless it is True or False; any other string or number would count as one of them."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}.")


def check_seed(seed: object) -> None:
    """Raise InputError unless it is a whole number that torch's generators take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise InputError(f"seed must be a whole number from -2**63 to below 2**64, got {seed!r}.")
