"""A whole run as one CUDA graph: every kernel of the model and of the solver, launched at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..ode import ProbabilityFlowODE
from .checks import check_start
from .initial import check_size
from .plan import Plan

__all__ = ["Graph", "graph"]

_WARM_UP = 3  # runs before the capture, as torch advises: libraries choose their kernels in the first ones


class Graph:
    """A captured run; made by :func:`graph`.

    Attributes
    ----------
    plan : the plan.
    shape, dtype, device : of the initial states that a call takes.
    """

    def __init__(self, plan: Plan, ode: ProbabilityFlowODE, x: Tensor) -> None:
        self.plan = plan
        self.shape, self.dtype, self.device = tuple(x.shape), x.dtype, x.device
        self._x = x.detach().clone()

        def run() -> Tensor:
            return plan.run(ode, self._x, check_finite=False)

        with torch.no_grad():
            self._replay, self._final = _captured(run, x.device)

    def __call__(self, x: Tensor, *, check_finite: bool = True) -> Tensor:
        """Run the plan from new initial states.

        Parameters
        ----------
        x : initial states [B, ...], with the shape, dtype and device of the capture; not changed.
        check_finite : check the final state once, and warn if x is smaller than the noise at ``plan.grid[0]``.

        Returns
        -------
        A new tensor of final states [B, ...].

        Raises
        ------
        InputError : x does not fit the capture.
        NonFiniteError : the final state holds NaN or infinity. ``plan.run`` names the evaluation that made the first.
        """
        if not isinstance(x, Tensor) or (tuple(x.shape), x.dtype, x.device) != (self.shape, self.dtype, self.device):
            got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"this graph was captured for {self.dtype} {list(self.shape)} on {self.device}, got {got}: capture another "
                "graph, or change the batch."
            )
        self._x.copy_(x.detach())
        self._replay()
        final = self._final.clone()
        if check_finite:
            check_size(self.plan.schedule, self.plan.grid[0], x)
            low, high = torch.stack(torch.aminmax(final)).tolist()
            if not (math.isfinite(low) and math.isfinite(high)):
                raise NonFiniteError(
                    f"the final state of {self.plan.name} is not finite: plan.run(ode, x) names the first such evaluation."
                )
        return final


def graph(plan: Plan, ode: ProbabilityFlowODE, x: Tensor) -> Graph:
    """Capture a whole run, guidance included, in one CUDA graph.

    A call of the graph launches all kernels of the run at once, without Python. The gain is largest where the model's kernels
    are short. The graph has the conditions, the guidance scale and the addresses of the model's weights at the capture:
    weights may be changed in place, and other conditions need another graph. The model must be capturable: fixed shapes, no
    values read on the host. Gradients are not recorded.

    Parameters
    ----------
    plan : the plan.
    ode : the model on a CUDA device, with the conditions of the batch; its schedule must be the plan's.
    x : an example of initial states [B, ...] on the device, float32 or float64. The capture runs the plan from x a few times.

    Returns
    -------
    The :class:`Graph`, to be called with initial states.

    Raises
    ------
    InputError : x is not on a CUDA device, or not a float32 or float64 tensor with a batch dimension.
    MismatchError : the ODE has another schedule than the plan.

    Examples
    --------
    >>> run = iia_ode.plan.graph(fit.plan, ode, x)
    >>> x_0 = run(x)
    """
    check_start(ode, x)
    if x.device.type != "cuda":
        raise InputError(f"a CUDA graph needs states on a CUDA device, got {x.device}: use plan.run there.")
    return Graph(plan, ode, x)


def _captured(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """Capture a function without arguments; return the replay and the tensor that a replay writes."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            final = run()
    return captured.replay, final
