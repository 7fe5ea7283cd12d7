"""The plan: a solver, a schedule and a grid as a straight-line program of two instructions."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import FileFormatError, InputError, MismatchError, NonFiniteError, PlanError
from ..files import read_tensors, write_tensors
from ..forms import PREDICTIONS, conversion
from ..ode import ProbabilityFlowODE
from ..schedules import Schedule
from ..schedules.stored import stored_schedule
from .analysis import CanonicalForm, GaussianResponse, canonical_form, gaussian_response
from .checks import check_grid, check_start
from .instructions import Combine, Evaluate, Instruction, run_code
from .maps import LinearMap, PerCondition
from .storing import pack, tensors_misfit, unpack
from .vectors import format_terms

__all__ = ["Combine", "Evaluate", "Instruction", "Plan", "run_code", "unpacked"]

_KIND = "plan"
_SCHEMA = {"name": str, "code": [list], "schedule": {"type": str}}


@dataclass(frozen=True, eq=False)
class Plan:
    """A solver on a schedule and a grid, traced to numbers; immutable, and valid once it exists.

    Instruction k (from 1) writes vector k; vector 0 is the initial state. Weights are float64 numbers on the host, float64
    tensors that broadcast against one sample, or linear maps of one sample. What a run copies of them to its device stays
    there for the next one.

    Parameters
    ----------
    schedule : the noise schedule that the weights were computed for.
    grid : times, from the initial state to the final one.
    code : the instructions.
    name : what the solver is called.

    Raises
    ------
    GridError : the grid is not usable.
    PlanError : an instruction reads a vector that is not there yet, a weight or time is not finite, or the states at the
        grid points are not all written, in order, the last one by the last instruction.
    """

    schedule: Schedule
    grid: tuple[float, ...]
    code: tuple[Instruction, ...]
    name: str = "plan"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise PlanError(f"a plan needs the schedule that it was made for, got {self.schedule!r}.")
        # Tuples, whatever came: a list could be changed behind the plan's back.
        object.__setattr__(self, "grid", tuple(check_grid(self.schedule, list(self.grid))))
        object.__setattr__(self, "code", tuple(self.code))
        steps = []
        for k, ins in enumerate(self.code, start=1):
            if not isinstance(ins, Evaluate | Combine) or not all(isinstance(j, int) for j in ins.reads):
                raise PlanError(
                    f"instruction {k} of {self.name} is neither Evaluate nor Combine over vectors: {ins!r}."
                )
            if any(not 0 <= j < k for j in ins.reads):
                raise PlanError(f"instruction {k} of {self.name} reads a vector that does not exist yet: {ins}.")
            if isinstance(ins, Evaluate):
                if not math.isfinite(ins.t) or ins.form not in PREDICTIONS:
                    raise PlanError(f"instruction {k} of {self.name} is no valid evaluation: {ins}.")
                continue
            if not all(_finite(w) for _, w in ins.terms) or (ins.constant is not None and not _finite(ins.constant)):
                raise PlanError(
                    f"instruction {k} of {self.name} has a weight that is not finite: {format_terms(ins.terms, None)}. "
                    "A step to sigma = 0 needs its limit written out (expm1 and ratios, or ode.is_data(s))."
                )
            if ins.step is not None:
                steps.append(ins.step)
        times = torch.tensor(self.evaluation_times, dtype=torch.float64, device="cpu")
        if len(times) and (not self.schedule.covers(times) or bool((self.schedule.sigma(times) == 0).any())):
            raise PlanError(
                f"{self.name} holds no valid evaluation at the data or outside its schedule: {times.tolist()}."
            )
        last = self.code[-1] if self.code else None
        if steps != list(range(1, len(self.grid))) or not isinstance(last, Combine) or last.step != self.steps:
            raise PlanError(
                f"{self.name} does not write the state at each of its {self.steps} later grid points in order."
            )

    # ---- what can be read off it -------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Intervals of the grid."""
        return len(self.grid) - 1

    @cached_property
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
        """Times at which the model is evaluated, in order."""
        return tuple(ins.t for ins in self.code if isinstance(ins, Evaluate))

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each vector, the last instruction that reads it (itself when none does)."""
        last = list(range(len(self.code) + 1))
        for k, ins in enumerate(self.code, start=1):
            for j in ins.reads:
                last[j] = k
        return tuple(last)

    @cached_property
    def weight_bytes(self) -> int:
        """Memory of the weights and constants that are more than one number, in bytes on the host."""
        values = [v for i in self.code if isinstance(i, Combine) for v in (*(w for _, w in i.terms), i.constant)]
        tensors = {
            id(t): t
            for v in values
            for t in (v.coefficients if isinstance(v, LinearMap) else v.table if isinstance(v, PerCondition) else v,)
            if isinstance(t, Tensor)
        }
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @cached_property
    def peak_vectors(self) -> int:
        """The most state-sized vectors alive at once during a run, the initial state included."""
        alive, peak = 1, 1
        ends = [0] * (len(self.code) + 2)
        for k in range(1, len(self.code) + 1):
            alive += 1  # instruction k writes its result before its operands are released
            peak = max(peak, alive)
            ends[self.last_use[k]] += 1
            if k == self.last_use[0]:
                alive -= 1
            alive -= ends[k]
        return peak

    def canonical(self) -> CanonicalForm:
        """The plan with everything but its evaluations eliminated: equal for equal algorithms, however written."""
        return canonical_form(self)

    def difference(self, other: Plan) -> float:
        """Largest difference of the canonical weights, relative to unit data; infinite if the evaluations differ."""
        return self.canonical().difference(other.canonical())

    def equivalent(self, other: Plan, tolerance: float = 1e-12) -> bool:
        """Whether the two plans are the same algorithm up to rounding ("DDIM is Euler where alpha = 1")."""
        return self.difference(other) <= tolerance

    def on_gaussian(self, mean: Tensor | float, variance: Tensor | float) -> GaussianResponse:
        """The exact answer on data N(mean, diag variance), with the exact flow beside it; no network, no sampling."""
        return gaussian_response(self, mean, variance)

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: grid, times and weights as tensors, instructions and schedule as JSON in its header."""
        code, tensors = pack(self)
        header = {"name": self.name, "code": code, "schedule": self.schedule.config()}
        return write_tensors(path, _KIND, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, schedule: Schedule | None = None) -> Plan:
        """Read what :meth:`save` wrote; samples are bit-equal to those before.

        Parameters
        ----------
        path : the file. Those of fitted solvers are for :func:`iia_ode.load`.
        schedule : needed only where the plan is for a schedule that a file cannot hold, such as one from functions.

        Raises
        ------
        FileFormatError : missing, damaged or foreign file, or one that does not hold its schedule.
        MismatchError : `schedule` is not the one that the plan is for.
        """
        tensors, header = read_tensors(path, _KIND, _SCHEMA)
        if problem := tensors_misfit(tensors):
            raise FileFormatError(f"{str(path)!r} is damaged: {problem}.")
        found = stored_schedule(path, header["schedule"], tensors, schedule)
        return unpacked(path, found, header["name"], header["code"], tensors)

    def __str__(self) -> str:
        head = (
            f"{self.name} on {type(self.schedule).__name__}: {self.steps} steps from t = {self.grid[0]:.6g} to "
            f"{self.grid[-1]:.6g}, {self.nfe} evaluations, at most {self.peak_vectors} vectors at once"
        )
        return "\n".join([head, *self._lines()])

    def _lines(self) -> Iterator[str]:
        for k, ins in enumerate(self.code, start=1):
            if isinstance(ins, Evaluate):
                yield f"  v{k} = {ins.form}(v{ins.state}, t = {ins.t:.6g})"
            else:
                note = "" if ins.step is None else f"        # state {ins.step}, t = {self.grid[ins.step]:.6g}"
                yield f"  v{k} = {format_terms(ins.terms, ins.constant)}{note}"

    # ---- running it --------------------------------------------------------------------------------------------------

    def run(
        self,
        ode: ProbabilityFlowODE,
        x: Tensor,
        *,
        trajectory: bool = False,
        check_finite: bool = True,
        callback: Callable[[int, float, Tensor], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Run the plan from state x [B, ...].

        Parameters
        ----------
        ode : the model; its schedule must be the plan's.
        x : initial state, float32 or float64; it is not changed.
        trajectory : return the states at all grid points, [len(grid), B, ...], instead of the last one.
        check_finite : note on the device whether each model output is finite, and read the notes once, after the loop.
        callback : called as ``callback(k, t, state)`` at every grid point after the first; the state is the run's own, to be
            read and not written to.
        progress : show a bar over the evaluations.

        Raises
        ------
        InputError : x is not a float32 or float64 tensor with a batch dimension.
        MismatchError : the ODE has another schedule than the plan, or lacks a condition that the plan's constants depend on.
        NonFiniteError : the model produced NaN or infinity; names the evaluation.
        """
        check_start(ode, x)
        self._check_weights(x)
        if ode.schedule.config() != self.schedule.config():
            raise MismatchError(f"{self.name} was traced for {self.schedule}, and the ODE has {ode.schedule}.")
        states, flags = [x], []
        bar = tqdm(total=self.nfe, desc=self.name, disable=not progress)
        factors = iter(self._conversions(ode.prediction))
        values = {0: x}

        def evaluate(state: Tensor, t: float, form: str) -> Tensor:
            out = ode.output(state, t)
            if any(v.data_ptr() == out.data_ptr() != 0 for v in values.values()):
                raise InputError(
                    "the model returned memory that it had returned before: let it return a copy, out.clone()."
                )
            p, q = next(factors)
            if (p, q) != (0.0, 1.0):
                out = torch.mul(state, p).add_(out, alpha=q)
            if check_finite:
                flags.append(_sum(out))
            bar.update()
            return out

        for k, ins in run_code(self._conditioned(ode, x), values, evaluate, last_use=self.last_use):
            if isinstance(ins, Combine) and ins.step is not None:
                if trajectory:
                    states.append(values[k])
                if callback is not None:
                    callback(ins.step, self.grid[ins.step], values[k])
        bar.close()
        final = values[len(self.code)]
        if check_finite:
            self._raise_if_not_finite(flags, final)
        return torch.stack(states) if trajectory else final

    def _conditioned(self, ode: ProbabilityFlowODE, x: Tensor) -> tuple[Instruction, ...]:
        """The code with the constants of this batch in the place of those per condition."""
        return tuple(
            replace(ins, constant=ins.constant.rows(ode, x))
            if isinstance(ins, Combine) and isinstance(ins.constant, PerCondition)
            else ins
            for ins in self.code
        )

    def _conversions(self, prediction: str) -> list[tuple[float, float]]:
        """The factors from what the model predicts to what each evaluation stores, once per plan and prediction type."""
        if prediction not in self._factors:
            times = [(ins.t, ins.form) for ins in self.code if isinstance(ins, Evaluate)]
            self._factors[prediction] = [conversion(self.schedule, t, prediction, form) for t, form in times]
        return self._factors[prediction]

    @cached_property
    def _factors(self) -> dict[str, list[tuple[float, float]]]:
        return {}

    def _check_weights(self, x: Tensor) -> None:
        """Weights that are tensors must broadcast against one sample, not the other way round; maps must be of its shape."""
        shape = tuple(x.shape[1:])
        for ins in self.code:
            if isinstance(ins, Combine):
                for value in (*(w for _, w in ins.terms), ins.constant):
                    if isinstance(value, LinearMap) and value.shape != shape:
                        raise InputError(
                            f"{self.name} has a linear map of samples {list(value.shape)}, and these are {list(shape)}."
                        )
                    if isinstance(value, Tensor | PerCondition) and not _broadcasts(tuple(value.shape), shape):
                        raise InputError(
                            f"{self.name} has a weight of shape {list(value.shape)} for samples of {list(shape)}."
                        )

    def _raise_if_not_finite(self, flags: list[Tensor], final: Tensor) -> None:
        finite = torch.isfinite(torch.stack([*flags, _sum(final)])).tolist()
        if all(finite):
            return
        first = finite.index(False)
        if first == self.nfe:
            raise NonFiniteError(
                f"{self.name} overflowed {final.dtype}: every model output was finite, the result is not."
            )
        raise NonFiniteError(
            f"the model returned NaN or infinity at evaluation {first + 1} of {self.nfe} "
            f"(t = {self.evaluation_times[first]:.6g}) under {self.name}. Check the model at that noise level, "
            "its dtype (float16 overflows at large sigma), and the initial state."
        )


def unpacked(
    path: str | os.PathLike[str], schedule: Schedule, name: str, code: list[list[Any]], tensors: Mapping[str, Tensor]
) -> Plan:
    """The plan whose instructions and tensors a file holds.

    Raises
    ------
    FileFormatError : they make no valid plan.
    """
    try:
        return Plan(schedule, *unpack(code, tensors), name)
    except (LookupError, TypeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} holds no valid plan: {error}") from error


def _sum(values: Tensor) -> Tensor:
    """Finite exactly if all values are (in float64, where no sum of float32 overflows), in one pass and on the device."""
    return values.detach().sum(dtype=torch.float64)


def _broadcasts(shape: tuple[int, ...], sample: tuple[int, ...]) -> bool:
    return len(shape) <= len(sample) and all(a in (1, b) for a, b in zip(shape[::-1], sample[::-1], strict=False))


def _finite(weight: object) -> bool:
    if isinstance(weight, LinearMap | PerCondition):  # which cannot exist otherwise
        return True
    if isinstance(weight, Tensor):
        return weight.is_floating_point() and bool(torch.isfinite(weight).all())
    return isinstance(weight, numbers.Real) and math.isfinite(weight)
