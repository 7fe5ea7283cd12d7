"""The layout of a fitted solver's file: a plan as JSON and tensors, and what its header has to hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import Combine, Evaluate, Plan, Projections
from ..plan.storing import SHARED, restore, store
from ..plan.vectors import is_number
from ..schedules import Schedule

__all__ = ["SCHEMA", "misfit", "pack", "unpack"]

_F64 = torch.float64

# What a file's header holds: a dict has these keys, a list has entries like its only one, anything else is of that type.
_NUMBER = int | float
_MAYBE = int | float | None
SCHEMA: dict[str, Any] = {
    "name": str,
    "code": [list],
    "about": {
        "base": {"name": str, "options": dict},
        "terms": str,
        "target": {"name": str},
        "history": int,
        "ridge": _NUMBER | str,
        "guard": bool,
        "intercept": bool,
        "schedule": {"type": str},
        "prediction": str,
        "guidance_scale": _NUMBER,
        "conditioning": dict,
        "state_shape": [int],
        "state_dtype": str,
        "batch": int,
        "held_out": int,
        "endpoint": {"base": _MAYBE, "fit": _MAYBE, "fell_back": bool, "reference": str, "why": str},
        "teacher": dict | None,
        "seed": int | None,
        "fingerprint": str,
        "evaluations": int,
        "sample_evaluations": int,
    },
    "reports": [
        {
            **dict.fromkeys(("t", "s", "before", "after", "condition", "ridge", "intercept"), _NUMBER),
            **dict.fromkeys(("held_before", "held_after"), _MAYBE),
            **dict.fromkeys(("index", "rank"), int),
            **{key: [_NUMBER] for key in ("values", "base_values", "corrections")},
            "symbols": [str],
            "accepted": bool,
        }
    ],
}


def misfit(value: Any, pattern: Any, where: str) -> str | None:
    """Where a JSON value first departs from its pattern (see SCHEMA), in words."""
    kind: Any = type(pattern) if isinstance(pattern, dict | list) else pattern
    if not isinstance(value, kind):
        return f"{where} is {value!r}"
    parts: list[str | None] = []
    if isinstance(pattern, dict):
        if missing := sorted(pattern.keys() - value.keys()):
            return f"{where} lacks {', '.join(missing)}"
        parts = [misfit(value[k], p, f"{where}.{k}") for k, p in pattern.items()]
    elif isinstance(pattern, list):
        parts = [misfit(v, pattern[0], f"{where}[{k}]") for k, v in enumerate(value)]
    return next(filter(None, parts), None)


def pack(plan: Plan) -> tuple[list[list[Any]], dict[str, Tensor]]:
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
            code[-1].append(odd)  # what is neither a number nor a tensor
    for name, numbers in (("grid", plan.grid), ("times", times), ("weights", weights)):
        tensors[name] = torch.tensor(numbers, dtype=_F64, device="cpu")
    return code, tensors


def unpack(schedule: Schedule, name: str, code: list[list[Any]], tensors: dict[str, Tensor]) -> Plan:
    """The plan that :func:`pack` took apart; every number and tensor has to find its place."""
    rest = {key: v for key, v in tensors.items() if not key.startswith(SHARED)}
    known: dict[str, Projections] = {}
    grid = rest.pop("grid")
    weights, times = (iter(rest.pop(key).tolist()) for key in ("weights", "times"))
    instructions: list[Evaluate | Combine] = []
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
    return Plan(schedule, tuple(grid.tolist()), tuple(instructions), name)


def _fits(indices: list[Any], odd: list[Any]) -> bool:
    return all(isinstance(j, int) for j in indices) and all(isinstance(o, dict) for o in odd) and len(odd) <= 1


def _keys(k: int, indices: list[int]) -> list[str]:
    """The names of the tensors that instruction k may have of its own."""
    return [*(f"weight.{k}.{j}" for j in indices), f"constant.{k}"]
