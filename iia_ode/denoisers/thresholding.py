"""Thresholding: the data estimates of a model kept within the range of the data, [-1, 1] [Saharia et al. 2022]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, check_share
from ..errors import InputError
from ..forms import Evaluation
from ..ode import ProbabilityFlowODE

__all__ = ["dynamic_thresholding", "static_thresholding"]


def dynamic_thresholding(ode: ProbabilityFlowODE, quantile: float = 0.995, floor: float = 1.0) -> ProbabilityFlowODE:
    """The ODE whose estimates of the data are dynamically thresholded [Saharia et al. 2022, section 2.3].

    For each sample, with s the larger of `floor` and the quantile of |D| over all elements of its estimate D, the estimate
    is clamped to [-s, s] and divided by s. It is for pixels in [-1, 1], where a large guidance scale drives estimates out
    of that range. It makes no sense in a latent space, whose values have no such range.

    Parameters
    ----------
    ode : with any prediction type; guidance acts before the threshold. Its model, ledger, conditions and guidance scale
        are shared, ``condition`` and ``subset`` work as before, and an evaluation still counts once.
    quantile : in [0, 1]; between two elements it is interpolated linearly. 0.995 in wide use.
    floor : the smallest s, positive. At 1, estimates whose quantile is within [-1, 1] are clamped to that and not rescaled.

    Returns
    -------
    An ODE of data prediction. Its :meth:`~iia_ode.ProbabilityFlowODE.fingerprint` names the threshold: what was fitted to
    the model without one was not fitted to this.

    Raises
    ------
    InputError : no ODE, one that is thresholded already, or arguments out of range.

    A thresholded model is not smooth: clamped elements have a kink in x, and s one wherever two elements change places. No
    solver keeps its order of convergence across a kink, so high orders gain less than on the plain model, and a reference
    needs tighter tolerances.
    """
    quantile = check_share("quantile", quantile, such_as=0.995)
    floor = check_number("floor", floor, above=0, such_as=1.0)
    return _ThresholdedODE(ode, quantile, floor)


def static_thresholding(ode: ProbabilityFlowODE) -> ProbabilityFlowODE:
    """The ODE whose estimates of the data are clamped to [-1, 1]; all else is as for :func:`dynamic_thresholding`.

    It saturates pixels where the dynamic threshold rescales them [Saharia et al. 2022, section 2.3].
    """
    return _ThresholdedODE(ode, None, 1.0)


class _ThresholdedODE(ProbabilityFlowODE):
    """An ODE of data prediction, over a model of any prediction type, with a threshold on what comes out.

    A subclass rather than a wrapped model, because the threshold must see guided estimates.
    """

    def __init__(self, ode: ProbabilityFlowODE, quantile: float | None, floor: float) -> None:
        if not isinstance(ode, ProbabilityFlowODE):
            raise InputError(f"thresholding needs a ProbabilityFlowODE, got {type(ode).__name__}.")
        if type(ode).output is not ProbabilityFlowODE.output:  # another threshold would be dropped without a word
            raise InputError(
                f"thresholding needs a plain ProbabilityFlowODE, got {type(ode).__name__}, which changes its model's output "
                "itself: apply one threshold, to the ODE without any."
            )
        super().__init__(ode.model, **ode.settings | {"prediction": "data"})
        self.ledger = ode.ledger
        self.model_prediction, self.quantile, self.floor = ode.prediction, quantile, floor

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The thresholded estimate of the data, guidance included, in the dtype of x; one evaluation."""
        made = super().output(x, t)
        data: Tensor = Evaluation(self.schedule, t, x, made, self.model_prediction).data
        if self.quantile is None:
            return data.clamp(-self.floor, self.floor) / self.floor
        bound = _bound(data, self.quantile, self.floor)
        return data.clamp(-bound, bound) / bound

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> ProbabilityFlowODE:
        view = super()._view(conditioning, unconditional)
        view.prediction = self.model_prediction
        return _ThresholdedODE(view, self.quantile, self.floor)

    def fingerprint(self) -> str:
        """That of the model, and the threshold."""
        threshold = "static" if self.quantile is None else f"dynamic({self.quantile}, {self.floor})"
        return f"{super().fingerprint()}+{threshold}"


def _bound(data: Tensor, quantile: float, floor: float) -> Tensor:
    """s of every sample of data [B, ...], in a shape that broadcasts against it."""
    size = math.prod(data.shape[1:])
    below = quantile * (size - 1)
    index = min(int(below), max(size - 2, 0))
    # From the top, since that is the short end: torch.quantile sorts everything, and refuses more than 16 million elements.
    top = data.abs().reshape(len(data), size).topk(size - index).values
    lower, upper = top[:, -1], top[:, max(size - index - 2, 0)]
    return torch.lerp(lower, upper, below - index).clamp(min=floor).reshape(-1, *[1] * (data.ndim - 1))
