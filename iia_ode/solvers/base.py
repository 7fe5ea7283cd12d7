"""The base class of solvers and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..errors import GridError, InputError, PlanError, unknown_name
from ..plan import Past, Plan, trace
from ..schedules import Schedule

__all__ = ["Solver", "get_solver", "register", "solver_names"]


class Solver(ABC):
    """A fixed-grid solver: its mathematics, and nothing else.

    A subclass gives the attribute ``order`` and the method :meth:`step`. It has no loop, no history on ``self`` and no
    device code; options are fields of a frozen dataclass. `step` runs on symbolic vectors to make a plan, and would run
    on tensors as it stands.
    """

    order: ClassVar[int]
    """Global order on smooth problems; what the conformance tests measure."""

    consistent: ClassVar[bool] = True
    """Whether a plan is checked for consistency; set False where a method is so only in variables of its own."""

    aliases: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    @abstractmethod
    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The state at time s from the state x at time t.

        Parameters
        ----------
        ode : evaluates the model: ``ode.velocity(x, t)``, ``.data``, ``.noise``, ``.score``, ``.v``, or
            ``ode.evaluate(x, t)`` to read one evaluation in several forms; ``ode.schedule`` has alpha, sigma and lam;
            ``ode.is_data(s)`` says whether sigma = 0 at s, where the model must not be evaluated; ``ode.hold(y)`` stores a
            combination as one vector.
        x : the state; supports ``+``, ``-`` and multiplication by a number.
        t, s : the interval.
        past : what the previous step remembered, and this step's place in the grid.

        Returns
        -------
        The new state, or a pair (state, memory): memory is a tuple that the next step finds as ``past.memory``.
        """

    def plan(self, schedule: Schedule, grid: Tensor) -> Plan:
        """This solver on a schedule and a grid; see :func:`iia_ode.trace`."""
        return trace(self, schedule, grid)

    def grid_for(self, nfe: int, make_grid: Callable[[int], Tensor], schedule: Schedule) -> Tensor:
        """The grid on which this solver makes exactly `nfe` evaluations.

        Parameters
        ----------
        nfe : evaluations wanted.
        make_grid : from a number of levels to a grid, such as ``grids.karras``.
        schedule : on which to count.

        Raises
        ------
        GridError : no number of levels gives that count; names the nearest counts that exist.
        """
        if not isinstance(nfe, int) or nfe < 1:
            raise GridError(f"the number of evaluations must be a positive whole number, got {nfe!r}.")

        def count(n: int) -> int:
            grid = make_grid(n)
            return trace(self, schedule, grid, consistent=False).nfe if len(grid) > 1 else 0

        # Every level costs at least an evaluation, so the first count that is large enough is found by bisection.
        low, high = 0, nfe + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if count(middle) >= nfe else (middle, high)
        if count(high) == nfe:
            return make_grid(high)
        near = [c for c in (count(low) if low else 0, count(high)) if c]
        raise GridError(f"{self.name} cannot make exactly {nfe} evaluations on this family of grids; near it: {near}.")

    def options(self) -> dict[str, Any]:
        """The options of this instance, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in fields(self)} if is_dataclass(self) else {}


_REGISTRY: dict[str, type[Solver]] = {}
S = TypeVar("S", bound=type[Solver])


def register(name: str, *aliases: str) -> Callable[[S], S]:
    """Class decorator: make a :class:`Solver` available by name everywhere that takes a solver.

    Running the same definition again (a notebook cell) replaces it; taking a name that another class has is an error.

    Raises
    ------
    PlanError : not a Solver subclass, or without an integer ``order``.
    InputError : the name is taken by another class.
    """

    def decorate(cls: S) -> S:
        if not (isinstance(cls, type) and issubclass(cls, Solver)):
            raise PlanError(f"@register({name!r}) takes a class that derives from iia_ode.Solver, got {cls!r}.")
        if not isinstance(getattr(cls, "order", None), int):
            raise PlanError(f"{cls.__name__} needs an integer class attribute `order`: the order its users may expect.")
        for key in (name, *aliases):
            holder = _REGISTRY.get(key)
            if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
                raise InputError(f"the solver name {key!r} is taken by {holder.__module__}.{holder.__qualname__}.")
        cls.name, cls.aliases = name, aliases
        for key in (name, *aliases):
            _REGISTRY[key] = cls
        return cls

    return decorate


def get_solver(name: str, **options: Any) -> Solver:
    """A new instance of the registered solver of that name.

    Raises
    ------
    UnknownNameError : no such solver, or no such option; lists what there is.
    """
    if name not in _REGISTRY:
        raise unknown_name("solver", name, _REGISTRY)
    cls = _REGISTRY[name]
    known: list[str] = [f.name for f in fields(cls)] if is_dataclass(cls) else []
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known or ["(none)"])
    return cls(**options)


def solver_names() -> list[str]:
    """Registered names, without aliases, sorted."""
    return sorted({cls.name for cls in _REGISTRY.values()})
