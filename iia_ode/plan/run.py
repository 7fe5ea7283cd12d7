"""Runs: a plan that waits at each evaluation of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import write_tensors
from ..forms import conversion, converted
from ..transforms import may_write
from .checks import check_state
from .instructions import Combine, Evaluate
from .memory import is_unshared
from .prepared import Runnable, Stage, Step
from .storing import pack

__all__ = ["KIND", "OWN", "Run", "start"]

_UNCHANGED = (0.0, 1.0)  # factors of an output in the stored form

KIND = "run"
"""The kind of a run's file."""

OWN = "run."
"""Beginning of the names of a run's own tensors in its file."""


@dataclass(eq=False)
class Run:
    """A run of a plan, waiting at each evaluation of the model; made by ``plan.start(x, prediction)``.

    The caller evaluates the model::

        run = plan.start(x, "noise")
        while not run.done:
            run.give(model(run.state, run.t))
        x_0 = run.state

    A run is plain data. ``copy.copy`` gives an independent run that shares the tensors. ``copy.deepcopy`` copies the tensors
    and shares the plan. A pickle holds everything, and :meth:`save` writes a file. A vector is dropped after its last
    use. No method but :meth:`save` reads a value from the device. A run keeps copies of all tensors that it is given, and
    hands out copies by :attr:`state` and :attr:`data`: the caller and the model may write to their own tensors at any time.
    The tensors of `values` and `reached` belong to the run, and must not be written to.

    Attributes
    ----------
    plan : the plan.
    prediction : form of the model's outputs.
    values : the vectors still in use, [B, ...] each, by index.
    rows : constants of the batch, by the index of the vector, for constants per condition.
    position : number of instructions run.
    reached : pairs (k, state at grid point k) of the grid points reached by the last :meth:`give`, or by the start.
    seen : index of the last evaluation's vector, its state and its stored output, for :attr:`data`.
    keeps_seen : whether `seen` is kept, at the cost of at most two more vectors.
    """

    plan: Runnable
    prediction: str
    values: dict[int, Tensor]
    rows: dict[int, Tensor] = field(default_factory=dict)
    position: int = 0
    reached: tuple[tuple[int, Tensor], ...] = ()
    seen: tuple[int, Tensor, Tensor] | None = None
    keeps_seen: bool = True

    def __post_init__(self) -> None:
        ready = self.plan.prepared(self.prediction, next(iter(self.values.values())))
        self._ready = ready.with_rows(self.rows) if self.rows else ready

    # ---- the loop ----------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether every evaluation was made; the state is then the final one."""
        return self.position == len(self.plan.code)

    @property
    def evaluation(self) -> int:
        """Number of evaluations made: the index of the next evaluation in ``plan.evaluation_times`` and ``plan.starts``."""
        return sum(isinstance(ins, Evaluate) for ins in self.plan.code[: self.position])

    @property
    def point(self) -> int:
        """Index of the last grid point whose state is known; 0 at the start."""
        last = 0
        for ins in self.plan.code[: self.position]:
            if isinstance(ins, Combine) and ins.step is not None:
                last = ins.step
        return last

    @property
    def state(self) -> Tensor:
        """A copy of the state of the next evaluation, [B, ...]; of the final state when the run is done.

        Writing to the copy does not change the run: :meth:`edit` does.
        """
        return self.current.clone()

    @property
    def current(self) -> Tensor:
        """The run's own tensor behind :attr:`state`, for callers that do not write to the tensor."""
        return self.values[self.position if self.done else self._stage.state]

    @property
    def t(self) -> float:
        """The time of the next evaluation; the last time of the grid when the run is done."""
        return self.plan.grid[-1] if self.done else self._stage.t

    @property
    def _stage(self) -> Stage:
        """The evaluation that the run waits at."""
        stage = self._ready.stages.get(self.position)
        if stage is None:
            raise InputError(f"this run of {self.plan.name} waits for no evaluation: it is done, read run.state.")
        return stage

    def give(self, output: Tensor) -> None:
        """Take the model's output at :attr:`state` and :attr:`t`, and run on to the next evaluation or to the end.

        Parameters
        ----------
        output : [B, ...] in the form of `prediction`, guidance included; any floating dtype, on the device of the state.
            The tensor is read and not kept.

        Raises
        ------
        InputError : the run is done, or the output has another shape or device, or is not real.
        """
        stage = self._stage
        self._store(stage, output)
        self._add_up(stage.sums)

    def step(self, evaluate: Callable[[Tensor, float], Tensor]) -> None:
        """Make the next evaluation, and run on to the one after or to the end.

        Parameters
        ----------
        evaluate : called once as ``evaluate(state, t)`` with the run's own state [B, ...]; returns the output as for
            :meth:`give`. No state is kept in :attr:`reached` during the call.
        """
        stage, self.reached = self._stage, ()
        self._store(stage, evaluate(self.values[stage.state], stage.t))
        self._add_up(stage.sums)

    def _store(self, stage: Stage, output: Tensor) -> None:
        values, position = self.values, self.position + 1
        state = values[stage.state]
        fits = _fits(output, state)
        if not fits:
            output = self._checked(output, state)
        passes = stage.passes and not self.keeps_seen and may_write()
        kept = stage.factors == _UNCHANGED and (passes or (fits and is_unshared(output)))
        stored = output if kept else converted(state, output, stage.factors)
        self.position, values[position] = position, stored
        self.seen = (position, state, stored) if self.keeps_seen else None
        for j in stage.drops:
            del values[j]

    def begin(self) -> None:
        """Run the sums before the first evaluation."""
        self._add_up(self._ready.first)

    def _add_up(self, sums: tuple[Step, ...]) -> None:
        values, writes = self.values, may_write()
        reached: tuple[tuple[int, Tensor], ...] = ()
        for step in sums:
            if writes and step.numbers is not None:
                value = step.numbers(values)
            else:
                value = step.sum(values, next(iter(values.values())), writes)
            values[step.index] = value
            if step.point is not None:
                reached += ((step.point, value),)
            for j in step.drops:
                del values[j]
        if sums:
            self.position = sums[-1].index
        self.reached = reached
        if self.done:
            self.values = {self.position: values[self.position]}

    def _checked(self, output: Tensor, state: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.shape != state.shape or not output.is_floating_point():
            got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"a run takes the model's output as one real tensor of the state's shape {list(state.shape)}, got {got}."
            )
        if output.device != state.device:
            raise InputError(f"the state is on {state.device} and the model's output on {output.device}.")
        # Expanded memory is rounded in other places than memory with a number for each entry.
        expanded = 0 in output.stride()
        return output.to(state.dtype, copy=expanded) if expanded or output.dtype != state.dtype else output

    def edit(self, x: Tensor) -> None:
        """Replace the state of the next evaluation, for inpainting and other constraints.

        Every later instruction on the state, or on a copy of the state, reads `x`. Vectors computed before, such as earlier
        model outputs, stay as they are. Where ``plan.starts[run.evaluation]`` is k, the state is the state at grid point k.
        Where the entry is None, the state is an intermediate stage, and the state at the next grid point need not depend on
        this stage.

        Parameters
        ----------
        x : [B, ...], shape, dtype and device of :attr:`state`; read and not kept.

        Raises
        ------
        InputError : the run is done, or x does not fit.
        """
        state, same = self.values[self._stage.state], self.plan.same
        if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (state.shape, state.dtype, state.device):
            got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"an edited state must be {state.dtype} {list(state.shape)} on {state.device} as the state is, got {got}."
            )
        own = x.clone()
        for j in self.values:
            if same[j] == same[self._stage.state]:
                self.values[j] = own

    @property
    def data(self) -> Tensor:
        """Estimate of x_0 by the last evaluation, [B, ...], in the dtype of the state; for previews.

        Raises
        ------
        InputError : no evaluation was made yet.
        """
        if self.seen is None:
            raise InputError(
                f"this run of {self.plan.name} has made no evaluation yet: run.data is the estimate of the last."
            )
        k, state, stored = self.seen
        stage = self._ready.stages[k - 1]
        return converted(state, stored, conversion(self.plan.schedule, stage.t, stage.form, "data"))

    # ---- copies and files ----------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Run:
        """A copy of the run on another device."""
        return self._with(lambda v: v.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Run:
        return replace(
            self,
            values={j: change(v) for j, v in self.values.items()},
            rows={k: change(v) for k, v in self.rows.items()},
            reached=tuple((k, change(v)) for k, v in self.reached),
            seen=None if self.seen is None else (self.seen[0], change(self.seen[1]), change(self.seen[2])),
        )

    def __copy__(self) -> Run:
        return self._with(lambda v: v)

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self._with(torch.clone)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_ready"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file with the plan, the position and the vectors, for :func:`read_run`.

        A run read from the file and finished gives the same bits as an undisturbed run.
        """
        code, tensors = pack(self.plan)
        tensors |= {f"{OWN}value.{j}": v for j, v in self.values.items()}
        tensors |= {f"{OWN}row.{k}": v for k, v in self.rows.items()}
        seen = None if self.seen is None else self.seen[0]
        if self.seen is not None:
            tensors |= {f"{OWN}state": self.seen[1], f"{OWN}output": self.seen[2]}
        header = {"name": self.plan.name, "code": code, "schedule": self.plan.schedule.config()}
        own = {"prediction": self.prediction, "position": self.position, "seen": seen}
        return write_tensors(path, KIND, tensors, header | own)


def _fits(output: object, state: Tensor) -> bool:
    """Whether the checks of an output have nothing to say, as nearly always."""
    return (
        type(output) is Tensor
        and output.dtype == state.dtype
        and output.shape == state.shape
        and ((output.is_cpu and state.is_cpu) or output.device == state.device)
        and output.is_contiguous()
    )


def start(
    plan: Runnable,
    x: Tensor,
    prediction: str,
    conditioning: Mapping[str, Any] | None = None,
    keeps_seen: bool = True,
) -> Run:
    """The run of a plan from state x, at its first evaluation; see :meth:`iia_ode.Plan.start`."""
    check_state(x)
    rows = {k: table.rows(conditioning or {}, x) for k, table in plan.tables}
    run = Run(plan, prediction, {0: x.clone()}, rows, keeps_seen=keeps_seen)
    run.begin()
    return run
