"""A plan as JSON and tensors, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..schedules.stored import TABLE, schedule_tensors
from .instructions import Combine, Evaluate, Instruction, Program
from .maps import LinearMap, PerCondition, projections_from
from .projections import Projections
from .vectors import is_number

__all__ = ["SHARED", "pack", "restore", "store", "tensors_misfit", "unpack"]

SHARED = "projections."
"""Beginning of the names of tensors shared by several weights."""
_F64 = torch.float64


def tensors_misfit(tensors: Mapping[str, Tensor]) -> str | None:
    """A description of the defect in the tensors of a plan, or None; the instructions are not looked at."""
    for name in ("grid", "times", "weights"):
        if name not in tensors or tensors[name].ndim != 1:
            return f"its tensor {name!r} is missing or not 1-dimensional"
    return "a tensor is not float64" if any(v.dtype != _F64 for v in tensors.values()) else None


def pack(plan: Program) -> tuple[list[list[Any]], dict[str, Tensor]]:
    """A plan as a JSON-ready list of instructions, and tensors: numbers in the order of use, odd ones by their place."""
    code: list[list[Any]] = []
    weights: list[float] = []
    times: list[float] = []
    tensors: dict[str, Tensor] = {}
    for k, ins in enumerate(plan.code, start=1):
        if isinstance(ins, Evaluate):
            code.append(["evaluate", ins.state, ins.form])
            times.append(ins.t)
            continue
        code.append(["combine", [j for j, _ in ins.terms], ins.step])
        weights += [w for _, w in ins.terms if is_number(w)]
        values: dict[str, Any] = {f"weight.{k}.{j}": w for j, w in ins.terms if not is_number(w)}
        values |= {} if ins.constant is None else {f"constant.{k}": ins.constant}
        stored = {key: store(value, key) for key, value in values.items()}
        tensors |= {name: v for _, parts in stored.values() for name, v in parts.items()}
        if odd := {key: about for key, (about, _) in stored.items() if about is not None}:
            code[-1].append(odd)  # maps and constants per condition
    for name, numbers in (("grid", plan.grid), ("times", times), ("weights", weights)):
        tensors[name] = torch.tensor(numbers, dtype=_F64, device="cpu")
    return code, tensors | schedule_tensors(plan.schedule)


def unpack(code: list[list[Any]], tensors: Mapping[str, Tensor]) -> tuple[tuple[float, ...], tuple[Instruction, ...]]:
    """The grid and the instructions, from the output of :func:`pack`.

    Raises
    ------
    ValueError, LookupError, TypeError : a number or tensor is missing, left over, or of the wrong kind.
    """
    rest = {key: v for key, v in tensors.items() if not key.startswith(SHARED) and key != TABLE}
    known: dict[str, Projections] = {}
    grid = rest.pop("grid")
    weights, times = (iter(rest.pop(key).tolist()) for key in ("weights", "times"))
    instructions: list[Instruction] = []
    try:
        for k, item in enumerate(code, start=1):
            match item:
                case ["evaluate", int(state), str(form)]:
                    instructions.append(Evaluate(state, next(times), form))
                case ["combine", [*indices], int() | None as step, *odd] if _fits(indices, odd):
                    about = odd[0] if odd else {}
                    own = [key for key in _keys(k, indices) if rest.pop(key, None) is not None]
                    values = {key: restore(about.get(key), key, tensors, known) for key in own}
                    terms = [
                        (j, values[key] if (key := f"weight.{k}.{j}") in values else next(weights)) for j in indices
                    ]
                    instructions.append(Combine(tuple(terms), values.get(f"constant.{k}"), step))
                case _:
                    raise ValueError(f"instruction {k} is {item!r}.")
    except StopIteration as error:
        raise ValueError("it has fewer weights or times than its instructions need.") from error
    surplus = [key for key, numbers in (("weights", weights), ("times", times)) if next(numbers, None) is not None]
    if surplus := [*surplus, *rest]:
        raise ValueError(f"its instructions do not use all of {', '.join(surplus)}.")
    return tuple(grid.tolist()), tuple(instructions)


def _fits(indices: list[Any], odd: list[Any]) -> bool:
    return all(isinstance(j, int) for j in indices) and all(isinstance(o, dict) for o in odd) and len(odd) <= 1


def _keys(k: int, indices: list[int]) -> list[str]:
    """Possible names of the tensors of instruction k."""
    return [*(f"weight.{k}.{j}" for j in indices), f"constant.{k}"]


# ---- weights and constants with several numbers ----------------------------------------------------------------


def store(value: Tensor | LinearMap | PerCondition, key: str) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """A value as a description in JSON (None for a tensor) and float64 tensors.

    The value's own tensor is called `key`. Tensors of projections are named by digest: maps over equal projections share
    stored tensors.
    """
    if isinstance(value, LinearMap):
        p = value.projections
        shared = {f"{SHARED}{p.digest}.{name}": v for name, v in p.tensors().items()}
        return {"map": p.config(), "digest": p.digest}, {key: value.coefficients.detach(), **shared}
    if isinstance(value, PerCondition):
        return {"per": value.key, "values": list(value.values)}, {key: value.table.detach()}
    return None, {key: value.detach().double()}


def restore(
    about: Mapping[str, Any] | None, key: str, tensors: Mapping[str, Tensor], known: dict[str, Projections]
) -> Any:
    """The tensor, map or `PerCondition`, from the output of :func:`store`.

    `known` collects projections by digest, for the maps of one file to share.

    Raises
    ------
    InputError : a part is missing or was changed.
    """
    try:
        if about is None:
            return tensors[key]
        if ("per" in about) != key.startswith("constant."):
            raise InputError(f"{key} is neither a map nor a constant per condition.")
        if "per" in about:
            return PerCondition(about["per"], tuple(about["values"]), tensors[key])
        digest = about["digest"]
        if digest not in known:
            start = f"{SHARED}{digest}."
            found = projections_from(
                about["map"], {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            )
            if found.digest != digest:
                raise InputError(f"the projections {digest} of {key} are not what they were.")
            known[digest] = found
        return LinearMap(known[digest], tensors[key])
    except (KeyError, TypeError) as error:
        raise InputError(f"{key} is incomplete: {error!r}.") from error
