"""The lines of a comparison: solvers and families of grids under distinct names, and the cells that each can fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import GridError, InputError, unknown_name
from ..grids import GRIDS
from ..iia import IIA, PRESETS, FittedSolver, preset
from ..plan import Plan
from ..schedules import Schedule
from ..solvers import Solver, SolverLike, as_solver, is_registered, unknown_solver

__all__ = ["RECIPE", "Families", "Family", "Line", "Method", "Solvers", "families_of", "grid_of", "lines_of"]

RECIPE = "iia"
"""Name of the solver found by :func:`iia_ode.fit`, among the solvers of a comparison."""

Method: TypeAlias = Solver | IIA | FittedSolver | Plan | None
"""A solver, a fit to be made, a solver with a grid of its own, or None for the solver found by :func:`iia_ode.fit`."""

OneSolver: TypeAlias = SolverLike | IIA | FittedSolver | Plan
Solvers: TypeAlias = OneSolver | Sequence[OneSolver] | Mapping[str, OneSolver]

Family: TypeAlias = Callable[[int], Tensor]
Families: TypeAlias = str | Family | Sequence[str | Family] | Mapping[str, str | Family]


@dataclass(frozen=True)
class Line:
    """A line of a comparison.

    Attributes
    ----------
    name : distinct name.
    method : solver of the line.
    family : name of the family of grids; ``""`` for a method with a grid of its own.
    solver : name of the solver, without the family.
    """

    name: str
    method: Method
    family: str
    solver: str


def lines_of(solvers: Solvers, families: Iterable[str], target: str) -> list[Line]:
    """Make the lines: each solver on each family of grids, and each solver with a grid of its own once.

    Parameters
    ----------
    solvers : solvers of the comparison.
    families : names of the families.
    target : target of presets given by name.

    Raises
    ------
    UnknownNameError : no such solver or preset.
    InputError : an entry is no solver, there is no entry, or two entries have the same name.
    """
    families, lines = list(families), []
    for name, method in _named(solvers, target):
        if method is None or isinstance(method, FittedSolver | Plan):
            lines.append(Line(name, method, "", name))
        elif len(families) == 1:
            lines.append(Line(name, method, families[0], name))
        else:
            lines += [Line(f"{name} on {family}", method, family, name) for family in families]
    twice = [line.name for k, line in enumerate(lines) if line.name in [other.name for other in lines[:k]]]
    if twice:
        raise InputError(
            f"two solvers are called {twice[0]!r}: give solvers={{name: solver, ...}} with a name of your own for each."
        )
    return lines


def _named(solvers: Solvers, target: str) -> list[tuple[str, Method]]:
    """Pair each solver of the comparison with its name. A name given twice counts once."""
    pairs: list[tuple[str, Method]] = []
    if isinstance(solvers, Mapping) and not _is_spec(solvers):
        pairs = [(str(name), _method(value, target)) for name, value in solvers.items()]
    elif isinstance(solvers, str | Solver | IIA | FittedSolver | Plan | Mapping):
        pairs = [_pair(solvers, target)]
    elif isinstance(solvers, Iterable):
        values = list(solvers)
        pairs = [_pair(v, target) for k, v in enumerate(values) if not isinstance(v, str) or v not in values[:k]]
    else:
        raise InputError(f"solvers must be a list of names or solvers, or a mapping from names, got {solvers!r}.")
    if not pairs:
        raise InputError("compare needs at least one solver, such as solvers=['ddim', 'heun'].")
    return pairs


def _is_spec(value: object) -> bool:
    """Whether the value is a solver as a mapping, ``{"name": ..., "options": ...}``."""
    return isinstance(value, Mapping) and "name" in value and set(value) <= {"name", "options"}


def _pair(value: OneSolver, target: str) -> tuple[str, Method]:
    method = _method(value, target)
    if isinstance(value, str):
        return value, method
    if isinstance(method, FittedSolver | Plan):
        return method.name, method
    if isinstance(method, IIA):
        return method.name or f"iia({method.base_solver.label})", method
    return (RECIPE if method is None else method.label), method


def _method(value: OneSolver, target: str) -> Method:
    """The solver of an entry. A preset given by name gets the target."""
    if isinstance(value, IIA | FittedSolver | Plan | Solver):
        return value
    if isinstance(value, str):
        if value == RECIPE:
            return None
        if value in PRESETS:
            return preset(value, target=target)
        if not is_registered(value):
            raise unknown_solver(value, [*PRESETS, RECIPE])
    return as_solver(value)


# ---- grids -----------------------------------------------------------------------------------------------------------


def families_of(
    grids: Families, schedule: Schedule, sigma_min: float | None, sigma_max: float | None
) -> dict[str, Family]:
    """Make the families of grids by name.

    Parameters
    ----------
    grids : names of :data:`iia_ode.grids.GRIDS`, functions from a number of levels to a grid, or a mapping from names to such
        entries.
    schedule : noise schedule of the named families.
    sigma_min, sigma_max : levels sigma/alpha of the named families; by default the levels of each family.

    Raises
    ------
    UnknownNameError : no such family.
    GridError : an entry is no family.
    InputError : two families have the same name, or there is no family.
    """
    if isinstance(grids, Mapping):
        pairs = [(str(name), value) for name, value in grids.items()]
    else:
        several = isinstance(grids, Sequence) and not isinstance(grids, str)
        values: list[Any] = list(grids) if several else [grids]  # type: ignore[arg-type]
        pairs = [(value if isinstance(value, str) else _name_of(value), value) for value in values]
    if not pairs:
        raise InputError("compare needs at least one family of grids, such as grids='karras'.")
    if len(dict(pairs)) < len(pairs):
        raise InputError("two families of grids have one name: give grids={name: family, ...} with a name for each.")
    levels = {k: v for k, v in (("sigma_min", sigma_min), ("sigma_max", sigma_max)) if v is not None}
    return {name: _family(value, schedule, levels) for name, value in pairs}


def _name_of(family: object) -> str:
    """The name of a function; for a partial function, also its keywords other than schedule and levels."""
    if isinstance(family, partial):
        own = [f"{k}={v}" for k, v in family.keywords.items() if k not in ("schedule", "sigma_min", "sigma_max")]
        return _name_of(family.func) + (f"({', '.join(own)})" if own else "")
    return getattr(family, "__name__", type(family).__name__)


def _family(value: object, schedule: Schedule, levels: Mapping[str, float]) -> Family:
    if isinstance(value, str):
        if value not in GRIDS:
            raise unknown_name("family of grids", value, GRIDS)
        return partial(GRIDS[value], schedule=schedule, **levels)
    if isinstance(value, Tensor) or not callable(value):
        raise GridError(
            "a comparison makes a grid for each number of evaluations: give the name of a family, such as 'karras', or a "
            f"function from a number of levels to a grid, not {type(value).__name__}."
        )
    return value


def grid_of(line: Line, nfe: int, families: Mapping[str, Family], schedule: Schedule) -> Tensor | None:
    """Make the grid on which a line makes `nfe` evaluations, float64 [N + 1]; None for :func:`iia_ode.fit`.

    Raises
    ------
    GridError : no grid gives exactly this number.
    """
    method = line.method
    if method is None:
        return None
    if isinstance(method, FittedSolver | Plan):
        if method.nfe != nfe:
            raise GridError(f"{line.name} makes {method.nfe} evaluations, not {nfe}.")
        plan = method if isinstance(method, Plan) else method.plan
        return torch.tensor(plan.grid, dtype=torch.float64, device="cpu")
    base = method.base_solver if isinstance(method, IIA) else method
    return base.grid_for(nfe, families[line.family], schedule)
