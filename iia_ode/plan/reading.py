"""Reading the files of plans and runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FileFormatError
from ..files import read_tensors
from ..forms import PREDICTIONS
from ..schedules import Schedule
from ..schedules.stored import stored_schedule
from .checks import check_state, check_weights
from .instructions import Combine, Evaluate
from .maps import PerCondition
from .plan import KIND as PLAN
from .plan import Plan
from .run import KIND, OWN, Run
from .storing import tensors_misfit, unpack

__all__ = ["read_plan", "read_run", "unpacked"]


@dataclass(frozen=True)
class _PlanHeader:
    """The header of a plan's file."""

    name: str
    code: list[list[Any]]
    schedule: dict[str, Any]


@dataclass(frozen=True)
class _RunHeader(_PlanHeader):
    """The header of a run's file."""

    prediction: str
    position: int
    seen: int | None = None


def read_plan(path: str | os.PathLike[str], *, schedule: Schedule | None = None) -> Plan:
    """Read a file written by :meth:`Plan.save`; samples are bit-equal to samples of the saved plan.

    Parameters
    ----------
    path : the file.
    schedule : needed only for a schedule not stored in files, such as a schedule from functions.

    Returns
    -------
    The plan.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file, or a file without its schedule.
    MismatchError : the plan is for another schedule than `schedule`.
    """
    tensors, header = read_tensors(path, PLAN, _PlanHeader)
    if problem := tensors_misfit(tensors):
        raise FileFormatError(f"{str(path)!r} is damaged: {problem}.")
    found = stored_schedule(path, header.schedule, tensors, schedule)
    return unpacked(path, found, header.name, header.code, tensors)


def read_run(path: str | os.PathLike[str], *, schedule: Schedule | None = None) -> Run:
    """Read a file written by :meth:`Run.save`; the run waits on the host at the same evaluation.

    Parameters
    ----------
    path : the file.
    schedule : needed only for a schedule not stored in files, such as a schedule from functions.

    Returns
    -------
    The run, on the host; ``run.to(device)`` gives a copy on a device.

    Raises
    ------
    FileFormatError : missing, damaged or foreign file, or a file without its schedule.
    MismatchError : the run is for another schedule than `schedule`.
    """
    tensors, header = read_tensors(path, KIND, _RunHeader)
    own = {name.removeprefix(OWN): v for name, v in tensors.items() if name.startswith(OWN)}
    rest = {name: v for name, v in tensors.items() if not name.startswith(OWN)}
    problem = tensors_misfit(rest)
    if problem is None:
        found = stored_schedule(path, header.schedule, rest, schedule)
        plan = unpacked(path, found, header.name, header.code, rest)
        try:
            return _run(plan, header, own)
        except (LookupError, RuntimeError, ValueError) as error:
            problem = str(error)
    raise FileFormatError(f"{str(path)!r} is damaged: {problem}.")


def _run(plan: Plan, header: _RunHeader, own: dict[str, Tensor]) -> Run:
    values, rows = (
        {int(name.removeprefix(kind)): v for name, v in own.items() if name.startswith(kind)}
        for kind in ("value.", "row.")
    )
    position, code, seen = header.position, plan.code, header.seen
    if header.prediction not in PREDICTIONS:
        raise ValueError(f"it has no prediction type {header.prediction!r}")
    if not 0 <= position <= len(code) or (position < len(code) and not isinstance(code[position], Evaluate)):
        raise ValueError(f"its run waits at no evaluation, but at instruction {position}")
    needed = {j for ins in code[position:] for j in ins.reads if j <= position}
    if position == len(code):
        needed.add(position)
    vectors = [*values.values(), *(own[k] for k in ("state", "output") if seen is not None)]
    if not needed <= values.keys() or len({(v.shape, v.dtype) for v in vectors}) != 1:
        raise ValueError("its vectors are not those that the run needs")
    check_state(vectors[0])
    check_weights(plan, tuple(vectors[0].shape[1:]))
    if {k for k, i in enumerate(code, start=1) if isinstance(i, Combine) and isinstance(i.constant, PerCondition)} != {
        *rows
    }:
        raise ValueError("its constants per condition are not those of the plan")
    shape = vectors[0].shape
    if any(
        v.ndim != len(shape) or any(n not in (1, m) for n, m in zip(v.shape, shape, strict=True)) for v in rows.values()
    ):
        raise ValueError("its constants per condition do not fit its vectors")
    if seen is None:
        return Run(plan, header.prediction, values, rows, position)
    if not 0 < seen <= position or not isinstance(code[seen - 1], Evaluate):
        raise ValueError(f"its last evaluation is {seen!r}")
    return Run(plan, header.prediction, values, rows, position, seen=(seen, own["state"], own["output"]))


def unpacked(
    path: str | os.PathLike[str], schedule: Schedule, name: str, code: list[list[Any]], tensors: Mapping[str, Tensor]
) -> Plan:
    """The plan made of instructions and tensors from a file.

    Raises
    ------
    FileFormatError : the parts make no valid plan.
    """
    try:
        return Plan(schedule, *unpack(code, tensors), name)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} holds no valid plan: {error}") from error
