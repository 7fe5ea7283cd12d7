"""A schedule in a file: its configuration as JSON, and the table of a discrete schedule as a tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import FileFormatError, InputError, MismatchError
from .base import Schedule
from .standard import Discrete, schedule_from_config

__all__ = ["TABLE", "brief", "schedule_tensors", "stored_schedule"]

TABLE = "schedule.alphas_cumprod"
"""Name of the tensor with the table of a discrete schedule."""


def schedule_tensors(schedule: Schedule) -> dict[str, Tensor]:
    """The tensors of a schedule's file, beside the configuration."""
    return {TABLE: schedule.alphas_cumprod} if isinstance(schedule, Discrete) else {}


def stored_schedule(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    given: Schedule | None = None,
) -> Schedule:
    """The schedule of a file, or the given schedule if both are equal.

    Raises
    ------
    InputError : `given` is no schedule.
    FileFormatError : the file does not hold its schedule, and no schedule is given.
    MismatchError : the file was made for another schedule.
    """
    if given is not None and not isinstance(given, Schedule):
        raise InputError(f"schedule must be a Schedule such as iia_ode.EDM(), got {type(given).__name__}.")
    try:
        found = schedule_from_config(config, tensors.get(TABLE)) if given is None else given
    except (ArithmeticError, TypeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} does not hold the schedule it was made for: {error}") from error
    if found.config() != config:
        error_type = FileFormatError if given is None else MismatchError
        raise error_type(f"{str(path)!r} was made for schedule {brief(config)}, not {brief(found.config())}.")
    return found


def brief(config: Mapping[str, Any]) -> str:
    """A configuration as ``VP (beta_0=0.1, beta_1=20.0)``: keys sorted, long lists abbreviated."""
    key = "type" if "type" in config else "name"
    values = {k: "[...]" if isinstance(v, list) and len(v) > 2 else v for k, v in config.items() if k != key}
    rest = ", ".join(f"{k}={v}" for k, v in sorted(values.items()))
    return f"{config.get(key)} ({rest})" if rest else str(config.get(key))
