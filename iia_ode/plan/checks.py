"""Checks of grids, states and instructions."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import GridError, InputError, NonFiniteError, PlanError, ScheduleError
from ..forms import PREDICTIONS, conversion
from ..grids.origin import check_levels, check_origin
from ..metrics import flat
from ..ode import ProbabilityFlowODE
from ..schedules import Discrete, Schedule
from ..transforms import carries_derivative
from .instructions import Combine, Evaluate, Instruction, Program
from .maps import LinearMap, PerCondition
from .vectors import format_terms

__all__ = [
    "check_code",
    "check_constants",
    "check_grid",
    "check_ode",
    "check_samples",
    "check_start",
    "check_state",
    "check_weights",
    "factors_at",
    "has_shape",
    "samples_of",
]


def check_grid(schedule: Schedule, grid: object) -> list[float]:
    """The times of a grid, checked.

    Raises
    ------
    GridError : not 1-dimensional, fewer than two times, not finite, made for another schedule, outside the schedule or the
        levels that the model knows, not strictly monotone in sigma/alpha, or starting at the data of a discrete schedule.
    """
    try:
        values = (
            torch.as_tensor(grid, dtype=torch.float64, device="cpu")
            if isinstance(grid, Tensor | list | tuple)
            else None
        )
    except (TypeError, ValueError, OverflowError):
        values = None
    if isinstance(grid, Tensor) and grid.is_complex():
        values = None
    if values is None or values.ndim != 1 or len(values) < 2:
        what = f"shape {list(values.shape)}" if values is not None else type(grid).__name__
        what += (
            " (sample and odeint take a grid per sample with a solver)"
            if values is not None and values.ndim == 2
            else ""
        )
        raise GridError(
            f"a grid is a 1-d float64 tensor of at least two times, such as iia.grids.karras(10); got {what}."
        )
    values = values.detach()
    check_origin(schedule, grid, values)
    level = schedule.sigma(values), schedule.alpha(values)
    if not bool(torch.isfinite(values).all()) or not schedule.covers(values):
        raise GridError(
            f"the grid leaves the {type(schedule).__name__} schedule: {_brief(values)}. Levels sigma/alpha become times by "
            "iia_ode.grids.karras(n, schedule=ode.schedule)."
        )
    check_levels(schedule, values)
    angle = torch.atan2(*level)  # monotone in sigma/alpha, and finite where alpha = 0
    decreasing = angle.diff() < 0
    if not bool(decreasing.all()) and bool(decreasing.any() or (angle.diff() == 0).any()):
        bad = int((decreasing != decreasing[0]).nonzero()[0]) if bool((decreasing != decreasing[0]).any()) else 0
        raise GridError(
            f"a grid must be strictly monotone from noise to data (or back): {_brief(values)} turns or stands still "
            f"between its points {bad} and {bad + 1} ({values[bad]:g}, {values[bad + 1]:g})."
        )
    if float(level[0][0]) == 0 and isinstance(schedule, Discrete):
        raise GridError(
            f"the grid starts at the data (t = {float(values[0]):g}, sigma = 0), which is no timestep of a discrete model: "
            "start at timestep 0."
        )
    return list(values.tolist())


def factors_at(schedule: Schedule, t: float, prediction: str, form: str) -> tuple[float, float]:
    """(p, q) of :func:`~iia_ode.forms.conversion` from a model's output at time t to another form.

    Raises
    ------
    GridError : t is the data, and the model's output there does not determine the form.
    ScheduleError : t is another time without a conversion.
    """
    at_data = schedule.sigma(t) == 0
    reason = "which is no timestep of a discrete model" if at_data and isinstance(schedule, Discrete) else None
    if reason is None:
        try:
            return conversion(schedule, t, prediction, form)
        except ScheduleError:
            if not at_data:
                raise
            reason = f"where {prediction} prediction does not determine {_WORDS.get(form, form)}"
    raise GridError(
        f"this grid evaluates the model at the data (t = {t:g}, sigma = 0), {reason}. Start a grid at a small sigma; end a "
        "grid at a small sigma (grids take to_data=False), or at the data with a solver of this library. A solver of your own "
        "tests ode.is_data(s), and finishes with a formula that does not evaluate the model at s."
    )


_WORDS = {"velocity": "dx/dt", "noise": "the noise"}


def _brief(values: Tensor) -> str:
    shown = [f"{v:g}" for v in values.tolist()]
    return "[" + ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]) + "]"


def check_state(x: object) -> Tensor:
    """x, checked to be a state: float32 or float64, non-empty, with a batch dimension; raises InputError otherwise."""
    if not isinstance(x, Tensor):
        parts = isinstance(x, tuple | list)
        advice = "join its parts in one tensor, and let the model split them" if parts else "pass torch.as_tensor(x)"
        raise InputError(f"the state must be a torch.Tensor, got {type(x).__name__}: {advice}.")
    if x.is_complex():
        raise InputError(
            f"the state must be real, got {x.dtype}: pass torch.view_as_real(x), with real and imaginary parts as a last "
            "dimension of 2, and let the model apply torch.view_as_complex to its input."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"the state must be float32 or float64, got {x.dtype}: pass x.float(). The model keeps its own dtype "
            "(ProbabilityFlowODE casts at the call), or takes model_dtype=torch.float16."
        )
    if x.ndim == 0 or x.numel() == 0:
        raise InputError(
            f"the state needs a non-empty batch dimension first, and components, got shape {list(x.shape)}."
        )
    return x


def samples_of(found: Sequence[int]) -> str:
    """Indices of samples in words, such as "samples 3, 17 and 5 others of the batch"."""
    shown = ", ".join(map(str, found[:5]))
    more = f" and {len(found) - 5} others" if len(found) > 5 else ""
    return f"sample{'s' * (len(found) > 1)} {shown}{more} of the batch"


def check_samples(x: Tensor) -> None:
    """Raise NonFiniteError with the indices of the samples of x [B, ...] that hold NaN or infinity."""
    found = (~flat(x.detach()).isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if found:
        raise NonFiniteError(f"the initial states hold NaN or infinity in {samples_of(found)}.")


def check_start(ode: object, x: object) -> tuple[ProbabilityFlowODE, Tensor]:
    """`ode` and x, if `ode` is a ProbabilityFlowODE and x a state for its shape and conditions; otherwise raise InputError."""
    found = check_ode(ode)
    state = check_state(x)
    found.check_state_shape(state)
    # Of the whole batch: a chunk may happen to have as many samples as a condition has entries.
    found.check_conditions(len(state))
    return found, state


def check_ode(ode: object) -> ProbabilityFlowODE:
    """`ode`, if it is a ProbabilityFlowODE; otherwise raise InputError."""
    if not isinstance(ode, ProbabilityFlowODE):
        raise InputError(
            f"expected a ProbabilityFlowODE, got {type(ode).__name__}: wrap the model as "
            "iia_ode.ProbabilityFlowODE(model, iia_ode.EDM(), prediction='data')."
        )
    return ode


def check_constants(schedule: Schedule) -> None:
    """Raise InputError if parameters of the schedule require a gradient; the weights of a plan do not carry this gradient."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not schedule.is_of_numbers:
        start = torch.tensor(schedule.t_noise, dtype=torch.float64, device="cpu")
        if any(carries_derivative(level(start)) for level in (schedule.alpha, schedule.sigma)):
            raise InputError(
                "the weights of a plan are numbers, through which no gradient flows to the schedule: switch the gradients of "
                "its parameters off, or take method='torchdiffeq:rk4'."
            )


def check_code(plan: Program) -> None:
    """Raise PlanError unless the instructions can run on the schedule and land on each grid point in order."""
    name, steps = plan.name, []
    for k, ins in enumerate(plan.code, start=1):
        _check_instruction(name, k, ins)
        if isinstance(ins, Combine) and ins.step is not None:
            steps.append(ins.step)
    times = torch.tensor(plan.evaluation_times, dtype=torch.float64, device="cpu")
    if len(times) and not plan.schedule.covers(times):
        raise PlanError(f"{name} holds an evaluation outside its schedule: {times.tolist()}.")
    if not plan.schedule.knows(times):
        outside = next(t for t in plan.evaluation_times if not plan.schedule.knows(t))
        raise PlanError(
            f"{name} evaluates the model at t = {outside:g}, level sigma/alpha {plan.schedule.noise_to_signal(outside):.4g}, "
            "outside of the levels that the model knows. In a step to the data, a solver can test ode.schedule.knows(t), or "
            "stand inside iia_ode.get_solver('denoise_to_zero', base=...)."
        )
    last, count = plan.code[-1] if plan.code else None, len(plan.grid) - 1
    if steps != list(range(1, count + 1)) or not isinstance(last, Combine) or last.step != count:
        raise PlanError(f"{name} does not write the state at each of its {count} later grid points in order.")


def _check_instruction(name: str, k: int, ins: Instruction) -> None:
    if not isinstance(ins, Evaluate | Combine) or not all(isinstance(j, int) for j in ins.reads):
        raise PlanError(f"instruction {k} of {name} is neither Evaluate nor Combine over vectors: {ins!r}.")
    if any(not 0 <= j < k for j in ins.reads):
        raise PlanError(f"instruction {k} of {name} reads a vector that does not exist yet: {ins}.")
    if isinstance(ins, Evaluate):
        if not math.isfinite(ins.t) or ins.form not in PREDICTIONS:
            raise PlanError(f"instruction {k} of {name} is no valid evaluation: {ins}.")
    elif not all(_finite(w) for _, w in ins.terms) or (ins.constant is not None and not _finite(ins.constant)):
        raise PlanError(
            f"instruction {k} of {name} has a weight that is not finite: {format_terms(ins.terms, None)}. "
            "A step from or to sigma = 0 needs its limit written out (expm1 and ratios, or ode.is_data(s))."
        )


def _finite(weight: object) -> bool:
    if isinstance(weight, LinearMap | PerCondition):  # both check their numbers when made
        return True
    if isinstance(weight, Tensor):
        return weight.is_floating_point() and bool(torch.isfinite(weight).all())
    return isinstance(weight, numbers.Real) and math.isfinite(weight)


def check_weights(plan: Program, sample: tuple[int, ...]) -> None:
    """Raise InputError unless the tensor weights and linear maps fit samples of shape `sample`."""
    for ins in plan.code:
        if isinstance(ins, Combine):
            for value in (*(w for _, w in ins.terms), ins.constant):
                if isinstance(value, LinearMap) and value.shape != sample:
                    raise InputError(
                        f"{plan.name} has a linear map of samples {list(value.shape)}, and these are {list(sample)}."
                    )
                if isinstance(value, Tensor | PerCondition) and not _broadcasts(tuple(value.shape), sample):
                    raise InputError(
                        f"{plan.name} has a weight of shape {list(value.shape)} for samples of {list(sample)}."
                    )


def has_shape(plan: Program) -> bool:
    """Whether weights belong to samples of one shape: linear maps, or weights and constants with dimensions."""
    values = (v for ins in plan.code if isinstance(ins, Combine) for v in (*(w for _, w in ins.terms), ins.constant))
    return any(isinstance(v, LinearMap) or (isinstance(v, Tensor | PerCondition) and len(v.shape) > 0) for v in values)


def _broadcasts(shape: tuple[int, ...], sample: tuple[int, ...]) -> bool:
    return len(shape) <= len(sample) and all(a in (1, b) for a, b in zip(shape[::-1], sample[::-1], strict=False))
