"""What the instructions of a plan amount to: steps, evaluations, and the vectors in use."""

from __future__ import annotations

from ..transforms import kept_property
from .instructions import Combine, Evaluate, Instruction, last_uses, most_alive, originals
from .maps import PerCondition

__all__ = ["Counted"]


class Counted:
    """Counts over the grid and the instructions of a plan.

    Attributes
    ----------
    grid : times, from the initial state to the final one.
    code : the instructions.
    """

    grid: tuple[float, ...]
    code: tuple[Instruction, ...]

    @property
    def steps(self) -> int:
        """Intervals of the grid."""
        return len(self.grid) - 1

    @kept_property
    def nfe(self) -> int:
        """Model evaluations of one run."""
        return sum(isinstance(ins, Evaluate) for ins in self.code)

    @property
    def evaluations_per_step(self) -> tuple[int, ...]:
        """Model evaluations of each step, in order."""
        counts = [0]
        for ins in self.code:
            if isinstance(ins, Evaluate):
                counts[-1] += 1
            elif ins.step is not None:
                counts.append(0)
        return tuple(counts[:-1])

    @property
    def evaluation_times(self) -> tuple[float, ...]:
        """Times of the evaluations, in order."""
        return tuple(ins.t for ins in self.code if isinstance(ins, Evaluate))

    @kept_property
    def starts(self) -> tuple[int | None, ...]:
        """For each evaluation, k if the evaluated state is the state at grid point k, else None (inside a step)."""
        points = {(0, self.grid[0]): 0}
        for k, ins in enumerate(self.code, start=1):
            if isinstance(ins, Combine) and ins.step is not None:
                points[self.same[k], self.grid[ins.step]] = ins.step
        return tuple(points.get((self.same[ins.state], ins.t)) for ins in self.code if isinstance(ins, Evaluate))

    @kept_property
    def same(self) -> tuple[int, ...]:
        """For each copy, the index of the original; for every other vector, its own index."""
        return originals(self.code)

    @kept_property
    def tables(self) -> tuple[tuple[int, PerCondition], ...]:
        """Pairs (index of the vector, constant) of the constants per condition."""
        return tuple(
            (k, ins.constant)
            for k, ins in enumerate(self.code, start=1)
            if isinstance(ins, Combine) and isinstance(ins.constant, PerCondition)
        )

    @kept_property
    def last_use(self) -> tuple[int, ...]:
        """For each vector, the last instruction that reads the vector; the vector's own index if no instruction reads it."""
        return last_uses(self.code)

    @kept_property
    def peak_vectors(self) -> int:
        """The most state-sized vectors alive at once during a run, the initial state included."""
        return most_alive(self.last_use)
