"""`load` reads every kind of file of this library."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .denoisers import load_classifier, load_denoiser
from .errors import FileFormatError, InputError
from .estimation import read_statistics
from .files import as_path, read_kind
from .iia.fitted import read_fit
from .plan import read_plan, read_run
from .schedules import Schedule
from .sharing.hub import SOLVER, fetched, names_a_repo
from .teacher.teacher import read_teacher

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    schedule: Schedule | None = None,
    revision: str | None = None,
    file: str = SOLVER,
) -> Any:
    """Read a file of any kind, from a path or from a repository of the Hugging Face hub; the kind is read from its header.

    Nothing is unpickled. Samples from a loaded solver or plan are bit-equal to samples from the saved one.

    Parameters
    ----------
    path : a file written by one of the methods in the table; a folder with `file` in it; or the name of a repository such as
        ``"owner/name"``, where there is no such path. The hub needs the extra ``hub``.
    schedule : the noise schedule, needed only where a file cannot hold the schedule, as with ``Schedule.from_functions``.
        Otherwise a given schedule is compared with the schedule of the file.
    revision : branch, tag or commit of the repository.
    file : name of the file in the folder or in the repository.

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
    ``denoisers.save_classifier``     the classifier, in evaluation mode
    ================================  =======================================

    Raises
    ------
    FileFormatError : the file is missing, damaged, not written by this library, or does not hold its schedule.
    MismatchError : `schedule` is not the schedule of the file.
    InputError : `schedule` is no schedule, or is given for a network; or `revision` is given for a local path.
    MissingDependencyError : the path is the name of a repository, and huggingface_hub is not installed.

    Examples
    --------
    >>> fit.save("fit.safetensors")
    >>> x = iia.sample(ode, x_T, solver=iia.load("fit.safetensors"))
    >>> fit = iia.load("owner/name", revision="main")
    """
    path = _found(path, revision, file)
    kind = read_kind(path)
    if kind not in _READERS:
        raise FileFormatError(f"{str(path)!r} holds a {kind!r}; iia_ode.load reads {', '.join(map(repr, _READERS))}.")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise InputError(f"schedule must be a Schedule such as iia_ode.EDM(), got {type(schedule).__name__}.")
    return _READERS[kind](path, schedule)


def _found(path: str | os.PathLike[str], revision: str | None, file: str) -> str | os.PathLike[str]:
    """The file behind a path, a folder or the name of a repository."""
    if names_a_repo(path):
        return fetched(str(path), file, revision)
    if revision is not None:
        raise InputError(
            f"revision is for a repository such as 'owner/name', and {str(path)!r} is a local path: omit it."
        )
    own = as_path(path)
    if not os.path.isdir(own):  # unlike that of Path, this answers no where a name is too long
        return path
    if not os.path.isfile(own / file):
        others = sorted(p.name for p in own.iterdir() if p.suffix in (".safetensors", ".iia"))[:5]
        advice = f": take file={' or file='.join(map(repr, others))}" if others else ""
        raise FileFormatError(f"{str(own)!r} is a folder without a file {file!r}{advice}.")
    return own / file


def _network(path: str | os.PathLike[str], schedule: Schedule | None) -> Any:
    kind = read_kind(path)
    if schedule is not None:
        raise InputError(f"{str(path)!r} holds a {kind}, which has no schedule: omit schedule=.")
    return load_denoiser(path) if kind == "denoiser" else load_classifier(path)


_READERS: dict[str, Callable[[str | os.PathLike[str], Schedule | None], Any]] = {
    "fitted solver": lambda path, schedule: read_fit(path, schedule=schedule),
    "plan": lambda path, schedule: read_plan(path, schedule=schedule),
    "run": lambda path, schedule: read_run(path, schedule=schedule),
    "teacher": lambda path, schedule: read_teacher(path, schedule=schedule),
    "model statistics": read_statistics,
    "denoiser": _network,
    "classifier": _network,
}
