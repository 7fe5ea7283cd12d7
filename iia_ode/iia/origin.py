"""Origin of a fit or a teacher: its ODE and its states, and the comparison with another ODE and other states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FingerprintWarning, InputError, MismatchError, MismatchWarning, warn
from ..files import bytes_of
from ..ode import ProbabilityFlowODE
from ..schedules.stored import brief

__all__ = ["Origin", "conditions_digest"]


@dataclass(frozen=True)
class Origin:
    """The ODE and the states behind a fit or a teacher.

    Attributes
    ----------
    schedule : configuration of the noise schedule, with its ``"type"``.
    prediction : prediction type of the model.
    guidance_scale : scale of the classifier-free guidance; 1 without guidance.
    conditioning : shape of each condition for one sample; for any condition other than a tensor, the name of its type.
    state_shape : shape of one sample.
    state_dtype : dtype of the states, such as ``"float32"``.
    fingerprint : hash of the model's parameters; see :meth:`ProbabilityFlowODE.fingerprint`.
    """

    schedule: dict[str, Any]
    prediction: str
    guidance_scale: float
    conditioning: dict[str, tuple[int, ...] | str]
    state_shape: tuple[int, ...]
    state_dtype: str
    fingerprint: str

    def __post_init__(self) -> None:
        if not isinstance(self.schedule.get("type"), str):
            raise InputError("field `type` of `schedule` must be the name of a kind of schedule")

    @classmethod
    def of(cls, ode: ProbabilityFlowODE, x: Tensor) -> Origin:
        """The origin of fits to this ODE from states x [B, ...]."""
        return cls(
            schedule=ode.schedule.config(),
            prediction=ode.prediction,
            guidance_scale=ode.guidance_scale,
            conditioning=_conditioning(ode),
            state_shape=tuple(x.shape[1:]),
            state_dtype=str(x.dtype).removeprefix("torch."),
            fingerprint=ode.fingerprint(),
        )

    def check(
        self,
        ode: ProbabilityFlowODE,
        x: Tensor | None = None,
        *,
        name: str,
        made: str = "fitted",
        strict_guidance: bool = False,
    ) -> None:
        """Raise if the ODE or the shape of x differs from the origin; warn if only guidance scale or model weights differ.

        Parameters
        ----------
        ode : the ODE to compare with.
        x : states [B, ...] to compare with; none by default.
        name, made : subject and verb of the messages.
        strict_guidance : whether another guidance scale is an error instead of a warning.

        Raises
        ------
        MismatchError : another schedule, prediction type, set of conditions (names or shapes) or state shape.

        Warns
        -----
        MismatchWarning : another guidance scale.
        FingerprintWarning : the model has other parameters.
        """
        advice = f"{'Fit again' if made == 'fitted' else 'Make one'} for this ODE, or use the ODE it was {made} for."
        schedule, conditioning, fingerprint = ode.schedule.config(), _conditioning(ode), ode.fingerprint()

        def against(what: str, theirs: object, ours: object) -> str:
            return f"{name} was {made} {what} {theirs}, and this ODE has {ours}."

        if self.schedule != schedule:
            raise MismatchError(f"{against('for schedule', brief(self.schedule), brief(schedule))} {advice}")
        if self.prediction != ode.prediction:
            raise MismatchError(f"{against('for prediction', self.prediction, ode.prediction)} {advice}")
        if self.guidance_scale != ode.guidance_scale:
            text = against("for guidance_scale", self.guidance_scale, ode.guidance_scale)
            if strict_guidance:
                raise MismatchError(f"{text} {advice}")
            warn(f"{text} Its weights suit the former.", MismatchWarning)
        if self.conditioning != conditioning:
            shapes = (_shapes(c) for c in (self.conditioning, conditioning))
            raise MismatchError(f"{against('with conditions of shapes (per sample)', *shapes)} {advice}")
        if x is not None and tuple(x.shape[1:]) != self.state_shape:
            shape = ", ".join(map(str, self.state_shape))
            raise MismatchError(f"{name} was {made} for states [B, {shape}], got {list(x.shape)}.")
        if self.fingerprint != fingerprint:
            warn(
                f"{name} was {made} on a model with fingerprint {self.fingerprint}, and the model of this ODE has "
                f"{fingerprint}: the weights were not made for it.",
                FingerprintWarning,
            )


def conditions_digest(ode: ProbabilityFlowODE) -> str:
    """A hash of the values of all conditions, with and without guidance."""
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


def _conditioning(ode: ProbabilityFlowODE) -> dict[str, tuple[int, ...] | str]:
    """The shape of each condition for one sample, or the name of its type if it is no tensor."""
    return {k: tuple(v.shape[1:]) if isinstance(v, Tensor) else type(v).__name__ for k, v in ode.conditioning.items()}


def _shapes(conditioning: Mapping[str, tuple[int, ...] | str]) -> str:
    """Conditions and their shapes in words: ``y [3], text str``."""
    return ", ".join(f"{k} {v if isinstance(v, str) else list(v)}" for k, v in conditioning.items()) or "none"
