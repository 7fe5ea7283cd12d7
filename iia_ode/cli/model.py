"""``--model module:function``: a model of the user's own for every command."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch
from torch import Tensor

from ..checks import check_shape
from ..experiments import Setting
from ..many.conditions import Given, collected
from ..noise import sample_seeds, seeded_noise
from ..ode import ProbabilityFlowODE
from ..ode.conditions import named
from ..schedules.levels import default_levels

__all__ = ["OwnModel", "own_model"]


class OwnModel(Setting):
    """The model behind ``--model``, with noise and conditions for each seed.

    The guidance scale is part of the ODE; the methods ignore `guidance_scale`.

    Parameters
    ----------
    name : the text after ``--model``.
    ode : the ODE.
    shape : shape of one sample.
    conditions : function from a seed to the conditions of one sample. Without one, sample k has the conditions of entry
        ``seed % P`` of the P entries of the ODE's own conditions.
    decode : function from final states to images.
    sigma_min, sigma_max : smallest and largest noise level sigma/alpha; by default the levels of the schedule's grids.

    Attributes
    ----------
    levels : `sigma_min` and `sigma_max` as given, None where not given.
    """

    def __init__(
        self,
        name: str,
        ode: ProbabilityFlowODE,
        shape: tuple[int, ...],
        conditions: Callable[[int], Any] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        self.name, self.ode, self.shape, self.decode = name, ode, shape, decode
        self.conditions: Given = conditions
        self.schedule = ode.schedule
        self.levels = sigma_min, sigma_max
        low, high = default_levels(ode.schedule)
        self.sigma_min, self.sigma_max = sigma_min or low, sigma_max or high
        self.is_image = len(shape) == 3 and shape[0] in (1, 3) and decode is None

    def draw(
        self, n: int, seed: int, *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """Draw n conditions and n initial states at noise level `sigma_max`, as :meth:`draw_each`."""
        return self.draw_each(sample_seeds(seed, range(n)), guidance_scale=guidance_scale, device=device)

    def draw_each(
        self, seeds: Sequence[int], *, guidance_scale: float = 1.0, device: str = "cpu"
    ) -> tuple[ProbabilityFlowODE, Tensor]:
        """The ODE under the conditions of the seeds, and the initial states [len(seeds), ...] at `sigma_max`."""
        ode, noise = self.noise(seeds, device)
        return ode, self.schedule.sigma(self.schedule.t_of_noise_to_signal(self.sigma_max)) * noise

    def noise(self, seeds: Sequence[int], device: str) -> tuple[ProbabilityFlowODE, Tensor]:
        """The ODE under the conditions of the seeds, and standard normal noise [len(seeds), ...]."""
        ode = self.ode.to(device)
        noise = seeded_noise(list(seeds), self.shape, device=device)
        if self.conditions is not None and callable(self.conditions):
            return ode.condition(**{**ode.conditioning, **collected(self.conditions, seeds)}), noise
        entries = self.entries
        return ode.subset(torch.tensor([seed % entries for seed in seeds], device="cpu"), entries), noise

    @property
    def entries(self) -> int:
        """Number of entries of the ODE's own conditions; 1 if all samples share them."""
        leaves = [leaf for _, leaf in [*named(self.ode.conditioning), *named(self.ode.unconditional)]]
        leaves.append(self.ode.guidance_scale)
        sizes = [len(v) for v in leaves if isinstance(v, list | tuple) or (isinstance(v, Tensor) and v.ndim)]
        return max(sizes, default=1)

    def each(self, seeds: Sequence[int]) -> tuple[ProbabilityFlowODE, Given]:
        """The ODE and the conditions for :func:`iia_ode.sample_many`, where seed s has entry s % P of P entries."""
        if self.conditions is not None or self.entries == 1:
            return self.ode, self.conditions
        index = torch.tensor([seed % self.entries for seed in seeds], device="cpu")
        return self.ode.subset(index, self.entries), None


def own_model(text: str, guidance: float | None, sigma_min: float | None, sigma_max: float | None) -> OwnModel:
    """Call the function of ``--model module:function`` and read its answer.

    Parameters
    ----------
    text : module and name of a function without arguments; modules in the working directory are found.
    guidance : scale of the guidance in place of the ODE's own; None for the ODE's own.
    sigma_min, sigma_max : noise levels in place of the defaults.

    Raises
    ------
    click.UsageError : there is no such function, or its answer is no model.
    """
    found = _called(text)
    parts: dict[str, Any] = {}
    if isinstance(found, tuple) and len(found) == 2:
        ode, shape = found
    elif isinstance(found, ProbabilityFlowODE):
        ode, shape = found, found.state_shape
    else:
        ode, shape = getattr(found, "ode", None), getattr(found, "shape", None)
        parts = {name: getattr(found, name, None) for name in ("conditions", "decode", "sigma_min", "sigma_max")}
    if not isinstance(ode, ProbabilityFlowODE):
        raise click.UsageError(
            f"--model {text} must return a ProbabilityFlowODE with a state_shape, a pair (ode, shape), or an object with "
            f"attributes ode and shape, got {type(found).__name__}."
        )
    shape = ode.state_shape if shape is None else shape
    if shape is None:
        raise click.UsageError(
            f"--model {text} does not give the shape of a sample: return (ode, shape), or an ODE with state_shape=."
        )
    for name in ("conditions", "decode"):
        if parts.get(name) is not None and not callable(parts[name]):
            raise click.UsageError(f"--model {text}: {name} must be a function, got {type(parts[name]).__name__}.")
    if guidance is not None:
        ode = ode.condition(**ode.conditioning)  # a copy
        ode.guidance_scale = guidance
        ode._check_guidance()
    parts |= {k: v for k, v in (("sigma_min", sigma_min), ("sigma_max", sigma_max)) if v is not None}
    return OwnModel(text, ode, check_shape("shape", shape), **parts)


def _called(text: str) -> Any:
    module, _, name = text.partition(":")
    if not module or not name:
        raise click.UsageError(f"--model takes module:function, such as my_models:flow, got {text!r}.")
    sys.path.insert(0, os.getcwd())  # an installed command does not look there
    try:
        place = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another
        raise click.UsageError(f"--model {text}: no module {module!r} here or among the installed packages.") from error
    finally:
        sys.path.pop(0)
    found: Any = place
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, ProbabilityFlowODE):
        return found
    if not callable(found):
        public = ", ".join(k for k, v in vars(place).items() if callable(v) and not k.startswith("_"))
        raise click.UsageError(f"--model {text}: {module} has no function {name!r}; it has {public or 'none'}.")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise click.UsageError(
            f"--model {text}: {name} is called without arguments ({error}): give the arguments defaults."
        ) from error
    except ValueError:  # a function of C without a signature
        pass
    return found()
