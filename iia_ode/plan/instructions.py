"""Evaluate and Combine, the two instructions of a plan, and the loops over instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ..bounded import Bounded
from ..schedules import Schedule
from ..transforms import kept_property, may_write
from .projections import PLACES, Cache, place
from .vectors import Constant, Sum, Weight

__all__ = [
    "Combine",
    "Evaluate",
    "Instruction",
    "Program",
    "last_uses",
    "most_alive",
    "originals",
    "run_code",
]


@dataclass(frozen=True)
class Evaluate:
    """One evaluation of the model.

    Attributes
    ----------
    state : index of the evaluated vector.
    t : the time.
    form : form of the stored output, such as ``"data"``.
    """

    state: int
    t: float
    form: str

    @property
    def reads(self) -> tuple[int, ...]:
        """Indices of the vectors read."""
        return (self.state,)


@dataclass(frozen=True, eq=False)
class Combine:
    """One new vector, ``sum_j w_j v_j + constant``.

    Attributes
    ----------
    terms : pairs (j, w_j); a weight is a number, a tensor broadcast over the batch, or a `LinearMap`.
    constant : a tensor broadcast over the batch, a `PerCondition`, or None.
    step : k if the vector is the state at grid point k, else None.
    """

    terms: tuple[tuple[int, Any], ...]  # of Weight
    constant: Any = None  # Constant | None
    step: int | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """Indices of the vectors read."""
        return tuple(index for index, _ in self.terms)

    @property
    def copies(self) -> int | None:
        """The index of the copied vector if the instruction copies a vector, else None."""
        plain = self.constant is None and len(self.terms) == 1 and isinstance(self.terms[0][1], float | int)
        return self.terms[0][0] if plain and self.terms[0][1] == 1.0 else None

    def on(self, like: Tensor) -> tuple[tuple[tuple[int, Weight], ...], Constant | None]:
        """Terms and constant with their tensors in the dtype and on the device of `like`, copied there once."""
        if not self._tensors:
            return self.terms, self.constant
        copies = iter(place(self._placed, self._tensors, like.device, like.dtype))
        terms = tuple((j, next(copies) if isinstance(w, Tensor) else w) for j, w in self.terms)
        return terms, next(copies) if isinstance(self.constant, Tensor) else self.constant

    def ready(self, like: Tensor) -> Sum:
        """The instruction for vectors with the dtype and on the device of `like`."""
        return Sum.of(*self.on(like), like)

    @kept_property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(v for v in (*(w for _, w in self.terms), self.constant) if isinstance(v, Tensor))

    @kept_property
    def _placed(self) -> Cache:
        return Bounded(PLACES)


Instruction: TypeAlias = Evaluate | Combine


class Program(Protocol):
    """The part of a :class:`~iia_ode.Plan` read by analysis and files."""

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


def last_uses(code: Sequence[Instruction]) -> tuple[int, ...]:
    """For each vector, the last instruction that reads the vector; the vector's own index if no instruction reads it."""
    last = list(range(len(code) + 1))
    for k, ins in enumerate(code, start=1):
        for j in ins.reads:
            last[j] = k
    return tuple(last)


def originals(code: Sequence[Instruction]) -> tuple[int, ...]:
    """For each copy, the index of the original; for every other vector, its own index."""
    first = [0]
    for k, ins in enumerate(code, start=1):
        copied = ins.copies if isinstance(ins, Combine) else None
        first.append(k if copied is None else first[copied])
    return tuple(first)


def most_alive(last_use: Sequence[int]) -> int:
    """The largest number of vectors alive at once, the initial state included."""
    alive, peak = 1, 1
    ends = [0] * (len(last_use) + 1)
    for k in range(1, len(last_use)):
        alive += 1  # instruction k writes the result before the operands are released
        peak = max(peak, alive)
        ends[last_use[k]] += 1
        if k == last_use[0]:
            alive -= 1
        alive -= ends[k]
    return peak


def _run_sums(
    code: Sequence[Instruction],
    values: dict[int, Tensor],
    k: int,
    like: Tensor,
    last_use: Sequence[int] | None,
) -> Iterator[int]:
    """Run the sums after instruction k, up to the next evaluation or the end; yields the index of each new vector.

    Parameters
    ----------
    code, values, last_use : as in :func:`run_code`.
    like : [B, ...], gives shape, dtype and device.
    """
    while k < len(code):
        ins = code[k]
        if isinstance(ins, Evaluate):
            return
        k += 1
        values[k] = ins.ready(like)(values, like, may_write())
        yield k
        _release(values, k, code, last_use)


def _release(values: dict[int, Tensor], k: int, code: Sequence[Instruction], last_use: Sequence[int] | None) -> None:
    """Drop the vectors not read after instruction k."""
    if last_use is not None and k < len(code):
        for j in {*code[k - 1].reads, k}:
            if last_use[j] == k:
                del values[j]


def run_code(
    code: Sequence[Instruction],
    values: dict[int, Tensor],
    evaluate: Callable[[Tensor, float, str], Tensor],
    *,
    start: int = 0,
    last_use: Sequence[int] | None = None,
) -> Iterator[tuple[int, Instruction]]:
    """Run ``code[start:]`` on `values` in place, yielding (k, instruction k) after each instruction.

    A :class:`~iia_ode.plan.Run` is the same loop for callers that call the model themselves.

    Parameters
    ----------
    code : instructions; may be the growing list of a :class:`~iia_ode.plan.Tracer`.
    values : tensors by the index of their vector; every vector read but not written by the instructions must be there.
    evaluate : function from (state, t, form) to the model output in the named form.
    start : number of instructions run before.
    last_use : for each vector, the index of the last instruction to read the vector, which is dropped afterwards. By
        default nothing is dropped.
    """
    like, k = values[min(values)], start
    while k < len(code):
        ins = code[k]
        if isinstance(ins, Evaluate):
            k += 1
            values[k] = evaluate(values[ins.state], ins.t, ins.form)
            yield k, ins
            _release(values, k, code, last_use)
        else:
            for done in _run_sums(code, values, k, like, last_use):
                k = done
                yield k, code[k - 1]
