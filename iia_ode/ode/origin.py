"""Origin of a fit or a teacher: its ODE and its states, and the comparison with another ODE and other states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FingerprintWarning, InputError, MismatchError, MismatchWarning, warn
from ..schedules.stored import brief
from ..transforms import outside
from .base import ProbabilityFlowODE
from .clock import Told, recorded_time, same_time
from .conditions import digest_of, held_by, kinds
from .fingerprint import Fingerprint
from .guidance import Scales, recorded
from .mode import in_training

__all__ = ["Origin", "conditions_digest"]


@dataclass(frozen=True)
class Origin:
    """The ODE and the states behind a fit or a teacher.

    Attributes
    ----------
    schedule : configuration of the noise schedule, with its ``"type"``.
    prediction : prediction type of the model.
    guidance_scale : scale of the classifier-free guidance; 1 without guidance. The record of a scale per sample or per time.
    conditioning : shape of each condition for one sample, by the name of the leaf, such as ``"added.text_embeds"``. For any
        leaf other than a tensor, the name of its type, or ``"shared"``.
    state_shape : shape of one sample.
    state_dtype : dtype of the states, such as ``"float32"``.
    fingerprint : identity of the model, see :class:`~iia_ode.ode.Fingerprint`; begins with ``"unknown"`` for a model without
        weights and without a tag.
    train_mode : whether the model was in train mode, with modules that depend on the mode.
    time : the time that the model was told.
    guidance_rescale : share of the rescaled output in the guided output.
    serves : smallest and largest guidance scale at which a fit was measured and found good; None if not measured.
    """

    schedule: dict[str, Any]
    prediction: str
    guidance_scale: float | Scales
    conditioning: dict[str, tuple[int, ...] | str]
    state_shape: tuple[int, ...]
    state_dtype: str
    fingerprint: str
    train_mode: bool = False
    time: Told = Told("t")
    guidance_rescale: float = 0.0
    serves: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule.get("type"), str):
            raise InputError("field `type` of `schedule` must be the name of a kind of schedule")

    @classmethod
    def of(cls, ode: ProbabilityFlowODE, x: Tensor) -> Origin:
        """The origin of fits to this ODE from states x [B, ...]."""
        return cls(
            schedule=ode.schedule.config(),
            prediction=ode.prediction,
            guidance_scale=recorded(ode.guidance_scale, ode.schedule),
            conditioning=kinds(ode.conditioning),
            state_shape=tuple(x.shape[1:]),
            state_dtype=str(x.dtype).removeprefix("torch."),
            fingerprint=ode.fingerprint(),
            train_mode=bool(in_training(ode)),
            time=recorded_time(ode.time, ode.time_rounding, ode.schedule),
            guidance_rescale=ode.guidance_rescale,
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
        strict_guidance : whether another guidance scale or rescaling is an error instead of a warning.

        Raises
        ------
        MismatchError : another schedule, prediction type, set of conditions (names or shapes) or state shape.

        Warns
        -----
        MismatchWarning : another guidance scale, outside of the measured range `serves`, or another rescaling; for a scale per
            sample, a scale outside of the range of the fit. The model is told another time, apart from rounding.
        FingerprintWarning : the model has other weights. An unknown model, on either side, is not compared.
        """
        advice = f"{'Fit again' if made == 'fitted' else 'Make one'} for this ODE, or use the ODE it was {made} for."
        with outside():
            schedule, conditioning, fingerprint = ode.schedule.config(), kinds(ode.conditioning), ode.fingerprint()
            scale, rescale = recorded(ode.guidance_scale, ode.schedule), ode.guidance_rescale

        def against(what: str, theirs: object, ours: object) -> str:
            return f"{name} was {made} {what} {theirs}, and this ODE has {ours}."

        if self.schedule != schedule:
            raise MismatchError(f"{against('for schedule', brief(self.schedule), brief(schedule))} {advice}")
        if self.prediction != ode.prediction:
            raise MismatchError(f"{against('for prediction', self.prediction, ode.prediction)} {advice}")
        measured = "" if self.serves is None else " (measured from {:g} to {:g})".format(*self.serves)
        served = not strict_guidance and _within(scale, self.serves)
        suits = served or _suits(scale, self.guidance_scale, strict_guidance)
        for what, theirs, ours, fine in (
            ("guidance_scale", f"{self.guidance_scale}{measured}", scale, suits),
            ("guidance_rescale", self.guidance_rescale, rescale, self.guidance_rescale == rescale),
        ):
            if not fine and strict_guidance:
                raise MismatchError(f"{against(f'for {what}', theirs, ours)} {advice}")
            if not fine:
                warn(f"{against(f'for {what}', theirs, ours)} Its weights suit the former.", MismatchWarning)
        time = recorded_time(ode.time, ode.time_rounding, ode.schedule)
        if not same_time(self.time, time, ode.schedule):
            warn(
                f"{name} was {made} for a model that is told the time {self.time}, and this ODE tells its model {time}: set "
                "time= as in the fit, unless the model itself makes up for the difference.",
                MismatchWarning,
            )
        if self.conditioning != conditioning:
            shapes = (_shapes(c) for c in (self.conditioning, conditioning))
            raise MismatchError(f"{against('with conditions of shapes (per sample)', *shapes)} {advice}")
        if x is not None and tuple(x.shape[1:]) != self.state_shape:
            shape = ", ".join(map(str, self.state_shape))
            raise MismatchError(f"{name} was {made} for states [B, {shape}], got {list(x.shape)}.")
        known = fingerprint.known and Fingerprint(self.fingerprint).known
        if known and self.fingerprint != fingerprint:
            warn(
                f"{name} was {made} on a model with fingerprint {self.fingerprint}, and the model of this ODE has "
                f"{fingerprint}: the weights were not made for it.",
                FingerprintWarning,
            )


def conditions_digest(ode: ProbabilityFlowODE) -> str:
    """A hash of the values of all conditions, with and without guidance, held by the model, and of a scale per sample."""
    scale = {"scale": ode.guidance_scale} if isinstance(ode.guidance_scale, Tensor) else {}
    with outside():
        return digest_of(ode.conditioning, ode.unconditional, *(own for own in (held_by(ode.model), scale) if own))


def _suits(scale: float | Scales, fitted: float | Scales, strict: bool) -> bool:
    """Whether a guidance scale is the fitted scale; without `strict`, whether the fit has samples at such a scale."""
    if not isinstance(fitted, Scales) or fitted.kind == "per time":
        return scale == fitted
    if isinstance(scale, Scales) and (scale.kind == "per time" or strict):
        return scale.kind == fitted.kind  # the values per sample are in the digest of the conditions
    (low, high), (least, most) = scale.range if isinstance(scale, Scales) else (scale, scale), fitted.range
    return not strict and least <= low and high <= most


def _within(scale: float | Scales, measured: tuple[float, float] | None) -> bool:
    """Whether a guidance scale, or all scales of a batch, are in a measured range."""
    if measured is None or (isinstance(scale, Scales) and scale.kind == "per time" and None in scale.values):
        return False
    low, high = scale.range if isinstance(scale, Scales) else (scale, scale)
    return measured[0] <= low and high <= measured[1]


def _shapes(conditioning: Mapping[str, tuple[int, ...] | str]) -> str:
    """Conditions and their shapes in words: ``y [3], text str``."""
    return ", ".join(f"{k} {v if isinstance(v, str) else list(v)}" for k, v in conditioning.items()) or "none"
