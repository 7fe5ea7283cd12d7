"""Thresholding: keep a model's data estimates within the range of the data, [-1, 1] [Saharia et al. 2022]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_number, check_share
from ..errors import InputError
from ..ode import ProbabilityFlowODE
from ..ode.wrapped import Wrapped, layers_of

__all__ = ["dynamic_thresholding", "static_thresholding"]


def dynamic_thresholding(ode: ProbabilityFlowODE, quantile: float = 0.995, floor: float = 1.0) -> ProbabilityFlowODE:
    """Threshold an ODE's data estimates dynamically, sample by sample [Saharia et al. 2022, section 2.3].

    Each sample has its own bound s: the larger of `floor` and the quantile of |D| over all elements of the sample's data
    estimate D. The estimate is clamped to [-s, s] and divided by s. Dynamic thresholding is meant for pixels in [-1, 1],
    where a large guidance scale drives estimates out of range. Latent values have no fixed
    range, so thresholding is not for latent spaces.

    A thresholded model is not smooth. Clamped elements have a kink in x, and s has a kink wherever two elements change
    places. A kink lowers the order of convergence of every solver, so high orders gain less than on the plain model. A
    reference solution needs tighter tolerances.

    Parameters
    ----------
    ode : ODE with any prediction type. Guidance acts before the threshold. The new ODE shares the model, the ledger, the
        conditions and the guidance scale; ``condition`` and ``subset`` work as before, and an evaluation counts once.
    quantile : level of the quantile, a number in [0, 1]. Between two elements the quantile is interpolated linearly. The
        value 0.995 is in wide use.
    floor : smallest s, a positive number. With 1, an estimate whose quantile lies in [-1, 1] is clamped and not rescaled.

    Returns
    -------
    A :class:`~iia_ode.ProbabilityFlowODE` of data prediction. Its :meth:`~iia_ode.ProbabilityFlowODE.fingerprint`
    includes the threshold, so a solver fitted to the plain model does not match the thresholded one.

    Raises
    ------
    InputError : `ode` is no ProbabilityFlowODE or is thresholded already, or `quantile` or `floor` is out of range.
    """
    quantile = check_share("quantile", quantile, such_as=0.995)
    floor = check_number("floor", floor, above=0, such_as=1.0)
    return Thresholded(ode, quantile, floor)


def static_thresholding(ode: ProbabilityFlowODE) -> ProbabilityFlowODE:
    """Clamp an ODE's data estimates to [-1, 1].

    Static thresholding saturates pixels where :func:`dynamic_thresholding` rescales them [Saharia et al. 2022, section
    2.3].

    Parameters
    ----------
    ode : ODE with any prediction type, as for :func:`dynamic_thresholding`.

    Returns
    -------
    A :class:`~iia_ode.ProbabilityFlowODE` of data prediction, as from :func:`dynamic_thresholding`.

    Raises
    ------
    InputError : `ode` is no ProbabilityFlowODE or is thresholded already.
    """
    return Thresholded(ode, None, 1.0)


class Thresholded(Wrapped):
    """An ODE of data prediction over a model of any prediction type, with a threshold on its estimates of the data.

    The threshold acts on guided estimates.
    """

    def __init__(self, inner: ProbabilityFlowODE, quantile: float | None, floor: float) -> None:
        super().__init__(inner)
        if any(isinstance(layer, Thresholded) for layer in layers_of(inner)):
            raise InputError("this ODE is thresholded already: apply one threshold, to the ODE without any.")
        self.prediction, self.quantile, self.floor = "data", quantile, floor

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The thresholded estimate of the data, guidance included, in the dtype of x; one evaluation."""
        data = self.inner.data(x, t)
        if self.quantile is None:
            return data.clamp(-self.floor, self.floor) / self.floor
        bound = _bound(data, self.quantile, self.floor)
        return data.clamp(-bound, bound) / bound


def _bound(data: Tensor, quantile: float, floor: float) -> Tensor:
    """s of every sample of data [B, ...], in a shape that broadcasts against it."""
    size = math.prod(data.shape[1:])
    below = quantile * (size - 1)
    index = min(int(below), max(size - 2, 0))
    # From the top, since that is the short end: torch.quantile sorts everything, and refuses more than 16 million elements.
    top = data.abs().reshape(len(data), size).topk(size - index).values
    lower, upper = top[:, -1], top[:, max(size - index - 2, 0)]
    return torch.lerp(lower, upper, below - index).clamp(min=floor).reshape(-1, *[1] * (data.ndim - 1))
