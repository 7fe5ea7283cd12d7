"""Runs with a grid per sample: one model call serves all samples, each at its own time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import GridError, InputError, NonFiniteError
from ..ode import ProbabilityFlowODE
from ..ode.mode import check_mode
from ..transforms import carries_derivative, readable
from .callbacks import Callback, notifier
from .checks import check_constants, check_start, factors_at, samples_of
from .initial import warn_of_sizes
from .instructions import Combine, Evaluate
from .plan import Plan
from .tracer import Steppable, traced
from .vectors import is_number

__all__ = ["run_rows"]

_F64 = torch.float64


def run_rows(
    ode: ProbabilityFlowODE,
    x: Tensor,
    grids: Tensor,
    solver: Steppable,
    *,
    trajectory: bool = False,
    check_finite: bool = True,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Run a solver from states x [B, ...], each on its own grid.

    Samples with programs of one structure share each model call, with times [B] and weights per sample. Some solvers take
    another first step from alpha = 0. A grid that starts there then has a program of another structure, and its samples have
    separate model calls.

    Parameters
    ----------
    ode, x, trajectory, check_finite, callback, progress : as for :meth:`iia_ode.Plan.run`; the callback gets float64 times
        [B] on the host.
    grids : float64 times [B, N + 1], or [1, N + 1] for all samples.
    solver : the solver.

    Returns
    -------
    The final states, [B, ...], or the states at all grid points, [N + 1, B, ...].

    Raises
    ------
    GridError : the grids are not usable, or their number is not the number of samples.
    InputError : x is not a float32 or float64 tensor with a batch dimension.
    NonFiniteError : a final state holds NaN or infinity; the message names the samples.

    Warns
    -----
    StateSizeWarning : the states of some samples are smaller than the noise at the starts of their grids.
    """
    check_start(ode, x)
    check_mode(ode)
    if carries_derivative(grids) and torch.is_grad_enabled():
        raise InputError("the times of a plan are numbers, to which no gradient flows: pass grid.detach().")
    if len(grids) not in (1, len(x)):
        raise GridError(f"grids per sample are [B, N + 1] times, got {list(grids.shape)} for {len(x)} samples.")
    check_constants(ode.schedule)
    rows = grids.detach().to("cpu", _F64).expand(len(x), -1)
    plans = [traced(solver, ode.schedule, row) for row in rows]
    places: dict[Any, list[int]] = {}
    for i, plan in enumerate(plans):
        places.setdefault(_structure(plan), []).append(i)
    notify, groups = notifier(callback), []
    calls = sum(plans[own[0]].nfe for own in places.values())
    with tqdm(total=calls, desc=solver.label, disable=not progress) as bar:
        for own in places.values():
            index = torch.tensor(own, device="cpu")
            part, start = (ode, x) if len(own) == len(x) else (ode.subset(index, len(x)), x[index.to(x.device)])
            groups.append(_Group(part, start, [plans[i] for i in own], index, notify.takes_data, bar.update))
        walks = [group.states() for group in groups]
        states = [x]
        for k in range(1, rows.shape[1]):
            state = _merged([next(walk) for walk in walks], groups, x)
            if trajectory:
                states.append(state)
            notify(k, rows[:, k], state, lambda: _merged([d for g in groups if (d := g.data()) is not None], groups, x))
    if check_finite and readable(state):
        warn_of_sizes(ode.schedule, rows[:, 0].tolist(), x)
        finite = state.detach().reshape(len(x), -1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteError(
                f"{solver.label} ended in NaN or infinity in {samples_of((~finite).nonzero()[:, 0].tolist())}: check the "
                "model over the noise levels of their grids, and the initial states."
            )
    return torch.stack(states) if trajectory else state


def _structure(plan: Plan) -> tuple[Any, ...]:
    """The program of a plan without its times, forms and weights."""
    return tuple(("evaluate", ins.state) if isinstance(ins, Evaluate) else ("combine", ins.step) for ins in plan.code)


def _merged(parts: Sequence[Tensor], groups: Sequence[_Group], x: Tensor) -> Tensor:
    """The states of all groups in the order of the batch."""
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([group.index for group in groups]).argsort()
    return torch.cat(list(parts))[order.to(x.device)]


@dataclass(eq=False)
class _Group:
    """Samples with programs of one structure.

    Attributes
    ----------
    ode, x : the ODE and the initial states of the samples.
    plans : a plan per sample.
    index : places of the samples in the batch.
    keeps_seen : whether the last evaluation is kept, for :meth:`data`.
    count : called after each model call.
    """

    ode: ProbabilityFlowODE
    x: Tensor
    plans: list[Plan]
    index: Tensor
    keeps_seen: bool
    count: Callable[[], object]
    seen: tuple[Tensor, Tensor, list[float]] | None = None

    def states(self) -> Iterator[Tensor]:
        """Run the samples; yields their states [B, ...] at each grid point after the first."""
        values, code = {0: self.x}, list(zip(*(plan.code for plan in self.plans), strict=True))
        last = {j: k for k, row in enumerate(code, start=1) for ins in row for j in ins.reads}
        for k, row in enumerate(code, start=1):
            if isinstance(row[0], Evaluate):
                values[k] = self._evaluated(values[row[0].state], [ins for ins in row if isinstance(ins, Evaluate)])
            else:
                values[k] = self._combined(values, [ins for ins in row if isinstance(ins, Combine)])
                if row[0].step is not None:
                    yield values[k]
            for j in [j for j in values if last.get(j, 0) <= k and j != k]:
                del values[j]

    def data(self) -> Tensor | None:
        """Estimates of x_0 by the last evaluation, [B, ...]; None before the first."""
        if self.seen is None:
            return None
        state, output, times = self.seen
        return self._converted(state, output, times, ["data"] * len(times))

    def _evaluated(self, state: Tensor, row: list[Evaluate]) -> Tensor:
        times = [ins.t for ins in row]
        output = self.ode.output(state, torch.tensor(times, dtype=_F64, device="cpu"))
        self.count()
        self.seen = (state, output, times) if self.keeps_seen else None
        return self._converted(state, output, times, [ins.form for ins in row])

    def _converted(self, state: Tensor, output: Tensor, times: list[float], forms: list[str]) -> Tensor:
        """A model's output in the form of each sample."""
        schedule, prediction = self.ode.schedule, self.ode.prediction
        factors = [factors_at(schedule, t, prediction, form) for t, form in zip(times, forms, strict=True)]
        p, q = (_spread(list(column), state) for column in zip(*factors, strict=True))
        return p * state + q * output

    def _combined(self, values: dict[int, Tensor], row: list[Combine]) -> Tensor:
        total = torch.zeros_like(self.x)
        for j in dict.fromkeys(j for ins in row for j in ins.reads):
            total = total + _spread([dict(ins.terms).get(j, 0.0) for ins in row], self.x) * values[j]
        if any(ins.constant is not None for ins in row):
            total = total + _spread([0.0 if ins.constant is None else ins.constant for ins in row], self.x)
        return total


def _spread(weights: list[Any], like: Tensor) -> Tensor:
    """A weight per sample, broadcast over the components of `like` [B, ...], in its dtype and on its device."""
    n = like.ndim - 1
    if all(is_number(w) for w in weights):
        return torch.tensor(weights, dtype=_F64, device="cpu").to(like.dtype).to(like.device).reshape(-1, *[1] * n)
    parts = [torch.as_tensor(w, dtype=_F64, device="cpu") for w in weights]
    parts = [w.reshape(*[1] * (n - w.ndim), *w.shape) for w in parts]
    return torch.stack(torch.broadcast_tensors(*parts)).to(like.dtype).to(like.device)  # type: ignore[no-untyped-call]
