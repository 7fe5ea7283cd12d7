"""The base class of solvers and their registry."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, TypeAlias, TypeVar

from torch import Tensor

from .. import _torchdiffeq
from ..checks import check_flag, check_whole
from ..errors import GridError, InputError, PlanError, UnknownNameError, unknown_name
from ..plan import Past, Plan, trace
from ..schedules import Schedule

__all__ = [
    "Solver",
    "SolverLike",
    "as_solver",
    "get_solver",
    "is_registered",
    "register",
    "same_solver",
    "shared_solver",
    "solver_names",
    "unknown_solver",
]


class Solver(ABC):
    """A fixed-grid solver: the mathematics of one step.

    A subclass has the attribute ``order`` and the method :meth:`step`. A subclass has no loop, no history on ``self`` and no
    device code; its options are fields of a frozen dataclass. `step` runs on symbolic vectors to make a plan, and also runs on
    tensors.
    """

    order: int
    """Global order on smooth problems, start-up steps excluded, as measured by the conformance tests. A class attribute, or a
    property where the order depends on options."""

    consistent: ClassVar[bool] = True
    """Whether a plan is checked for consistency. Set False for a method that is consistent in other variables only."""

    aliases: ClassVar[tuple[str, ...]] = ()
    name: str = ""

    @property
    def irregular_order(self) -> int:
        """Global order on grids whose step lengths do not become equal as the grid is refined; by default the order.

        A method with the weights of equal steps has its order on smooth grids only, and overrides this attribute.
        """
        return self.order

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __eq__(self, other: object) -> bool:
        """Solvers of one class without instance attributes are equal; a dataclass compares its options."""
        return self is other or (type(self) is type(other) and not vars(self) and not vars(other))

    def __hash__(self) -> int:
        return id(self) if vars(self) else hash(type(self))

    @property
    def label(self) -> str:
        """The registered name of the solver with its options; without such a name, the class name with all changed options."""
        cls, given = type(self), self.options()
        for key, entry in _REGISTRY.items():
            if entry.kind is cls and entry.all_options() == given:
                return key
        changed = ", ".join(f"{k}={v!r}" for k, v in given.items() if v != _defaults(cls).get(k))
        return f"{self.name}({changed})" if changed else self.name

    @abstractmethod
    def step(self, ode: Any, x: Any, t: float, s: float, past: Past) -> Any:
        """The state at time s from the state x at time t.

        Parameters
        ----------
        ode : evaluates the model: ``ode.velocity(x, t)``, ``.data``, ``.noise``, ``.score``, ``.v``, or
            ``ode.evaluate(x, t)`` to read one evaluation in several forms. ``ode.schedule`` has alpha, sigma and lam;
            ``ode.is_data(s)`` is True if sigma = 0 at s, where the model must not be evaluated; ``ode.hold(y)`` stores a
            combination as one vector.
        x : the state at t; supports ``+``, ``-`` and multiplication by a number.
        t, s : the interval.
        past : the memory of the previous step, and the position of the step in the grid.

        Returns
        -------
        The state at s, or a pair (state, memory) with a tuple `memory`, which the next step reads as ``past.memory``.
        """

    def plan(self, schedule: Schedule, grid: Tensor) -> Plan:
        """The plan of the solver on a schedule and a grid; see :func:`iia_ode.plan.trace`.

        Parameters
        ----------
        schedule : the noise schedule.
        grid : times from the initial state to the final state, float64 [N + 1].

        Returns
        -------
        The plan.

        Raises
        ------
        GridError : the grid is not usable.
        PlanError : the step is not linear in its vectors, or is not consistent.
        """
        return trace(self, schedule, grid)

    def grid_for(self, nfe: int, make_grid: Callable[[int], Tensor], schedule: Schedule) -> Tensor:
        """Find the grid on which the solver makes exactly `nfe` evaluations.

        Parameters
        ----------
        nfe : number of evaluations.
        make_grid : maps a number of levels to a grid, such as ``grids.karras``.
        schedule : noise schedule of the count.

        Returns
        -------
        The grid, float64 [N + 1].

        Raises
        ------
        GridError : no number of levels has this count; the message names the nearest counts.
        """
        nfe = check_whole("nfe, the number of evaluations,", nfe, least=1, such_as=10, error=GridError)

        def count(n: int) -> int:
            grid = make_grid(n)
            return trace(self, schedule, grid, consistent=False).nfe if len(grid) > 1 else 0

        # Every level costs at least one evaluation, except one level at either end (a grid that stops above the data, a first
        # step without an evaluation), so bisection finds the first count that is large enough.
        low, high = 0, nfe + 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if count(middle) >= nfe else (middle, high)
        if count(high) == nfe:
            return make_grid(high)
        near = [c for c in (count(low) if low else 0, count(high)) if c]
        raise GridError(f"{self.label} cannot make exactly {nfe} evaluations on this family of grids; near it: {near}.")

    def options(self) -> dict[str, Any]:
        """The options of the instance, JSON-ready; ``get_solver(solver.name, **solver.options())`` is an equal solver."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)} if is_dataclass(self) else {}


SolverLike: TypeAlias = str | Solver | Mapping[str, Any]
"""A registered name, a solver, or a mapping ``{"name": ..., "options": ...}`` as in :meth:`Solver.options`."""


def as_solver(value: SolverLike) -> Solver:
    """The solver of a name, an instance or a mapping.

    Raises
    ------
    InputError : `value` is none of the three.
    UnknownNameError : no such solver or option.
    """
    if isinstance(value, Solver):
        return value
    if isinstance(value, str):
        return get_solver(value)
    if isinstance(value, Mapping) and set(value) <= {"name", "options"} and isinstance(value.get("name"), str):
        options = value.get("options", {})
        if isinstance(options, Mapping) and all(isinstance(key, str) for key in options):
            return get_solver(value["name"], **options)
    raise InputError(f"expected the name of a registered solver or a Solver such as get_solver('heun'), got {value!r}.")


def _plain(value: Any) -> Any:
    """An option as it comes back from JSON."""
    if isinstance(value, Solver):
        return {"name": value.name, "options": value.options()}
    if isinstance(value, Real) and not isinstance(value, bool | int | float):  # NumPy's
        return int(value) if isinstance(value, Integral) else float(value)
    return list(value) if isinstance(value, tuple) else value


def _defaults(cls: type[Solver]) -> dict[str, Any]:
    return {f.name: _plain(f.default) for f in fields(cls)} if is_dataclass(cls) else {}


@dataclass(frozen=True)
class _Entry:
    kind: type[Solver]
    options: Mapping[str, Any]

    def all_options(self) -> dict[str, Any]:
        return {**_defaults(self.kind), **self.options}


_REGISTRY: dict[str, _Entry] = {}
S = TypeVar("S", bound=type[Solver])


def register(name: str, *aliases: str, variants: Mapping[str, Mapping[str, Any]] | None = None) -> Callable[[S], S]:
    """Class decorator: make a :class:`Solver` available by name in every function with a solver as argument.

    Running the same definition again, as in a notebook, replaces the class. A name that belongs to another class is an error.

    Parameters
    ----------
    name : of the class with its default options.
    aliases : further names for the default options.
    variants : names for other options, such as ``{"lms2": {"max_order": 2}}``.

    Returns
    -------
    The decorator, which returns the class.

    Raises
    ------
    PlanError : the class is no Solver, or has no ``order``.
    InputError : a name is taken by another class.
    UnknownNameError : a variant sets an unknown option.
    """

    def decorate(cls: S) -> S:
        if not (isinstance(cls, type) and issubclass(cls, Solver)):
            raise PlanError(f"@register({name!r}) takes a class that derives from iia_ode.Solver, got {cls!r}.")
        order = getattr(cls, "order", None)
        if not isinstance(order, property):
            check_whole(f"attribute `order` of {cls.__name__}", order, least=1, error=PlanError)
        for key in (name, *aliases, *(variants or {})):
            if not isinstance(key, str) or not key:
                raise InputError(f"a solver is registered under names, such as 'heun'; got {key!r}.")
        entries = {key: _Entry(cls, {}) for key in (name, *aliases)}
        entries |= {key: _Entry(cls, dict(options)) for key, options in (variants or {}).items()}
        for key, entry in entries.items():
            holder = _REGISTRY.get(key)
            same = holder and (holder.kind.__module__, holder.kind.__qualname__) == (cls.__module__, cls.__qualname__)
            if holder is not None and not same:
                raise InputError(
                    f"the solver name {key!r} is taken by {holder.kind.__module__}.{holder.kind.__qualname__}."
                )
            _check_options(key, cls, entry.options)
        cls.name, cls.aliases = name, aliases
        _REGISTRY.update(entries)
        return cls

    return decorate


def _check_options(name: str, cls: type[Solver], options: Mapping[str, Any]) -> None:
    known: list[str] = [f.name for f in fields(cls)] if is_dataclass(cls) else []
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known or ["(none)"])


def get_solver(name: str, **options: Any) -> Solver:
    """A new instance of a registered solver.

    Parameters
    ----------
    name : a registered name, an alias or a variant.
    options : fields of the solver's class; they replace the options of a variant.

    Returns
    -------
    The solver.

    Raises
    ------
    UnknownNameError : no such solver or option; the message lists the known names, nearest first.
    InputError : an option has an invalid value.
    """
    if not is_registered(name):
        raise unknown_solver(name)
    entry = _REGISTRY[name]
    _check_options(name, entry.kind, options)
    return entry.kind(**{**entry.options, **options})


def shared_solver(name: str) -> Solver:
    """The registered solver without further options: one instance for all callers if its class is of this library.

    These classes are immutable, and plans are found faster for a solver in memory.
    """
    entry = _REGISTRY.get(name)
    known = _SHARED.get(name)
    if known is not None and known[0] is entry:
        return known[1]
    made = get_solver(name)
    if entry is not None and entry.kind.__module__.startswith(f"{__package__}."):
        _SHARED[name] = entry, made
    return made


_SHARED: dict[str, tuple[_Entry, Solver]] = {}


def is_registered(name: object) -> bool:
    """Whether `name` is a registered name, an alias or a variant."""
    return isinstance(name, str) and name in _REGISTRY


def solver_names(torchdiffeq: bool = False) -> list[str]:
    """The names of the registered solvers, sorted: variants are included, aliases are not.

    Parameters
    ----------
    torchdiffeq : list the methods of the installed torchdiffeq instead. These names are valid in :func:`iia_ode.sample` and
        :func:`iia_ode.odeint`.

    Returns
    -------
    The names.

    Raises
    ------
    InputError : `torchdiffeq` is not True or False.
    """
    check_flag("torchdiffeq", torchdiffeq)
    if torchdiffeq:
        return _torchdiffeq.method_names()
    return sorted(key for key in _REGISTRY if same_solver(key)[0] == key)


def unknown_solver(name: object, also: Iterable[str] = ()) -> UnknownNameError:
    """The error for an unregistered name, with an explanation for files, methods of torchdiffeq and stochastic samplers.

    Parameters
    ----------
    name : the unknown name.
    also : further valid names.
    """
    return unknown_name("solver", name, [*_REGISTRY, *also], _hint(str(name)))


def _hint(name: str) -> str:
    if name.endswith((".safetensors", ".iia")):
        return f"A solver in a file is read by iia_ode.load({name!r})."
    method = name.removeprefix("torchdiffeq:")
    if method in _torchdiffeq.method_names():
        return (
            f"{method!r} is a method of torchdiffeq, and not a Solver: pass its name, as in "
            f"iia_ode.sample(ode, x, grid, {name!r}) or iia_ode.odeint(ode, x, grid, method={name!r})."
        )
    rest, found = _NOISY.subn("", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).lower())
    if not found:
        return ""
    kind = re.sub(r"_+", "_", _KINDS.sub("", rest)).strip("_")
    near = _NEAREST.get(kind) or next(iter(difflib.get_close_matches(kind, _REGISTRY, n=1, cutoff=0.75)), "ddim")
    return (
        f"{name!r} injects noise; iia_ode solves the probability-flow ODE, which is deterministic. The nearest solver is "
        f"{near!r}."
    )


# Names of k-diffusion and diffusers: euler_ancestral, dpmpp_2m_sde, euler_a, EulerAncestralDiscreteScheduler, ddpm, ...
_NOISY = re.compile(
    r"ancestral|(?<![a-z])sde(?![a-z])|_a$|churn|stochastic|ddpm|(?<![a-z])lcm|seeds|(?<![a-z])sa_solver"
)
_KINDS = re.compile(r"sample_|k_|_?discrete|_?scheduler|_?sampler|_gpu")
_NEAREST = {
    "": "ddim",
    "dpmpp": "dpmpp_2s",
    "dpm_solver": "dpmpp_2s",
    "dpm_solver_multistep": "dpmpp_2m",
    "dpm_2": "dpm2",
}
_NEAREST |= {"kdpm2": "dpm2"}


def same_solver(name: str) -> list[str]:
    """All names of a registered solver, its name in :func:`solver_names` first.

    Raises
    ------
    UnknownNameError : no such solver.
    """
    if name not in _REGISTRY:
        raise unknown_solver(name)
    entry = _REGISTRY[name]
    wanted = entry.all_options()
    return [key for key, other in _REGISTRY.items() if other.kind is entry.kind and other.all_options() == wanted]
