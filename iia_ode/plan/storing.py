"""Weights and constants that are more than one number, as JSON and tensors: what a file of a plan holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from .maps import LinearMap, PerCondition, projections_from
from .projections import Projections

__all__ = ["SHARED", "restore", "store"]

SHARED = "projections."
"""What the names of tensors begin with that several weights may share."""


def store(value: Tensor | LinearMap | PerCondition, key: str) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What is to be said of a value in JSON (None for a tensor), and its float64 tensors.

    Its own tensor is called `key`; those of projections have names by their digest, so that maps over equal projections
    store them once.
    """
    if isinstance(value, LinearMap):
        p = value.projections
        shared = {f"{SHARED}{p.digest}.{name}": v for name, v in p.tensors().items()}
        return {"map": p.config(), "digest": p.digest}, {key: value.coefficients.detach(), **shared}
    if isinstance(value, PerCondition):
        return {"per": value.key, "values": list(value.values)}, {key: value.table.detach()}
    return None, {key: value.detach().double()}


def restore(
    about: Mapping[str, Any] | None, key: str, tensors: Mapping[str, Tensor], known: dict[str, Projections]
) -> Any:
    """The tensor, map or `PerCondition` that :func:`store` took apart.

    `known` collects projections by digest, for the maps of one file to share.

    Raises
    ------
    InputError : something is missing, or is not what it was.
    """
    try:
        if about is None:
            return tensors[key]
        if "per" in about:
            return PerCondition(about["per"], tuple(about["values"]), tensors[key])
        digest = about["digest"]
        if digest not in known:
            start = f"{SHARED}{digest}."
            found = projections_from(
                about["map"], {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            )
            if found.digest != digest:
                raise InputError(f"the projections {digest} of {key} are not what they were.")
            known[digest] = found
        return LinearMap(known[digest], tensors[key])
    except (KeyError, TypeError) as error:
        raise InputError(f"{key} is incomplete: {error!r}.") from error
