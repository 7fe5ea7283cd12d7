"""Noise with converged final states, and the distance of samples from the data, shared by experiments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoisers import digits_classifier, fashion_classifier
from ..errors import GridError
from ..experiments import Setting, batch_seed, get_setting
from ..experiments.compare import compare
from ..experiments.results import Comparison
from ..grids import karras
from ..iia import FittedSolver
from ..integrate import sample
from ..metrics import FeatureStatistics, frechet_distance, image_features
from ..ode import ProbabilityFlowODE
from ..plan import Plan
from ..reference import solve
from ..solvers import Solver
from ..teacher import Teacher

__all__ = [
    "Unseen",
    "compared",
    "drawn",
    "fitting",
    "frechet",
    "karras_within",
    "part_of",
    "setting_of",
    "squares",
    "unseen",
]

CHUNK = 64
"""Samples per call of a network: fast on a CPU."""


@dataclass(frozen=True, eq=False)
class Unseen:
    """Noise that no fit has seen, with converged final states.

    Attributes
    ----------
    setting : the setting.
    ode : its ODE, with the conditions of the samples.
    x : initial states [B, ...].
    final : converged final states [B, ...].
    """

    setting: Setting
    ode: ProbabilityFlowODE
    x: Tensor
    final: Tensor

    @property
    def start(self) -> float:
        """The time of the initial states."""
        return self.setting.schedule.t_of_noise_to_signal(self.setting.sigma_max)


@cache
def setting_of(name: str) -> Setting:
    """The setting, made once."""
    return get_setting(name)


@cache
def unseen(name: str, samples: int, seed: int, *, guidance_scale: float = 1.0, steps: int = 40) -> Unseen:
    """Draw noise to measure on, and solve it: dopri8 for closed forms, `steps` steps of the teacher's method for networks."""
    setting = setting_of(name)
    if not setting.is_closed_form:
        return drawn(name, samples, seed, unseen=True, steps=steps, guidance_scale=guidance_scale)
    ode, x = setting.draw(samples, batch_seed(seed, unseen=True), guidance_scale=guidance_scale)
    batch, end, tolerance = Unseen(setting, ode, x, x), setting.schedule.t_data, setting.reference_tolerance
    final = solve(ode, x, batch.start, end, rtol=tolerance, atol=tolerance, sigma_min=setting.sigma_min)
    return Unseen(setting, ode, x, final)


def fitting(name: str, samples: int, seed: int, *, guidance_scale: float = 1.0) -> tuple[ProbabilityFlowODE, Tensor]:
    """Draw noise to fit on; no measurement sees it."""
    return setting_of(name).draw(samples, batch_seed(seed, unseen=False), guidance_scale=guidance_scale)


def compared(
    batch: Unseen, solvers: Any, nfes: Any, fit_samples: int, seed: int, folder: Path, **options: Any
) -> Comparison:
    """Compare solvers on unseen noise; fits see the noise of :func:`fitting`. The folder keeps finished cells."""
    setting = batch.setting
    _, fit_x = fitting(setting.name, fit_samples, seed)
    return compare(
        batch.ode,
        solvers,
        nfes,
        x=batch.x,
        fit_x=fit_x,
        reference=batch.final,
        sigma_min=setting.sigma_min,
        sigma_max=setting.sigma_max,
        seed=seed,
        name=setting.name,
        repeats=0,
        resume=folder,
        **options,
    )


def frechet(name: str, images: Tensor) -> float:
    """Frechet distance of images of a setting from its training images, on the features of the packaged classifier.

    Features, statistics and digits of another kind than those of Inception networks: values compare within a setting, at
    equal numbers of images.
    """
    features, data = _ruler(name)
    return frechet_distance(FeatureStatistics.of(image_features(images, features)), data)


def has_frechet(name: str) -> bool:
    """Whether the package has a classifier for a setting."""
    return name.split("-")[0] in ("digits", "fashion")


@cache
def _ruler(name: str) -> tuple[Any, FeatureStatistics]:
    """Features and their statistics over the training images."""
    classifier = {"digits": digits_classifier, "fashion": fashion_classifier}[name.split("-")[0]]()
    return classifier.features, FeatureStatistics(classifier.mean, classifier.covariance)


def one_thread() -> None:
    """Small networks are fastest on a thread; two experiments at a time then use two cores."""
    torch.set_num_threads(1)


@cache
def drawn(name: str, samples: int, seed: int, *, unseen: bool, steps: int, guidance_scale: float = 1.0) -> Unseen:
    """Draw noise to fit on (`unseen` False) or to measure on, and solve it with `steps` steps of the teacher's method.

    With 200 steps the final states of ``mixture64`` have an RMS error of 2e-5, for a tenth of the time of dopri8.
    """
    setting = setting_of(name)
    ode, x = setting.draw(samples, batch_seed(seed, unseen=unseen), guidance_scale=guidance_scale)
    batch = Unseen(setting, ode, x, x)
    end, chunk = setting.schedule.t_data, None if setting.is_closed_form else CHUNK
    taught = Teacher.solve(ode, x, batch.start, end, steps=steps, sigma_min=setting.sigma_min, chunk_size=chunk)
    return Unseen(setting, ode, x, taught.final)


def part_of(batch: Unseen, first: int, last: int) -> Unseen:
    """The samples from `first` to before `last`."""
    part = slice(first, last)
    return Unseen(batch.setting, batch.ode.subset(part, len(batch.x)), batch.x[part], batch.final[part])


def karras_within(solver: Solver, most: int, setting: Setting) -> tuple[int, Tensor] | None:
    """The largest number of evaluations up to `most` that a solver can make on a Karras grid, and the grid; None without."""
    make = partial(karras, sigma_min=setting.sigma_min, sigma_max=setting.sigma_max, schedule=setting.schedule)
    for nfe in range(most, 0, -1):
        try:
            return nfe, solver.grid_for(nfe, make, setting.schedule)
        except GridError:
            continue
    return None


def squares(batch: Unseen, solver: Solver | FittedSolver | Plan | str, grid: Tensor | None = None) -> Tensor:
    """Mean squared error of the final state of each sample, float64 [B]."""
    errors = sample(batch.ode, batch.x, grid, solver).double() - batch.final.double()
    return errors.square().flatten(1).mean(dim=1)
