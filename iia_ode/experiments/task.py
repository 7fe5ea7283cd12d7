"""The task of a comparison: a model, its unseen states, the states to fit on, and the accurate final states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import sample_seeds, seeded_noise
from ..ode import ProbabilityFlowODE
from ..plan import check_start
from ..reference import solve
from ..sizes import size_of_data, smallest_level
from .settings import Setting, batch_seed

__all__ = ["Task", "of_ode", "of_setting"]


@dataclass(frozen=True)
class Task:
    """A model with the unseen states of a comparison, and the states to fit on."""

    name: str
    ode: ProbabilityFlowODE
    x: Tensor
    fit_ode: ProbabilityFlowODE | None  # None: drawn when the first fit asks
    fit_x: Tensor | None
    reference: Tensor | None
    sigma_min: float | None  # None: told by the size of the data
    sigma_max: float | None  # level of x; None if unknown
    tolerance: float

    def lowest(self, t: float) -> float:
        """Level sigma/alpha at which references and teachers end, for states x at time t."""
        if self.sigma_min is not None:
            return self.sigma_min
        return smallest_level(
            self.ode.schedule, size_of_data(self.ode, self.x, t, smallest_level(self.ode.schedule, 0.0))
        )

    def accurate(self, ends: tuple[float, float], say: Callable[[str], None]) -> Tensor:
        """The accurate final states."""
        if self.reference is not None:
            return self.reference
        say(f"reference: {len(self.x)} unseen samples by dopri8, tolerance {self.tolerance:g}")
        return solve(self.ode, self.x, *ends, rtol=self.tolerance, atol=self.tolerance, sigma_min=self.lowest(ends[0]))

    def states(self, n: int, start: float, seed: int) -> tuple[ProbabilityFlowODE, Tensor]:
        """The ODE and the states to fit on: the given states, or `n` draws at the time `start`."""
        if self.fit_ode is not None and self.fit_x is not None:
            return self.fit_ode, self.fit_x
        noise = seeded_noise(sample_seeds(seed, range(n)), self.x.shape[1:], dtype=self.x.dtype, device=self.x.device)
        return _spread(self.ode, len(self.x), n), self.ode.schedule.sigma(start) * noise


def of_setting(
    setting: Setting, samples: int, fit_samples: int, tolerance: float | None, scale: float, seed: int, device: str
) -> Task:
    """The task of a setting."""
    (fit_ode, fit_x), (ode, x) = (
        setting.draw(n, batch_seed(seed, unseen=unseen), guidance_scale=scale, device=device)
        for n, unseen in ((fit_samples, False), (samples, True))
    )
    accuracy = setting.reference_tolerance if tolerance is None else tolerance
    return Task(setting.name, ode, x, fit_ode, fit_x, None, setting.sigma_min, setting.sigma_max, accuracy)


def of_ode(
    ode: ProbabilityFlowODE,
    x: Tensor | None,
    fit_x: Tensor | None,
    reference: Tensor | None,
    sigma_min: float | None,
    tolerance: float | None,
    name: str | None,
) -> Task:
    """The task of a model of one's own."""
    if x is None:
        raise InputError("compare needs the unseen initial states of the ODE: x=sigma * torch.randn(64, *shape).")
    check_start(ode, x)
    fit_ode = None
    if fit_x is not None:
        if not isinstance(fit_x, Tensor) or not fit_x.ndim:
            raise InputError(f"fit_x must be initial states [B, ...], got {type(fit_x).__name__}.")
        fit_ode = _spread(ode, len(x), len(fit_x))
        check_start(fit_ode, fit_x)
        if x.shape[1:] != fit_x.shape[1:]:
            raise InputError(f"x {list(x.shape)} and fit_x {list(fit_x.shape)} must have samples of one shape.")
        if _rows(x) & _rows(fit_x):
            raise InputError(
                "fit_x and x share samples: fits must not see the noise of the measurement. Draw them apart."
            )
    if reference is not None and (not isinstance(reference, Tensor) or reference.shape != x.shape):
        got = list(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise InputError(f"reference must have the shape of x, {list(x.shape)}, got {got}.")
    exact = ode.compute_dtype(x) == torch.float64
    return Task(
        getattr(ode.model, "__name__", type(ode.model).__name__).strip("_<>") if name is None else name,
        ode,
        x,
        fit_ode,
        fit_x,
        reference,
        sigma_min,
        None,
        (1e-8 if exact else 1e-6) if tolerance is None else tolerance,
    )


def _rows(x: Tensor) -> set[bytes]:
    """The samples of a batch as bytes."""
    return {row.numpy().tobytes() for row in x.detach().double().flatten(1).cpu()}


def _spread(ode: ProbabilityFlowODE, given: int, n: int) -> ProbabilityFlowODE:
    """The ODE with the conditions of `given` samples reused evenly for `n`."""
    return ode.subset(torch.arange(n, device="cpu") * given // n, given)
