"""The two instructions of a plan, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ..schedules import Schedule
from .projections import Cache, place
from .vectors import Constant, Weight, combine

__all__ = ["Combine", "Evaluate", "Instruction", "Program", "run_code"]


@dataclass(frozen=True)
class Evaluate:
    """One model output, in the form the solver chose, at the state that is vector `state` and at time `t`."""

    state: int
    t: float
    form: str

    @property
    def reads(self) -> tuple[int, ...]:
        """Indices of the vectors it needs."""
        return (self.state,)


@dataclass(frozen=True, eq=False)
class Combine:
    """One new state vector, ``sum_j w_j v_j + constant``; `step` is k where it is the state at grid point k.

    A weight is a number, a tensor that broadcasts against one sample or a `LinearMap`; a constant is such a tensor or a
    `PerCondition`.
    """

    terms: tuple[tuple[int, Any], ...]  # of Weight
    constant: Any = None  # Constant | None
    step: int | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """Indices of the vectors it needs."""
        return tuple(index for index, _ in self.terms)

    def on(self, like: Tensor) -> tuple[tuple[tuple[int, Weight], ...], Constant | None]:
        """Terms and constant with their tensors in the dtype and on the device of `like`, copied there once."""
        if not self._tensors:
            return self.terms, self.constant
        copies = iter(place(self._placed, self._tensors, like.device, like.dtype))
        terms = tuple((j, next(copies) if isinstance(w, Tensor) else w) for j, w in self.terms)
        return terms, next(copies) if isinstance(self.constant, Tensor) else self.constant

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(v for v in (*(w for _, w in self.terms), self.constant) if isinstance(v, Tensor))

    @cached_property
    def _placed(self) -> Cache:
        return {}


Instruction: TypeAlias = Evaluate | Combine


class Program(Protocol):
    """The part of a :class:`~iia_ode.Plan` that analysis, files and runs read."""

    @property
    def name(self) -> str:
        """The solver's name."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""

    @property
    def grid(self) -> tuple[float, ...]:
        """The times, from the initial state to the final one."""

    @property
    def code(self) -> tuple[Instruction, ...]:
        """The instructions."""

    @property
    def evaluation_times(self) -> tuple[float, ...]:
        """The times of the evaluations, in order."""


def run_code(
    code: tuple[Instruction, ...] | list[Instruction],
    values: dict[int, Tensor],
    evaluate: Callable[[Tensor, float, str], Tensor],
    *,
    start: int = 0,
    last_use: tuple[int, ...] | None = None,
) -> Iterator[tuple[int, Instruction]]:
    """The one loop of the library: run ``code[start:]`` on `values` in place, yielding after each instruction.

    `values` maps vector indices to tensors. With `last_use`, a vector is dropped after the instruction that reads it last.
    Nothing here reads a value back from the device.
    """
    like = values[min(values)]
    for k, ins in enumerate(code[start:], start=start + 1):
        if isinstance(ins, Evaluate):
            values[k] = evaluate(values[ins.state], ins.t, ins.form)
        else:
            values[k] = combine(*ins.on(like), values.__getitem__, like)
        yield k, ins
        if last_use is not None:
            for j in {*ins.reads, k}:
                if last_use[j] == k and k < len(code):
                    del values[j]
