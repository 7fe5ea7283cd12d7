"""What an entry of the golden data says: its fields, its schedule and its grid, for :mod:`.golden`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from iia_ode.errors import InputError, unknown_name
from iia_ode.schedules import EDM, VP, Cosine, Discrete, FlowMatching, Schedule

__all__ = [
    "Entry",
    "Level",
    "Options",
    "choice",
    "ddpm",
    "field",
    "first_of",
    "grid_for",
    "levels",
    "same_level",
    "schedule_for",
    "stands_still",
]

Entry: TypeAlias = Mapping[str, Any]
Options: TypeAlias = Mapping[str, Any]
Level: TypeAlias = tuple[float, float]
T = TypeVar("T")


def field(mapping: Mapping[str, Any], key: str) -> Any:
    """A field that must be there, else InputError."""
    if not isinstance(mapping, Mapping) or key not in mapping:
        found = f"one with {sorted(mapping)}" if isinstance(mapping, Mapping) else type(mapping).__name__
        raise InputError(f"expected a mapping with the field {key!r}, got {found}.")
    return mapping[key]


def first_of(options: Options, *keys: str) -> Any:
    """The value of the first of the keys that is there: sources call the same option differently."""
    return field(options, next((key for key in keys if key in options), keys[0]))


def choice(choices: Mapping[str, T], what: str, value: Any) -> T:
    """What `value` stands for, else InputError with the values that are known."""
    if value not in choices:
        raise InputError(str(unknown_name(f"{what} of a golden entry", value, choices)))
    return choices[value]


def levels(nodes: Any) -> tuple[Level, ...]:
    """(alpha, sigma) of each node of a grid, or of each evaluation."""
    alphas, sigmas = field(nodes, "alpha"), field(nodes, "sigma")
    if len(alphas) != len(sigmas):
        raise InputError(f"expected as many alphas as sigmas, got {len(alphas)} and {len(sigmas)}.")
    return tuple(zip(alphas, sigmas, strict=True))


def same_level(one: Level, other: Level) -> bool:
    """Whether two noise levels are the same up to rounding."""
    return all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(one, other, strict=True))


def stands_still(nodes: Sequence[Level]) -> bool:
    """Whether the last interval has no length."""
    return len(nodes) > 1 and same_level(nodes[-1], nodes[-2])


def schedule_for(entry: Entry) -> Schedule:
    """The schedule that the entry's state lives on.

    Samplers that keep x / alpha and scale it when they call their model have the state of EDM, whatever their schedule.
    """
    match field(entry, "state_space"), field(entry, "schedule"):
        case "ve", _:
            return EDM()
        case "flow", "flow":
            return FlowMatching()
        case "vp", "vp_linear":
            return VP()
        case "vp", "ipndm_trig":
            return Cosine()
        case "vp", "ddpm_discrete":
            return ddpm()
        case space, name:
            raise InputError(f"no schedule here is {name!r} with a state in {space!r} coordinates.")


@cache
def ddpm() -> Discrete:
    """The discrete schedule of all entries: 1000 betas from 1e-4 to 0.02."""
    return Discrete((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")).cumprod(0))


def grid_for(entry: Entry) -> Tensor:
    """The entry's grid in the time of :func:`schedule_for`, float64 [N + 1]; a last point that repeats one is left out."""
    schedule, nodes = schedule_for(entry), levels(field(entry, "grid"))
    nodes = nodes[:-1] if stands_still(nodes) else nodes
    return torch.tensor([_time_of(schedule, *node) for node in nodes], dtype=torch.float64, device="cpu")


def _time_of(schedule: Schedule, alpha: float, sigma: float) -> float:
    """The time whose level is (alpha, sigma)."""
    if isinstance(schedule, EDM | FlowMatching):
        return sigma
    if sigma == 0:
        return schedule.t_data
    t = schedule.t_of_lam(math.log(alpha / sigma)) if alpha > 0 else schedule.t_noise
    # On a table most levels are those of timesteps, whose times are whole and must not stick out at its end.
    return float(round(t)) if isinstance(schedule, Discrete) and abs(t - round(t)) < 1e-9 else t
