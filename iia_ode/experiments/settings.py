"""The settings that experiments run on: a model, a schedule, a range of noise levels, and how to draw initial states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from ..denoisers import EDMDenoiser, digits
from ..errors import InputError, unknown_name
from ..ode import ProbabilityFlowODE
from ..problems import Gaussian, Mixture, Problem
from ..schedules import EDM, Schedule

__all__ = ["Setting", "batch_seed", "get_setting", "setting_names"]


class Setting(ABC):
    """What an experiment needs to know of a problem.

    Attributes
    ----------
    sigma_min, sigma_max : noise levels sigma/alpha between which the model is to be used.
    reference_tolerance : of the reference integration; no smaller than the model's own rounding allows.
    is_image : whether states are images [C, H, W] in [-1, 1].
    """

    name: str
    schedule: Schedule = EDM()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    reference_tolerance: float = 1e-8
    is_image: bool = False

    @abstractmethod
    def draw(
        self, n: int, seed: int, *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """An ODE with n conditions, and n initial states at `sigma_max`; both from `seed`, the same on every device."""


class _Digits(Setting):
    """The trained digits denoiser with random labels; float32 states."""

    name = "digits"
    reference_tolerance = 1e-6
    is_image = True

    @cached_property
    def _model(self) -> EDMDenoiser:
        return digits()

    def draw(
        self, n: int, seed: int, *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """Labels and noise from one generator."""
        generator = torch.Generator("cpu").manual_seed(seed)
        labels = torch.randint(10, (n,), generator=generator, device="cpu")
        x = self.sigma_max * torch.randn((n, 1, 8, 8), generator=generator, device="cpu")
        ode = ProbabilityFlowODE(
            self._model.to(device),
            self.schedule,
            "data",
            conditioning={"class_labels": labels.to(device)},
            unconditional={"class_labels": torch.tensor([10], device=device)},
            guidance_scale=guidance_scale,
        )
        return ode, x.to(device)


class _ClosedForm(Setting):
    """A problem with a closed-form denoiser; float64 states."""

    def __init__(self, name: str, problem: Problem) -> None:
        self.name, self.problem = name, problem

    def draw(
        self, n: int, seed: int, *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """States from the true marginal at `sigma_max`."""
        if guidance_scale != 1.0:
            raise InputError(f"{self.name} has no conditions to guide by: leave the guidance scale at 1.")
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.device("cpu"):
            x = self.problem.noisy(n, self.schedule, self.schedule.t_of_noise_to_signal(self.sigma_max), generator)
        return self.problem.ode(self.schedule), x.to(device)


def _mixture(dimension: int, components: int) -> Mixture:
    generator = torch.Generator("cpu").manual_seed(0)
    means = torch.randn((components, dimension), generator=generator, dtype=torch.float64)
    stds = 0.1 + 0.2 * torch.rand((components, dimension), generator=generator, dtype=torch.float64)
    return Mixture(torch.ones(components, dtype=torch.float64), means, stds)


def _build(name: str) -> Setting:
    match name:
        case "digits":
            return _Digits()
        case "mixture":
            return _ClosedForm("mixture", _mixture(dimension=8, components=6))
        case "gaussian":
            variance = torch.logspace(-2, 0, 8, dtype=torch.float64)
            return _ClosedForm("gaussian", Gaussian(torch.linspace(-1, 1, 8, dtype=torch.float64), variance))
    raise unknown_name("setting", name, setting_names())


def batch_seed(seed: int, *, unseen: bool) -> int:
    """The seed to draw with: even for fits and odd for measuring, so that no user's fit has seen another's test noise."""
    return 2 * seed + unseen


def get_setting(name: str) -> Setting:
    """The setting of that name: ``digits`` (the trained network), ``mixture`` or ``gaussian`` (closed form, 8 dimensions).

    Raises
    ------
    UnknownNameError : another name.
    """
    with torch.device("cpu"):  # whatever the default device is
        return _build(name)


def setting_names() -> list[str]:
    """Names of all settings."""
    return ["digits", "gaussian", "mixture"]
