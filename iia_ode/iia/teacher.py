"""The teacher: dense, accurate trajectories of a batch, made once and used for every grid and number of evaluations."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import FileFormatError, GridError, InputError, MismatchError, NonFiniteError
from ..files import read_tensors, write_tensors
from ..ode import ProbabilityFlowODE
from ..plan import Plan, check_grid, check_start, run_code, trace
from ..reference import Trajectory, trajectory
from ..schedules import Schedule
from ..schedules.stored import schedule_tensors, stored_schedule
from ..solvers import get_solver
from .origin import check_origin, conditions_digest, origin

__all__ = ["DEFAULT_WAY", "Teacher"]

_F64 = torch.float64
_KIND = "teacher"
_SCHEMA = {"about": {"schedule": {"type": str}, "evaluations": int}}
_SOLVER = (
    "expab4"  # of those registered, the most accurate at 40 to 60 evaluations that evaluates at its own grid states
)
_RHO = 10.0  # spacing of its levels: between Karras et al.'s 7 and equidistant in log-SNR
_NOISIEST = 200.0  # a start noisier than this, alpha = 0 included, gets one step down to it
DEFAULT_WAY: dict[str, Any] = {"solver": _SOLVER, "steps": 60}
"""How trajectories are made where nothing else is asked for."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """Accurate trajectories of the samples of one batch, with dense output, kept on the host in the dtype of the states.

    Attributes
    ----------
    initial : the states that they start from, [B, ...].
    path : states and slopes at the knots; see :class:`~iia_ode.reference.Trajectory`.
    about : what it was made for and how, JSON-ready.
    """

    initial: Tensor
    path: Trajectory
    about: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def solve(
        cls,
        ode: ProbabilityFlowODE,
        x: Tensor,
        t_start: float,
        t_end: float,
        *,
        steps: int | None = None,
        rtol: float | None = None,
        points: int = 120,
        sigma_min: float = 0.002,
        method: str = "dopri8",
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> Teacher:
        """Integrate the batch from `t_start` to `t_end`.

        Parameters
        ----------
        ode : the model with its conditions, one entry per sample of x or one for all.
        x : states [B, ...] at `t_start`, float32 or float64.
        t_start, t_end : times in either direction; `t_end` may be the data.
        steps : so many steps of a fourth-order exponential multistep method, one evaluation each and one at the end: an error
            far below that of any solver with few steps, at a known cost. 60 if neither this nor `rtol` is given.
        rtol : instead of `steps`: adaptive integration to this tolerance with `method` of torchdiffeq.
        points : knots of the dense output of the adaptive way.
        sigma_min : where `t_end` is the data, the level sigma/alpha whose data estimate is the final state: for a network,
            the smallest it was trained on.
        chunk_size : samples that go through the model at once (all by default).
        progress : show a bar over the chunks.

        Raises
        ------
        InputError, GridError : an argument is not usable.
        NonFiniteError : the integration failed.
        """
        check_start(ode, x)
        if steps is not None and rtol is not None:
            raise InputError("a teacher takes a number of steps or a tolerance rtol, not both.")
        if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise InputError(f"chunk_size must be a positive whole number, got {chunk_size!r}.")
        plan = None
        if rtol is None:
            steps = DEFAULT_WAY["steps"] if steps is None else steps
            plan = _fixed_plan(ode.schedule, t_start, t_end, sigma_min, steps)
        size, parts = chunk_size or len(x), []
        with ode.counting() as spent:
            for i in tqdm(range(0, len(x), size), desc="teacher", disable=not progress):
                own, start = ode.subset(slice(i, i + size), len(x)), x[i : i + size]
                if plan is not None:
                    part = _fixed(own, start, plan, t_end)
                else:
                    options = {"points": points, "rtol": rtol, "atol": rtol, "sigma_min": sigma_min, "method": method}
                    part = trajectory(own, start, t_start, t_end, **options)  # type: ignore[arg-type]
                parts.append(_stored(part, x.dtype))
        first = parts[0]
        ends = [p.data for p in parts if p.data is not None]
        path = replace(
            first,
            states=torch.cat([p.states for p in parts], dim=1),
            slopes=torch.cat([p.slopes for p in parts], dim=1),
            data=torch.cat(ends) if ends else None,
            evaluations=spent.evaluations,
        )
        way = {"solver": _SOLVER, "steps": steps} if plan is not None else {"solver": method, "rtol": rtol}
        about = origin(ode, x) | {
            **way,
            "t_start": float(t_start),
            "t_end": float(t_end),
            "sigma_min": sigma_min,
            "conditions": conditions_digest(ode),
            "evaluations": spent.evaluations,
            "sample_evaluations": spent.samples,
        }
        return cls(x.detach().cpu().clone(), path, about)

    def __len__(self) -> int:
        return len(self.initial)

    def at(self, t: float, index: slice | Tensor | None = None) -> Tensor:
        """The states at time t of the samples in `index` (all by default), on the host, in the dtype of the states.

        Raises
        ------
        GridError : t lies outside the trajectory.
        """
        return _part(self.path, index)(t)

    @property
    def final(self) -> Tensor:
        """The last states, [B, ...]."""
        return self.path.final

    @property
    def evaluations(self) -> int:
        """Model calls that it cost."""
        return int(self.about["evaluations"])

    @property
    def sample_evaluations(self) -> int:
        """The same, weighted by batch size."""
        return int(self.about["sample_evaluations"])

    @property
    def way(self) -> dict[str, Any]:
        """How it was made: the solver, with its steps or tolerance; JSON-ready."""
        return {k: self.about[k] for k in ("solver", "steps", "rtol", "sigma_min") if k in self.about}

    def subset(self, index: slice | Tensor) -> Teacher:
        """The teacher of some of the samples."""
        return Teacher(self.initial[index], _part(self.path, index), self.about | {"conditions": None})

    def restarted(self, t: float, x: Tensor) -> Teacher:
        """The same trajectories as the aim of solvers that start at time t from states x, which need not lie on them."""
        self.at(t, slice(0, 1))  # a GridError now rather than after the work
        return Teacher(x.detach().cpu(), self.path, self.about | {"t_start": float(t), "conditions": None})

    def check(self, ode: ProbabilityFlowODE, x: Tensor, *, stacklevel: int = 3) -> None:
        """Raise unless this is the teacher of this ODE from these very states; warn if the model's weights differ.

        `stacklevel` says whose line the warning names: that of the caller by default.

        Raises
        ------
        MismatchError : another schedule, prediction type, guidance scale, condition or initial state.
        """
        check_origin("the teacher", self.about, ode, x, made="made", strict_guidance=True, stacklevel=stacklevel)
        if self.initial.shape != x.shape or not torch.equal(self.initial, x.detach().cpu().to(self.initial.dtype)):
            raise MismatchError(
                f"the teacher starts from other states than these {list(x.shape)}: make it with Teacher.solve(ode, x, ...)."
            )
        if self.about["conditions"] not in (None, conditions_digest(ode)):
            raise MismatchError("the teacher was made under other conditions: make it with this ODE.")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file."""
        tensors = {"initial": self.initial, "knots": self.path.knots, "states": self.path.states}
        tensors["slopes"] = self.path.slopes
        if self.path.data is not None:
            tensors["data"] = self.path.data
        return write_tensors(path, _KIND, tensors | schedule_tensors(self.path.schedule), {"about": self.about})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, schedule: Schedule | None = None) -> Teacher:
        """Read what :meth:`save` wrote; `schedule` is needed only where a file cannot hold it.

        Raises
        ------
        FileFormatError : missing, damaged or foreign file, or one that does not hold its schedule.
        MismatchError : `schedule` is not the one the file was made for.
        """
        tensors, header = read_tensors(path, _KIND, _SCHEMA)
        about = header["about"]
        found = stored_schedule(path, about["schedule"], tensors, schedule)
        try:
            knots, states, slopes, data = (tensors.get(k) for k in ("knots", "states", "slopes", "data"))
            if knots is None or states is None or slopes is None or states.shape != slopes.shape:
                raise ValueError("its tensors are not those of a trajectory.")
            return cls(tensors["initial"], Trajectory(found, knots, states, slopes, data, about["evaluations"]), about)
        except (LookupError, TypeError, ValueError) as error:
            raise FileFormatError(f"{str(path)!r} holds no valid teacher: {error}") from error


def _part(path: Trajectory, index: slice | Tensor | None) -> Trajectory:
    if index is None:
        return path
    data = None if path.data is None else path.data[index]
    return replace(path, states=path.states[:, index], slopes=path.slopes[:, index], data=data)


def _stored(path: Trajectory, dtype: torch.dtype) -> Trajectory:
    data = None if path.data is None else path.data.to("cpu", dtype)
    return replace(
        path,
        knots=path.knots.cpu(),
        states=path.states.to("cpu", dtype),
        slopes=path.slopes.to("cpu", dtype),
        data=data,
    )


def _fixed_plan(schedule: Schedule, t_start: float, t_end: float, sigma_min: float, steps: int) -> Plan:
    """The multistep method from `t_start` to `t_end`, or to `sigma_min` where that is the data."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise InputError(f"a teacher takes at least 2 steps, got {steps!r}.")
    first, last = check_grid(schedule, [t_start, t_end])
    start = _level(schedule, first)
    if schedule.sigma(last) == 0:
        if not 0 < sigma_min < start:
            raise GridError(f"sigma_min must lie between 0 and the starting level, got {sigma_min:g}.")
        last = schedule.t_of_noise_to_signal(sigma_min)
    a, b = (min(_level(schedule, t), _NOISIEST) ** (1 / _RHO) for t in (first, last))
    times = [schedule.t_of_noise_to_signal((a + k / steps * (b - a)) ** _RHO) for k in range(1, steps)]
    if start > _NOISIEST:
        times = [schedule.t_of_noise_to_signal(_NOISIEST), *times]
    grid = torch.tensor([first, *times, last], dtype=_F64, device="cpu")
    return trace(get_solver(_SOLVER), schedule, grid, consistent=False)


def _level(schedule: Schedule, t: float) -> float:
    alpha = schedule.alpha(t)
    return schedule.sigma(t) / alpha if alpha else math.inf


def _fixed(ode: ProbabilityFlowODE, x: Tensor, plan: Plan, t_end: float) -> Trajectory:
    """Run the method; each of its evaluations, made at a grid point, is a knot with its slope."""
    schedule = ode.schedule
    knots: list[float] = []
    states: list[Tensor] = []
    slopes: list[Tensor] = []

    def note(x: Tensor, t: float, data: Tensor) -> None:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        size = math.hypot(alpha, sigma)
        knots.append(math.asinh(alpha / sigma))
        states.append((x / size).cpu())
        slopes.append(torch.sub(data, x, alpha=alpha / size / size).cpu())  # tanh(u) = alpha / size

    def evaluate(x: Tensor, t: float, form: str) -> Tensor:
        evaluation = ode.evaluate(x, t)
        note(x, t, evaluation.data)
        return evaluation.as_form(form)

    values = {0: x}
    for _ in run_code(plan.code, values, evaluate, last_use=plan.last_use):
        pass
    end = values[len(plan.code)]
    data = ode.data(end, plan.grid[-1])
    note(end, plan.grid[-1], data)
    final = (schedule.alpha(t_end) * data).cpu() if ode.is_data(t_end) else None
    if not bool(torch.isfinite(states[-1]).all()):
        raise NonFiniteError(
            "the teacher ended in NaN or infinity: check the model over the whole range of noise levels."
        )
    return Trajectory(
        schedule, torch.tensor(knots, dtype=_F64, device="cpu"), torch.stack(states), torch.stack(slopes), final, 0
    )
