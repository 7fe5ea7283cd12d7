"""Settings of experiments: a model, a schedule, a range of noise levels, and a way to draw initial states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..denoisers import EDMDenoiser, digits, fashion, patches
from ..errors import InputError, unknown_name
from ..noise import generator_of
from ..ode import ProbabilityFlowODE
from ..problems import Gaussian, Mixture, Problem
from ..schedules import EDM, Schedule

__all__ = ["DrawnSetting", "Setting", "batch_seed", "get_setting", "setting_names"]


class Setting(ABC):
    """A model to experiment on, with its noise.

    Attributes
    ----------
    name : name of the setting.
    schedule : noise schedule of the model.
    sigma_min, sigma_max : smallest and largest noise level sigma/alpha of a run.
    reference_tolerance : relative and absolute tolerance of reference solutions, no smaller than the model's rounding.
    is_image : whether states are images [C, H, W] in [-1, 1].
    is_closed_form : whether the model is a closed-form denoiser, so an evaluation costs next to nothing.
    """

    name: str
    schedule: Schedule = EDM()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    reference_tolerance: float = 1e-8
    is_image: bool = False
    is_closed_form: bool = False

    @abstractmethod
    def draw(
        self, n: int, seed: int, *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """Draw n conditions and n initial states at noise level `sigma_max`.

        Parameters
        ----------
        n : number of samples.
        seed : seed of conditions and states. Equal seeds give equal draws on every device.
        guidance_scale : scale of classifier-free guidance; 1 is no guidance.
        device : device of the model and the states.

        Returns
        -------
        The :class:`~iia_ode.ProbabilityFlowODE` under the conditions, and the states [n, ...].

        Raises
        ------
        InputError : guidance is requested and the setting has no conditions.
        """

    @abstractmethod
    def draw_each(
        self, seeds: Sequence[int], *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """Draw conditions and initial states with a seed per sample: sample k depends on ``seeds[k]`` alone.

        Parameters
        ----------
        seeds : seed of each sample, such as those from :func:`iia_ode.noise.sample_seeds`.
        guidance_scale : scale of classifier-free guidance; 1 is no guidance.
        device : device of the model and the states.

        Returns
        -------
        The :class:`~iia_ode.ProbabilityFlowODE` under the conditions, and the states [len(seeds), ...].

        Raises
        ------
        InputError : `seeds` is empty, or guidance is requested and the setting has no conditions.
        """


class DrawnSetting(Setting):
    """A setting whose conditions and states come from a generator of random numbers."""

    def draw(
        self, n: int, seed: int, *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """Draw n conditions and n initial states from the generator of a seed."""
        conditions, x = self._states(n, generator_of(seed))
        return self._ode(conditions, guidance_scale, device), x.to(device)

    def draw_each(
        self, seeds: Sequence[int], *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """Draw conditions and initial states, each sample from the generator of its own seed."""
        if not seeds:
            raise InputError("a batch needs at least one sample: give at least one seed.")
        parts = [self._states(1, generator_of(seed)) for seed in seeds]
        conditions = {key: torch.cat([own[key] for own, _ in parts]) for key in parts[0][0]}
        return self._ode(conditions, guidance_scale, device), torch.cat([x for _, x in parts]).to(device)

    @abstractmethod
    def _states(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Draw n conditions and initial states, on the CPU."""

    @abstractmethod
    def _ode(self, conditions: dict[str, Tensor], guidance_scale: float, device: str) -> ProbabilityFlowODE:
        """Build the ODE of the model under these conditions."""

    def _refuse_guidance(self, guidance_scale: float) -> None:
        if guidance_scale != 1.0:
            raise InputError(f"{self.name} has no conditions to guide by: leave the guidance scale at 1.")


class _Trained(DrawnSetting):
    """A trained network over images, with float32 states."""

    reference_tolerance = 1e-6
    is_image = True

    def __init__(self, name: str, load: Callable[[], EDMDenoiser]) -> None:
        self.name, self._load = name, load

    @cached_property
    def _model(self) -> EDMDenoiser:
        return self._load()

    def _states(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Draw labels if the network has classes, then noise."""
        conditions = {}
        if classes := self._model.network.classes:
            conditions["class_labels"] = torch.randint(classes, (n,), generator=generator, device="cpu")
        shape = (n, *(self._model.state_shape or ()))
        return conditions, self.sigma_max * torch.randn(shape, generator=generator, device="cpu")

    def _ode(self, conditions: dict[str, Tensor], guidance_scale: float, device: str) -> ProbabilityFlowODE:
        options: dict[str, Any] = {}
        if conditions:
            options = {
                "conditioning": {key: value.to(device) for key, value in conditions.items()},
                "unconditional": {"class_labels": torch.tensor([self._model.network.classes], device=device)},
                "guidance_scale": guidance_scale,
            }
        else:
            self._refuse_guidance(guidance_scale)
        return ProbabilityFlowODE(self._model.to(device), self.schedule, "data", **options)


class _ClosedForm(DrawnSetting):
    """A problem with a closed-form denoiser and float64 states."""

    is_closed_form = True

    def __init__(self, name: str, problem: Problem) -> None:
        self.name, self.problem = name, problem

    def _states(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Draw states from the true marginal at `sigma_max`."""
        with torch.device("cpu"):
            t = self.schedule.t_of_noise_to_signal(self.sigma_max)
            return {}, self.problem.noisy(n, self.schedule, t, generator)

    def _ode(self, conditions: dict[str, Tensor], guidance_scale: float, device: str) -> ProbabilityFlowODE:
        self._refuse_guidance(guidance_scale)
        return self.problem.ode(self.schedule)


def _mixture(dimension: int, components: int) -> Mixture:
    generator = torch.Generator("cpu").manual_seed(0)
    means = torch.randn((components, dimension), generator=generator, dtype=torch.float64)
    stds = 0.1 + 0.2 * torch.rand((components, dimension), generator=generator, dtype=torch.float64)
    return Mixture(torch.ones(components, dtype=torch.float64), means, stds)


def _gaussian(dimension: int) -> Gaussian:
    mean = torch.linspace(-1, 1, dimension, dtype=torch.float64)
    return Gaussian(mean, torch.logspace(-2, 0, dimension, dtype=torch.float64))


def _mixture64() -> Mixture:
    """Build a mixture of ten isotropic Gaussians in 64 dimensions, with means in a random subspace of 8 dimensions."""
    generator = torch.Generator("cpu").manual_seed(0)
    place = torch.randn((10, 8), generator=generator, dtype=torch.float64)
    basis = torch.randn((8, 64), generator=generator, dtype=torch.float64) / 8**0.5
    stds = torch.linspace(0.1, 0.3, 10, dtype=torch.float64)[:, None].expand(10, 64)
    return Mixture(torch.ones(10, dtype=torch.float64), place @ basis, stds)


_SETTINGS: dict[str, Callable[[str], Setting]] = {
    "digits": lambda name: _Trained(name, digits),
    "fashion": lambda name: _Trained(name, fashion),
    "fashion-halfway": lambda name: _Trained(name, partial(fashion, halfway=True)),
    "gaussian": lambda name: _ClosedForm(name, _gaussian(dimension=8)),
    "mixture": lambda name: _ClosedForm(name, _mixture(dimension=8, components=6)),
    "mixture64": lambda name: _ClosedForm(name, _mixture64()),
    "patches": lambda name: _Trained(name, patches),
}


def batch_seed(seed: int, *, unseen: bool) -> int:
    """Choose the seed of a batch: even for fits, odd for measurements, so fits never see the noise of any measurement.

    Parameters
    ----------
    seed : seed of the experiment.
    unseen : whether the batch is for measurements.

    Returns
    -------
    ``2 * seed + unseen``.
    """
    return 2 * seed + unseen


def get_setting(name: str) -> Setting:
    """Make a setting by name.

    ``digits``, ``fashion`` and ``patches`` are the trained networks of :mod:`iia_ode.denoisers`; ``fashion-halfway`` has the
    weights of ``fashion`` after half of the training. ``mixture`` and ``gaussian`` have
    closed-form denoisers in 8 dimensions. ``mixture64`` has a closed-form denoiser too: 10 Gaussians in 64 dimensions, with
    means in a subspace of 8 dimensions.

    Parameters
    ----------
    name : name of the setting.

    Returns
    -------
    A new :class:`Setting`.

    Raises
    ------
    UnknownNameError : no such setting.
    """
    if name not in _SETTINGS:
        raise unknown_name("setting", name, setting_names())
    with torch.device("cpu"):  # whatever the default device is
        return _SETTINGS[name](name)


def setting_names() -> list[str]:
    """List the names of all settings."""
    return list(_SETTINGS)
