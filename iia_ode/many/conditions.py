"""Conditions of many samples: entry k for seed k of a list, or a function from a seed to the conditions of one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError
from ..ode import ProbabilityFlowODE
from ..ode.origin import conditions_digest

__all__ = ["Conditions", "Given", "collected", "conditions_of"]

Given: TypeAlias = Tensor | Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None
"""A tensor for the only condition of the ODE, conditions by name, or a function from a seed to one sample's conditions."""


@dataclass(frozen=True)
class Conditions:
    """An ODE under the conditions of many samples.

    Attributes
    ----------
    ode : the ODE under the conditions of all samples, except the conditions of a function.
    seeds : seed of each sample.
    function : function from a seed to the conditions of one sample; None without one.
    """

    ode: ProbabilityFlowODE
    seeds: Sequence[int]
    function: Callable[[int], Mapping[str, Any]] | None = None

    def at(self, rows: slice) -> ProbabilityFlowODE:
        """The ODE under the conditions of some samples."""
        view = self.ode.subset(rows, len(self.seeds))
        if self.function is None:
            return view
        return view.condition(**{**view.conditioning, **collected(self.function, self.seeds[rows])})

    def digest(self) -> str:
        """A hash of the conditions; of a function, the conditions of the first and of the last sample are hashed."""
        found = conditions_digest(self.ode)
        if self.function is None:
            return found
        ends = [conditions_digest(self.at(slice(k, k + 1))) for k in (0, len(self.seeds) - 1)]
        return "-".join([found, *ends])


def conditions_of(ode: ProbabilityFlowODE, given: Given, seeds: Sequence[int]) -> Conditions:
    """The ODE under the given conditions; the ODE keeps its own conditions for names without a given value.

    Raises
    ------
    InputError : the conditions are of no usable kind, or do not have an entry per seed.
    """
    if callable(given) and not isinstance(given, Tensor | Mapping):
        whole = Conditions(ode, seeds, given)
    else:
        own = {} if given is None else _by_name(ode, given)
        whole = Conditions(ode.condition(**{**ode.conditioning, **own}) if own else ode, seeds)
    whole.ode.check_conditions(len(seeds))
    return whole


def _by_name(ode: ProbabilityFlowODE, given: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    names = list(ode.conditioning or ode.unconditional)
    if not isinstance(given, Tensor) or len(names) != 1:
        raise InputError(
            "conditions must be a dict of conditions by name with an entry per seed, a function from a seed to the "
            f"conditions of one sample, or a tensor if the ODE has a single condition, got {type(given).__name__} for an ODE "
            f"with conditions {names}."
        )
    return {names[0]: given}


def collected(function: Callable[[int], Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The conditions of a batch from a function of the seed: tensors and numbers are stacked, texts make a list.

    Parameters
    ----------
    function : from a seed to the conditions of one sample by name, tensors without batch axis.
    seeds : the seeds of the batch.

    Returns
    -------
    Conditions by name; tensors have the leading dimension len(seeds).

    Raises
    ------
    InputError : the function returns no conditions by name, or the conditions of two seeds do not fit one batch.
    """
    rows = [function(seed) for seed in seeds]
    for seed, row in zip(seeds, rows, strict=True):
        if not isinstance(row, Mapping) or row.keys() != rows[0].keys():
            found = f"names {sorted(row)}" if isinstance(row, Mapping) else type(row).__name__
            raise InputError(
                f"the function of conditions must return a dict with the same names for every seed, got {found} for seed "
                f"{seed}."
            )
    return {name: _stacked(name, [row[name] for row in rows]) for name in rows[0]}


def _stacked(name: str, values: list[Any]) -> Any:
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise _apart(name, sorted({type(v).__name__ for v in values}))
    if isinstance(first, Tensor):
        if any((v.shape, v.dtype) != (first.shape, first.dtype) for v in values):
            raise _apart(name, sorted({f"{v.dtype} {list(v.shape)}" for v in values}))
        return torch.stack(values)
    if isinstance(first, str):
        return values
    if isinstance(first, int | float) and not isinstance(first, bool):
        return torch.tensor(values, device="cpu")
    if isinstance(first, Mapping):
        if any(v.keys() != first.keys() for v in values):
            raise _apart(name, [sorted(v) for v in values])
        return {key: _stacked(f"{name}.{key}", [v[key] for v in values]) for key in first}
    if any(v is not first and v != first for v in values):
        raise _apart(name, [f"different values of {type(first).__name__}"])
    return first


def _apart(name: str, found: object) -> InputError:
    return InputError(f"condition {name!r} must be of one kind and shape for all seeds of a batch, got {found}.")
