"""What a fit or a teacher was made for, and whether an ODE is that."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import FingerprintWarning, MismatchError, MismatchWarning
from ..files import bytes_of
from ..ode import ProbabilityFlowODE
from ..schedules.stored import brief

__all__ = ["check_origin", "conditions_digest", "origin"]


def origin(ode: ProbabilityFlowODE, x: Tensor) -> dict[str, Any]:
    """What identifies an ODE and its states, JSON-ready."""
    return {
        "schedule": ode.schedule.config(),
        "prediction": ode.prediction,
        "guidance_scale": ode.guidance_scale,
        "conditioning": _conditioning_shapes(ode),
        "state_shape": list(x.shape[1:]),
        "state_dtype": str(x.dtype).removeprefix("torch."),
        "fingerprint": ode.fingerprint(),
    }


def check_origin(
    name: str,
    about: Mapping[str, Any],
    ode: ProbabilityFlowODE,
    x: Tensor | None = None,
    *,
    made: str = "fitted",
    strict_guidance: bool = False,
    stacklevel: int = 4,
) -> None:
    """Raise unless `about`, which :func:`origin` wrote, is of this ODE (and of states like x); warn of other weights.

    Another guidance scale is another ODE, but a near one: a warning, unless `strict_guidance`.

    Raises
    ------
    MismatchError : another schedule, prediction type, conditions (names or shapes) or state shape.
    """
    advice = f"{'Fit again' if made == 'fitted' else 'Make one'} for this ODE, or use the ODE it was {made} for."
    found: dict[str, Any] = {
        "schedule": ode.schedule.config(),
        "prediction": ode.prediction,
        "guidance_scale": ode.guidance_scale,
    }
    for key, value in found.items():
        if about[key] == value:
            continue
        theirs, ours = (brief(v) if isinstance(v, dict) else v for v in (about[key], value))
        text = f"{name} was {made} for {key} {theirs}, and this ODE has {ours}."
        if key == "guidance_scale" and not strict_guidance:
            warnings.warn(f"{text} Its weights were not made for that.", MismatchWarning, stacklevel=stacklevel)
        else:
            raise MismatchError(f"{text} {advice}")
    if about["conditioning"] != (shapes := _conditioning_shapes(ode)):
        raise MismatchError(
            f"{name} was {made} with conditioning of shapes {about['conditioning']} a sample, and this ODE "
            f"has {shapes}. {advice}"
        )
    if x is not None and list(x.shape[1:]) != about["state_shape"]:
        raise MismatchError(
            f"{name} was {made} for states [B, {', '.join(map(str, about['state_shape']))}], got {list(x.shape)}."
        )
    if about["fingerprint"] != ode.fingerprint():
        warnings.warn(
            f"{name} was {made} on a model with fingerprint {about['fingerprint']}, this one has "
            f"{ode.fingerprint()}: its weights were not made for it.",
            FingerprintWarning,
            stacklevel=stacklevel,
        )


def _conditioning_shapes(ode: ProbabilityFlowODE) -> dict[str, Any]:
    """The shape of each condition for one sample, or its type where it is no tensor."""
    return {k: list(v.shape[1:]) if isinstance(v, Tensor) else type(v).__name__ for k, v in ode.conditioning.items()}


def conditions_digest(ode: ProbabilityFlowODE) -> str:
    """A hash of the values of all conditions, those of no guidance too."""
    digest = hashlib.sha256()
    for values in (ode.conditioning, ode.unconditional):
        for key, value in sorted(values.items()):
            digest.update(f"\n{key} ".encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {list(value.shape)} ".encode())
                digest.update(bytes_of(value))
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()[:16]
