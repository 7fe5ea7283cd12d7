"""Products with the Jacobian of a model's output, by differentiation, and their comparison with differences."""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import InputError
from .metrics import flat
from .ode import ProbabilityFlowODE
from .plan.initial import root_mean_square

__all__ = ["Forward", "Products", "Reverse", "check_derivatives", "rounding_of"]

_F64 = torch.float64
_CHECKED = 8  # samples whose derivatives are compared with differences
_CUT = 0.3  # relative difference of the two that shows a cut derivative
_ROUNDED = 30.0  # times the rounding of a difference that counts as rounding


class Products(Protocol):
    """Products with the Jacobian of the model's output."""

    def diagonal(self, ode: ProbabilityFlowODE, x: Tensor, t: float, signs: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and a Hutchinson estimate of the Jacobian's diagonal from Rademacher probes [probes, B, ...]."""

    def along(self, ode: ProbabilityFlowODE, x: Tensor, t: float, dx: Tensor, dt: float) -> Tensor:
        """The derivative of the output in the direction (dx, dt)."""


class Forward:
    """By forward differentiation: exact, at the price of an evaluation or two."""

    def diagonal(self, ode: ProbabilityFlowODE, x: Tensor, t: float, signs: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Products.diagonal`; an evaluation per probe."""
        products = [_jvp(ode, x, t, v, 0.0) for v in signs]
        return products[0][0], torch.stack([v * jv for v, (_, jv) in zip(signs, products, strict=True)]).mean(0)

    def along(self, ode: ProbabilityFlowODE, x: Tensor, t: float, dx: Tensor, dt: float) -> Tensor:
        """See :meth:`Products.along`; one evaluation."""
        return _jvp(ode, x, t, dx, dt)[1]


class Reverse:
    """Reverse differentiation, since the Jacobian and its transpose have the same diagonal, and central differences."""

    def diagonal(self, ode: ProbabilityFlowODE, x: Tensor, t: float, signs: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Products.diagonal`; one evaluation, and a backward pass per probe."""
        with torch.enable_grad():
            state = x.detach().clone().requires_grad_()
            out = ode.output(state, t)
            products = [v * torch.autograd.grad(out, state, v, retain_graph=True)[0] for v in signs]
        return out.detach(), torch.stack(products).mean(0)

    def along(self, ode: ProbabilityFlowODE, x: Tensor, t: float, dx: Tensor, dt: float) -> Tensor:
        """See :meth:`Products.along`; two evaluations."""
        step = rounding_of(ode, x) ** (1 / 3)  # balances truncation and rounding
        schedule = ode.schedule
        ahead, behind = (h if schedule.covers(u := t + h * dt) and schedule.knows(u) else 0.0 for h in (step, -step))
        return (ode.output(x + ahead * dx, t + ahead * dt) - ode.output(x + behind * dx, t + behind * dt)) / (
            ahead - behind
        )


def _jvp(ode: ProbabilityFlowODE, x: Tensor, t: float, dx: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """The output at (x, t) and its derivative in the direction (dx, dt)."""
    make_dual: Any = forward_ad.make_dual  # torch leaves it without types
    unpack_dual: Any = forward_ad.unpack_dual
    time, tangent = (torch.tensor(v, dtype=_F64, device=x.device) for v in (t, dt))
    with warnings.catch_warnings():
        # torch scripts its own decompositions when forward differentiation is first used, and warns about that.
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        # Of the attention kernels only the plain one has forward derivatives everywhere.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            out = ode.output(make_dual(x, dx), make_dual(time, tangent))
            value, derivative = unpack_dual(out)
    return value, torch.zeros_like(value) if derivative is None else derivative


def check_derivatives(ode: ProbabilityFlowODE, x: Tensor, t: float, signs: Tensor, products: Products) -> None:
    """Raise InputError if the model cuts its derivatives: differentiation and differences of a few outputs do not agree.

    Parameters
    ----------
    ode, x, t : the model, its states [B, ...] and their time.
    signs : Rademacher probes [probes, B, ...].
    products : the differentiation to check.
    """
    part = slice(0, _CHECKED)
    own, state, v = ode.subset(part, len(x)), x[part], signs[0, part]
    out, diagonal = products.diagonal(own, state, t, v[None])
    eps, size = rounding_of(ode, x), root_mean_square(state)
    step = eps ** (1 / 3) * size
    difference = v * (own.output(state + step * v, t) - own.output(state - step * v, t)) / (2 * step)
    # Per sample, the mean of the estimated diagonal: forward and reverse products agree in the mean alone.
    found, expected = flat(diagonal).mean(1), flat(difference).mean(1)
    rounding = _ROUNDED * eps * root_mean_square(out) / step * math.sqrt(len(state))
    if bool((found - expected).norm() > _CUT * max(found.norm(), expected.norm()) + rounding):
        again = own.output(state, t)
        if bool((again - out).norm() > _ROUNDED * eps * out.norm()):
            return  # random outputs have no derivative by differences
        raise InputError(
            f"the model cuts its derivatives: at t = {t:.4g} the mean derivative of a component of its output by itself is "
            f"{float(found.mean()):.3g} by differentiation and {float(expected.mean()):.3g} by differences. Give a model "
            "without detach, torch.no_grad and rounding between its input and its output."
        )


def rounding_of(ode: ProbabilityFlowODE, x: Tensor) -> float:
    """Relative rounding of the model for float64 states x."""
    return float(torch.finfo(ode.compute_dtype(x)).eps)
