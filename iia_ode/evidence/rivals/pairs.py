"""Training pairs of the rivals, and their results."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import InputError
from ...ode import ProbabilityFlowODE
from ...plan import Plan
from ...schedules import EDM
from ...teacher import Teacher

__all__ = ["Learned", "Pairs"]


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned solver.

    Attributes
    ----------
    plan : the solver.
    sample_evaluations : cost of learning it; a backward pass counts as two evaluations.
    """

    plan: Plan
    sample_evaluations: int


@dataclass(frozen=True, eq=False)
class Pairs:
    """Draws of noise with accurate final states.

    Parameters
    ----------
    ode : the model on the schedule EDM, with the conditions of the samples.
    x : initial states [B, ...].
    final : accurate final states [B, ...].
    sigma_min, sigma_max : smallest level of a grid, and the level of the initial states.
    sample_evaluations : cost of the final states.

    Raises
    ------
    InputError : the ODE has another schedule.
    """

    ode: ProbabilityFlowODE
    x: Tensor
    final: Tensor
    sigma_min: float
    sigma_max: float
    sample_evaluations: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.ode.schedule, EDM):
            raise InputError(f"the rivals run on the schedule EDM, got {self.ode.schedule!r}: use iia_ode.EDM().")

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def solve(
        cls,
        ode: ProbabilityFlowODE,
        x: Tensor,
        sigma_min: float,
        sigma_max: float,
        *,
        steps: int = 60,
        chunk_size: int | None = None,
    ) -> tuple[Pairs, Teacher]:
        """Make the pairs of a batch, and the teacher behind their final states.

        Parameters
        ----------
        ode, x : the model and initial states [B, ...] at level `sigma_max`.
        sigma_min, sigma_max : see the class.
        steps, chunk_size : see :meth:`iia_ode.Teacher.solve`.

        Returns
        -------
        The pairs and the teacher.
        """
        teacher = Teacher.solve(ode, x, sigma_max, 0.0, steps=steps, sigma_min=sigma_min, chunk_size=chunk_size)
        return cls(ode, x, teacher.final, sigma_min, sigma_max, teacher.sample_evaluations), teacher
