"""The probability-flow ODE of a diffusion or flow model: a schedule, a denoiser, and dx/dt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import check_flag, check_number
from ..errors import InputError, unknown_name
from ..forms import PREDICTIONS, Evaluation, Forms
from ..schedules import Schedule
from .calls import Ledger, Loans, answer, both_answers, own_dtype
from .clock import Rounding, Time, checked_rounding, checked_time, exact_time, told
from .conditions import check_entries
from .fingerprint import Fingerprint, checked_tag, fingerprint_of
from .guidance import Scale, check_branches, check_guidance, check_scales, checked_scale, guided, scale_at
from .networks import ByLevel
from .views import Views

__all__ = ["Ledger", "ProbabilityFlowODE"]

V = TypeVar("V")

_SETTINGS = (
    "schedule",
    "prediction",
    "conditioning",
    "unconditional",
    "guidance_scale",
    "guidance_rescale",
    "batched_guidance",
    "time",
    "time_rounding",
    "model_dtype",
    "state_shape",
)


class ProbabilityFlowODE(Views, Forms[Tensor]):
    """dx/dt of a diffusion or flow model [Song et al. 2021], ready for torchdiffeq and for the solvers of this library.

    Parameters
    ----------
    model : called as ``model(x, t, **conditioning)`` with states x [B, ...] and times t [B]; returns a tensor of the shape
        of x.
    schedule : the noise schedule alpha_t, sigma_t of states x = alpha_t x_0 + sigma_t eps.
    prediction : form of the model's output: ``"data"`` (x_0), ``"noise"`` (eps), ``"score"``, ``"v"``
        (alpha eps - sigma x_0) or ``"velocity"`` (dx/dt).
    conditioning : keyword arguments of the model: values, or trees of values (dicts, lists, tuples and similar). A tensor has
        leading dimension B, or 1 to serve every sample, and a list of B strings or numbers has an entry per sample.
        :class:`~iia_ode.ode.Shared` marks a value without batch axis. All other values go to the model as they are.
    unconditional : the keywords of `conditioning` with the null condition, for classifier-free guidance
        [Ho & Salimans 2022].
    guidance_scale : w in ``D_null + w (D_cond - D_null)``: a number, a tensor [B] with a scale per sample, or a function of
        time. The function receives the time as a number, or as a tensor [] or [B] where the time is a tensor. Where w = 1,
        also at single times of a function, there is no guidance and no extra cost.
    guidance_rescale : phi in ``phi std(D_cond) / std(D_guided) D_guided + (1 - phi) D_guided``, from 0 to 1, with the standard
        deviation over each sample and D the model's output [Lin et al. 2024, section 3.4]; 0 changes nothing.
    batched_guidance : whether guidance makes a single call on a doubled batch. If False, or if the two conditions do not fit
        one batch (trees, lengths, dtypes or shared values differ), guidance makes two calls.
    time : the time t [B] that the model is told. By default the attribute ``model_time`` of the model, if any, or else the
        time of the schedule. ``"index"``: the timestep of a ``Discrete`` schedule (DDPM, Stable Diffusion, SDXL, DiT, PixArt).
        ``"1000 sigma"``: 1000 sigma_t (Stable Diffusion 3, Wan, LTX, Sana, and most flow models of diffusers). ``"sigma"``:
        sigma_t (Flux, whose network takes [0, 1]). ``"1 - sigma"``: 1 - sigma_t (Lumina 2, Z-Image). ``"c_noise"``:
        ln(sigma_t/alpha_t) / 4 (raw networks of EDM and EDM2, Stable Video Diffusion, Playground 2.5). A function maps times
        of the schedule, a tensor [B] or [1], to the told times. Its argument has dtype float64 on the host, and float32 on
        another device, unless the time was given in float64. Integers that the function returns stay integers.
    time_rounding : whether the model is told whole numbers: ``"nearest"`` or ``"floor"``. Schedulers of diffusers with Karras
        levels round to the nearest timestep; with exponential, beta and flow levels some round down.
    model_dtype : dtype of the model's arithmetic; by default the dtype of its parameters, or of the state for a model
        without parameters. The state keeps its own dtype, float32 or float64. Times have dtype float64 for a float64 model,
        else float32.
    state_shape : shape of one sample, checked before a run; by default the model's attribute ``state_shape``, if any.
    tag : name of the model, such as ``"my-model-v2"``, for records and files in place of a hash of the weights. Without a tag,
        a model without weights, such as a lambda, counts as unknown.

    Raises
    ------
    UnknownNameError : no such prediction type, time or rounding.
    InputError : the model is not callable; `schedule` is no schedule; the time is neither a name nor a function, or the
        schedule has no timesteps; the scale or the rescaling is not usable; guidance has no `unconditional` with the keywords
        of `conditioning`; a condition cannot be split with the samples; or a subclass overrides a method that solvers never
        call.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: Schedule,
        prediction: str = "data",
        *,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: Scale = 1.0,
        guidance_rescale: float = 0.0,
        batched_guidance: bool = True,
        time: Time | None = None,
        time_rounding: Rounding | None = None,
        model_dtype: torch.dtype | None = None,
        state_shape: tuple[int, ...] | None = None,
        tag: str | None = None,
    ) -> None:
        super().__init__()
        _check_overrides(type(self))
        if not callable(model):
            raise InputError(f"model must be callable as model(x, t, **conditioning), got {type(model).__name__}.")
        if not isinstance(schedule, Schedule):
            raise InputError(f"schedule must be an iia_ode Schedule such as iia_ode.EDM(), got {schedule!r}.")
        if prediction not in PREDICTIONS:
            raise unknown_name("prediction type", prediction, PREDICTIONS)
        self.model, self.schedule, self.prediction = model, schedule, prediction
        self.conditioning = dict(conditioning or {})
        self.unconditional = dict(unconditional or {})
        self.guidance_scale = checked_scale(guidance_scale)
        self.guidance_rescale = check_number("guidance_rescale", guidance_rescale, least=0, most=1)
        self.batched_guidance = check_flag("batched_guidance", batched_guidance)
        # Not a part of this module, even if the function is a module.
        self.__dict__["time"] = checked_time(getattr(model, "model_time", None) if time is None else time, schedule)
        self.time_rounding = checked_rounding(time_rounding)
        self.model_dtype = model_dtype
        shape = getattr(model, "state_shape", None) if state_shape is None else state_shape
        self.state_shape = None if shape is None else tuple(shape)
        self.ledger = Ledger()
        self.tag = checked_tag(tag)
        check_guidance(self.conditioning, self.unconditional, self.guidance_scale)

    @property
    def settings(self) -> dict[str, Any]:
        """All arguments except model and tag: ``ProbabilityFlowODE(other, **ode.settings)`` is this ODE with another model."""
        return {name: getattr(self, name) for name in _SETTINGS}

    # ---- the ODE -----------------------------------------------------------------------------------------------------

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """dx/dt, with the argument order of torchdiffeq.

        Parameters
        ----------
        t, x : time and state [B, ...], as for :meth:`output`.

        Returns
        -------
        The velocity [B, ...], in the dtype of x.
        """
        t = exact_time(self.schedule, t)
        return Evaluation(self.schedule, t, x, self.borrowed(x, t), self.prediction).velocity

    def evaluate(self, x: Tensor, t: Tensor | float, form: str = "data") -> Evaluation[Tensor]:
        """Evaluate the model once; the evaluation can be read in every prediction form.

        Parameters
        ----------
        x, t : state [B, ...] and time, as for :meth:`output`.
        form : no effect on tensors. While a plan is traced, the form in which the plan stores the output.

        Returns
        -------
        The evaluation, with tensors of the shape and dtype of x.
        """
        t = exact_time(self.schedule, t)
        return Evaluation(self.schedule, t, x, self.output(x, t), self.prediction)

    def is_data(self, t: float) -> bool:
        """Whether sigma = 0 at time t. A step to such a time must not evaluate the model there."""
        return self.schedule.sigma(t) == 0

    @staticmethod
    def hold(x: V) -> V:
        """Return x. While a plan is traced, store a combination as one vector."""
        return x

    def check_state_shape(self, x: Tensor) -> None:
        """Raise InputError if the shape of one sample is known and x [B, ...] has another shape."""
        if self.state_shape is not None and tuple(x.shape[1:]) != self.state_shape:
            expected = ", ".join(map(str, ("B", *self.state_shape)))
            raise InputError(f"the state must have shape [{expected}], got {list(x.shape)}.")

    def check_conditions(self, batch: int) -> None:
        """Raise InputError unless every condition and the guidance scale have `batch` entries, or a single entry."""
        check_entries(self.conditioning, batch)
        check_entries(self.unconditional, batch)
        check_scales(self.guidance_scale, batch)

    # ---- calling the model -------------------------------------------------------------------------------------------

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The model's output with guidance, in the form of `prediction`; one evaluation.

        The model receives copies of x and t and may write to the copies. The output is a copy of the model's return value,
        because a model may return its input, a view, or memory that the model overwrites later. A subclass changes the output
        of the model by overriding this method alone; see :class:`~iia_ode.ode.Wrapped`.

        Parameters
        ----------
        x : state [B, ...], float32 or float64.
        t : time, a number or a tensor [] or [B].

        Returns
        -------
        The output [B, ...], in the dtype of x. The caller owns its memory.

        Raises
        ------
        InputError : the model does not return a floating-point tensor of the shape of x, the conditions do not fit the
            batch, or the guidance scale fails at this time.
        """
        return self._output(x, t, True)

    def borrowed(self, x: Tensor, t: Tensor | float, loans: Loans | None = None) -> Tensor:
        """The output for a caller that reads it at once: :meth:`output` without a copy, maybe in memory of the model.

        The tensor must be neither changed nor kept beyond the next call of the model.

        Parameters
        ----------
        x, t : state [B, ...] and time, as for :meth:`output`.
        loans : the loans of a run that hands its states to the model without copies.

        Returns
        -------
        The output [B, ...], in the dtype of x.

        Raises
        ------
        InputError : as :meth:`output`.
        SpoiledError : the model wrote to a state that was lent.
        """
        if type(self).output is not ProbabilityFlowODE.output:
            return self.output(x, t)
        return self._output(x, t, False, loans)

    def _output(self, x: Tensor, t: Tensor | float, own: bool, loans: Loans | None = None) -> Tensor:
        scale = scale_at(self.guidance_scale, t, x)
        if isinstance(scale, float) and scale == 1.0:
            model, times, dtype = self._call(x, t)
            return answer(model, self.ledger, x, times, self.conditioning, dtype, own, loans)
        condition, null = self._branches(x, t, loans)
        return guided(condition, null, scale, self.guidance_rescale)

    def branches(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Compute the two outputs that guidance combines, at the cost of one guided evaluation.

        The method serves subclasses with another combination, and hand-written loops such as CFG++ [Chung et al. 2024]. A plan
        stores guided outputs only.

        Parameters
        ----------
        x, t : state [B, ...] and time, as for :meth:`output`.

        Returns
        -------
        The outputs [B, ...] under the condition and under the null condition, in the form of `prediction` and in the dtype
        of x.

        Raises
        ------
        InputError : the ODE has no null condition.
        """
        condition, null = self._branches(x, t)
        return condition, null

    def _branches(self, x: Tensor, t: Tensor | float, loans: Loans | None = None) -> Sequence[Tensor]:
        check_branches(self.conditioning, self.unconditional)
        (model, times, dtype), both = self._call(x, t), (self.conditioning, self.unconditional)
        return both_answers(model, self.ledger, x, times, both, dtype, joint=self.batched_guidance, loans=loans)

    def _call(self, x: Tensor, t: Tensor | float) -> tuple[Callable[..., Tensor], Tensor | float, torch.dtype]:
        """The network, the time that it is told, and the dtype of its arithmetic, for states x [B, ...] at time t."""
        if self.conditioning or self.unconditional or not isinstance(self.guidance_scale, float):
            self.check_conditions(x.shape[0])
        model = self.model.at(self.schedule, t) if isinstance(self.model, ByLevel) else self.model
        return model, told(self.time, self.time_rounding, self.schedule, t), self.compute_dtype(x)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype in which the model computes for states x [B, ...]."""
        return self.model_dtype or own_dtype(self.model) or x.dtype

    # ---- bookkeeping -------------------------------------------------------------------------------------------------

    def fingerprint(self) -> Fingerprint:
        """The identity of the model: a short hash of its weights, or the `tag`.

        Weights are recognized through wrappers, compilation and casts; see :class:`~iia_ode.ode.fingerprint.Fingerprint`. If a
        subclass overrides :meth:`output`, the fingerprint also names the class and its attributes of these kinds: floats,
        booleans, strings, parameters and buffers. The weights are read at each call.
        """
        found = fingerprint_of(self.model, self.tag)
        return found if type(self).output is ProbabilityFlowODE.output else found.changed_by(self)


def _check_overrides(kind: type[ProbabilityFlowODE]) -> None:
    """Raise InputError if a subclass overrides a method that solvers never call; solvers read `output` alone."""
    base = ProbabilityFlowODE
    own = [n for n in ("evaluate", "forward", "as_form", *PREDICTIONS) if getattr(kind, n) is not getattr(base, n)]
    if own:
        raise InputError(
            f"{kind.__name__} overrides {' and '.join(own)}, which a solver or a wrapper passes over: override output "
            "instead, with the output in the form of `prediction`."
        )
