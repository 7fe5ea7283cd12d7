"""What the installed torchdiffeq offers, asked of torchdiffeq itself."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

__all__ = ["is_adaptive", "torchdiffeq_methods"]


def _table() -> Mapping[str, Any]:
    # torchdiffeq's own table of methods; its module is hidden behind the function of the same name.
    table: Mapping[str, Any] = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    return table


def torchdiffeq_methods() -> list[str]:
    """The methods that the installed torchdiffeq offers, sorted."""
    return sorted(_table())


def is_adaptive(method: str) -> bool:
    """Whether a method of torchdiffeq chooses its own steps."""
    base = importlib.import_module("torchdiffeq._impl.solvers").AdaptiveStepsizeODESolver
    return method in _table() and issubclass(_table()[method], base)
