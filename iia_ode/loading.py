"""`load` reads every kind of file of this library."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .denoisers import load_denoiser
from .errors import FileFormatError, InputError
from .estimation import read_statistics
from .files import read_kind
from .iia.fitted import read_fit
from .plan import read_plan, read_run
from .schedules import Schedule
from .teacher.teacher import read_teacher

__all__ = ["load"]


def load(path: str | os.PathLike[str], *, schedule: Schedule | None = None) -> Any:
    """Read a file of any kind; the kind is read from its header.

    Nothing is unpickled. Samples from a loaded solver or plan are bit-equal to samples from the saved one.

    Parameters
    ----------
    path : a file written by one of the methods in the table.
    schedule : the noise schedule, needed only where a file cannot hold the schedule, as with ``Schedule.from_functions``.
        Otherwise a given schedule is compared with the schedule of the file.

    Returns
    -------
    The object of the file, on the CPU:

    ================================  =======================================
    written by                        returns
    ================================  =======================================
    ``FittedSolver.save``             :class:`~iia_ode.FittedSolver`
    ``Plan.save``                     :class:`~iia_ode.Plan`
    ``Run.save``                      :class:`~iia_ode.plan.Run`, waiting at the same evaluation
    ``Teacher.save``                  :class:`~iia_ode.Teacher`
    ``ModelStatistics.save``          :class:`~iia_ode.ModelStatistics`
    ``denoisers.save_denoiser``       the denoiser, in evaluation mode
    ================================  =======================================

    Raises
    ------
    FileFormatError : the file is missing, damaged, not written by this library, or does not hold its schedule.
    MismatchError : `schedule` is not the schedule of the file.
    InputError : `schedule` is no schedule, or is given for a denoiser.

    Examples
    --------
    >>> fit.save("fit.safetensors")
    >>> x = iia.sample(ode, x_T, solver=iia.load("fit.safetensors"))
    """
    kind = read_kind(path)
    if kind not in _READERS:
        raise FileFormatError(f"{str(path)!r} holds a {kind!r}; iia_ode.load reads {', '.join(map(repr, _READERS))}.")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise InputError(f"schedule must be a Schedule such as iia_ode.EDM(), got {type(schedule).__name__}.")
    return _READERS[kind](path, schedule)


def _denoiser(path: str | os.PathLike[str], schedule: Schedule | None) -> Any:
    if schedule is not None:
        raise InputError(f"{str(path)!r} holds a denoiser, which has no schedule: omit schedule=.")
    return load_denoiser(path)


_READERS: dict[str, Callable[[str | os.PathLike[str], Schedule | None], Any]] = {
    "fitted solver": lambda path, schedule: read_fit(path, schedule=schedule),
    "plan": lambda path, schedule: read_plan(path, schedule=schedule),
    "run": lambda path, schedule: read_run(path, schedule=schedule),
    "teacher": lambda path, schedule: read_teacher(path, schedule=schedule),
    "model statistics": read_statistics,
    "denoiser": _denoiser,
}
