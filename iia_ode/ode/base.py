"""The probability-flow ODE of a diffusion or flow model: a schedule, a denoiser, and dx/dt."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError, unknown_name
from ..forms import PREDICTIONS, Evaluation, Forms
from ..schedules import Schedule
from ..transforms import number_of

__all__ = ["Ledger", "ProbabilityFlowODE"]

V = TypeVar("V")

_SETTINGS = (
    "schedule",
    "prediction",
    "conditioning",
    "unconditional",
    "guidance_scale",
    "model_dtype",
    "state_shape",
)


@dataclass
class Ledger:
    """The evaluations that an ODE spent. Evaluations in a graph of ``torch.compile`` or ``torch.export`` do not count.

    Attributes
    ----------
    evaluations : batched calls of the model. With guidance, both branches together are a single call on a doubled batch.
    samples : calls weighted by batch size, where a doubled batch counts once.
    """

    evaluations: int = 0
    samples: int = 0

    def add(self, samples: int) -> None:
        """Count a call of the model with a number of samples."""
        if not torch.compiler.is_compiling():  # a graph would be compiled again for every count
            self.evaluations += 1
            self.samples += samples

    def reset(self) -> None:
        """Back to zero."""
        self.evaluations = self.samples = 0


class ProbabilityFlowODE(nn.Module, Forms[Tensor]):
    """dx/dt of a diffusion or flow model [Song et al. 2021], ready for torchdiffeq and for the solvers of this library.

    Parameters
    ----------
    model : called as ``model(x, t, **conditioning)`` with states x [B, ...] and times t [B]; returns a tensor of the shape
        of x.
    schedule : the noise schedule alpha_t, sigma_t of states x = alpha_t x_0 + sigma_t eps.
    prediction : form of the model's output: ``"data"`` (x_0), ``"noise"`` (eps), ``"score"``, ``"v"``
        (alpha eps - sigma x_0) or ``"velocity"`` (dx/dt).
    conditioning : keyword arguments of the model. A tensor has leading dimension B, or 1 to serve every sample.
    unconditional : the keywords of `conditioning` with the null condition, for classifier-free guidance
        [Ho & Salimans 2022].
    guidance_scale : w in ``D_null + w (D_cond - D_null)``. With w = 1 there is no guidance, and no extra cost.
    model_dtype : dtype of the model's arithmetic; by default the dtype of its parameters, or of the state for a model
        without parameters. The state keeps its own dtype, float32 or float64. Times have dtype float64 for a float64 model,
        else float32.
    state_shape : shape of one sample, checked before a run; by default the model's attribute ``state_shape``, if any.

    Raises
    ------
    UnknownNameError : no such prediction type.
    InputError : the model is not callable, `schedule` is no schedule, the scale is not finite, or guidance lacks
        `unconditional` with the keywords of `conditioning`.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: Schedule,
        prediction: str = "data",
        *,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        model_dtype: torch.dtype | None = None,
        state_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise InputError(f"model must be callable as model(x, t, **conditioning), got {type(model).__name__}.")
        if not isinstance(schedule, Schedule):
            raise InputError(f"schedule must be an iia_ode Schedule such as iia_ode.EDM(), got {schedule!r}.")
        if prediction not in PREDICTIONS:
            raise unknown_name("prediction type", prediction, PREDICTIONS)
        self.model, self.schedule, self.prediction = model, schedule, prediction
        self.conditioning = dict(conditioning or {})
        self.unconditional = dict(unconditional or {})
        self.guidance_scale = float(guidance_scale)
        self.model_dtype = model_dtype
        shape = getattr(model, "state_shape", None) if state_shape is None else state_shape
        self.state_shape = None if shape is None else tuple(shape)
        self.ledger = Ledger()
        self._fingerprint: tuple[Any, str] | None = None
        if not math.isfinite(self.guidance_scale):
            raise InputError(f"the guidance scale must be a finite number, got {guidance_scale}.")
        self._check_guidance()

    def _check_guidance(self) -> None:
        if self.guidance_scale != 1.0 and (
            not self.unconditional or self.unconditional.keys() != self.conditioning.keys()
        ):
            raise InputError(
                "guidance needs conditioning= and unconditional= with the same keywords, got "
                f"{sorted(self.conditioning)} and {sorted(self.unconditional)}."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """All arguments but the model: ``ProbabilityFlowODE(other, **ode.settings)`` is the ODE of another model."""
        return {name: getattr(self, name) for name in _SETTINGS}

    # ---- the ODE -----------------------------------------------------------------------------------------------------

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """dx/dt, with the argument order of torchdiffeq.

        Parameters
        ----------
        t : time, a number or a tensor [] or [B].
        x : state [B, ...], float32 or float64.

        Returns
        -------
        The velocity [B, ...], in the dtype of x.
        """
        return self.evaluate(x, t).velocity

    def evaluate(self, x: Tensor, t: Tensor | float, form: str = "data") -> Evaluation[Tensor]:
        """Evaluate the model once; the evaluation can be read in every prediction form.

        Parameters
        ----------
        x : state [B, ...], float32 or float64.
        t : time, a number or a tensor [] or [B].
        form : without effect here; a plan stores the output in this form.

        Returns
        -------
        The evaluation, with tensors of the shape and dtype of x.
        """
        t = number_of(t)
        return Evaluation(self.schedule, t, x, self.output(x, t), self.prediction)

    def is_data(self, t: float) -> bool:
        """Whether sigma = 0 at time t. A step to such a time must not evaluate the model there."""
        return self.schedule.sigma(t) == 0

    @staticmethod
    def hold(x: V) -> V:
        """x itself. While a plan is traced, ``hold`` stores a combination as one vector."""
        return x

    def check_state_shape(self, x: Tensor) -> None:
        """Raise InputError if the shape of one sample is known and x [B, ...] has another shape."""
        if self.state_shape is not None and tuple(x.shape[1:]) != self.state_shape:
            expected = ", ".join(map(str, ("B", *self.state_shape)))
            raise InputError(f"the state must have shape [{expected}], got {list(x.shape)}.")

    def check_conditions(self, batch: int) -> None:
        """Raise InputError unless every condition has an entry for each of `batch` samples, or a single entry."""
        for name, value in (*self.conditioning.items(), *self.unconditional.items()):
            if isinstance(value, Tensor) and value.ndim and len(value) not in (1, batch):
                raise InputError(
                    f"conditioning {name!r} has {len(value)} entries for a batch of {batch}: give one per sample, or one for "
                    "all."
                )

    # ---- calling the model -------------------------------------------------------------------------------------------

    def output(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The model's output with guidance, in the form of `prediction`; one evaluation.

        The model receives copies of x and t and may write to the copies. The output is a copy of the model's answer: a model
        may answer with memory that the model writes to again, with its input, or with a view. A subclass changes the output
        of the model by overriding this method alone; see :class:`~iia_ode.ode.Wrapped`.

        Parameters
        ----------
        x : state [B, ...], float32 or float64.
        t : time, a number or a tensor [] or [B].

        Returns
        -------
        The output [B, ...], in the dtype of x; memory of the caller.

        Raises
        ------
        InputError : the model does not return a floating-point tensor of the shape of x, or the conditions do not fit the
            batch.
        """
        batch = x.shape[0]
        dtype = self.compute_dtype(x)
        time_dtype = torch.promote_types(dtype, torch.float32)
        if isinstance(t, Tensor):
            times = t.to(device=x.device, dtype=time_dtype).expand(batch).clone()
        else:
            times = torch.full((batch,), t, dtype=time_dtype, device=x.device)
        y = x.to(dtype, copy=True)
        self.check_conditions(batch)
        condition = {k: _batched(v, batch, x.device) for k, v in self.conditioning.items()}
        self.ledger.add(batch)
        if self.guidance_scale == 1.0:
            return _checked(self.model(y, times, **condition), x.shape).to(x.dtype, copy=True)
        null = {k: _batched(v, batch, x.device) for k, v in self.unconditional.items()}
        both = {k: _paired(condition[k], null[k], k) for k in condition}
        doubled = self.model(torch.cat([y, y]), torch.cat([times, times]), **both)
        cond, uncond = _checked(doubled, (2 * batch, *x.shape[1:])).chunk(2)
        # In the state's dtype: a half-precision model must not lose the difference of its two branches.
        return torch.lerp(uncond.to(x.dtype), cond.to(x.dtype), self.guidance_scale)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype in which the model computes for states x [B, ...]."""
        return self.model_dtype or _own_dtype(self.model) or x.dtype

    # ---- views and bookkeeping ---------------------------------------------------------------------------------------

    def condition(self, **conditioning: Any) -> Self:
        """The ODE under other conditions, with the same model, null condition, guidance scale and ledger."""
        return self._view(conditioning, self.unconditional)

    def subset(self, index: slice | Tensor, batch: int) -> Self:
        """The ODE of some samples of a batch.

        Parameters
        ----------
        index : the samples, a slice or an integer or boolean tensor [n].
        batch : size of the whole batch. Conditions with `batch` entries are indexed; other conditions stay.

        Returns
        -------
        The ODE, with the same model and ledger.
        """

        def pick(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v for k, v in values.items()
            }

        return self._view(pick(self.conditioning), pick(self.unconditional))

    def _view(self, conditioning: Mapping[str, Any], unconditional: Mapping[str, Any]) -> Self:
        """A shallow copy with other conditions, and with the same class, model and ledger."""
        view = self._copied()
        view.conditioning, view.unconditional = dict(conditioning), dict(unconditional)
        view._check_guidance()
        return view

    def _copied(self) -> Self:
        """A shallow copy with a dictionary of submodules of its own."""
        twin = copy.copy(self)
        twin.__dict__["_modules"] = dict(self._modules)
        return twin

    @property
    def nfe(self) -> int:
        """Number of batched model evaluations; ``ode.ledger.reset()`` sets the number to zero."""
        return self.ledger.evaluations

    @property
    def device(self) -> torch.device | None:
        """Device of the model's parameters; None for a model without parameters, which runs on the device of the states."""
        if isinstance(self.model, nn.Module):
            for parameter in self.model.parameters():
                return parameter.device
        return None

    def counting(self) -> AbstractContextManager[Ledger]:
        """A ledger of the evaluations of a ``with`` block, filled in at the end of the block."""
        return _counted(self.ledger)

    def fingerprint(self) -> str:
        """A short hash of the names, shapes and some values of the model's parameters and buffers.

        The fingerprint of a model without parameters is its qualified name.
        """
        tensors = _tensors(self.model)
        if not tensors:
            kind = self.model if hasattr(self.model, "__qualname__") else type(self.model)
            return f"{kind.__module__}.{getattr(kind, '__qualname__', '?')}"
        key = tuple((v.data_ptr(), 0 if v.is_inference() else v._version) for v in tensors.values())
        if self._fingerprint is None or self._fingerprint[0] != key:
            self._fingerprint = key, _hash(tensors)
        return self._fingerprint[1]


@contextmanager
def _counted(ledger: Ledger) -> Iterator[Ledger]:
    before, spent = (ledger.evaluations, ledger.samples), Ledger()
    try:
        yield spent
    finally:
        spent.evaluations, spent.samples = ledger.evaluations - before[0], ledger.samples - before[1]


def _own_dtype(model: object) -> torch.dtype | None:
    """Dtype of a model's first floating-point parameter, if there is one."""
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def _tensors(model: object) -> dict[str, Tensor]:
    """Parameters and buffers by name, in the order of their names; compiled models have the names of their originals."""
    if not isinstance(model, nn.Module):
        return {}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name.replace("_orig_mod.", ""): v for name, v in sorted(named, key=lambda item: item[0])}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    # One transfer from the device: the sampled values of all tensors together.
    samples = [v.detach().flatten()[:: max(1, v.numel() // 64)].cpu().double() for v in tensors.values()]
    shapes = {name: list(v.shape) for name, v in tensors.items()}
    body = repr(shapes).encode() + torch.cat(samples).numpy().tobytes()
    return hashlib.sha256(body).hexdigest()[:16]


def _checked(out: Any, shape: Sequence[int]) -> Tensor:
    """The output of a model, checked to be a real tensor of the right shape."""
    if not isinstance(out, Tensor) or tuple(out.shape) != tuple(shape):
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(
            f"the model returned {got} for a state of shape {list(shape)}; it must return one tensor of that shape."
        )
    if not out.is_floating_point():
        raise InputError(f"the model returned {out.dtype}; it must return real floating-point numbers.")
    return out


def _paired(condition: Any, null: Any, name: str) -> Any:
    """A condition and its null value as the condition of a doubled batch."""
    if isinstance(condition, Tensor) and isinstance(null, Tensor) and condition.shape[1:] == null.shape[1:]:
        return torch.cat([condition, null])
    if not isinstance(condition, Tensor) and not isinstance(null, Tensor) and condition == null:
        return condition
    raise InputError(
        f"guidance needs conditioning {name!r} and its null value as tensors of one shape per sample, or as equal values; "
        f"got {_kind(condition)} and {_kind(null)}."
    )


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _batched(value: Any, batch: int, device: torch.device) -> Any:
    """A condition with an entry per sample, on the device of the states."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device, non_blocking=True)
    if value.ndim == 0:
        return value.expand(batch)
    return value if len(value) == batch else value.expand(batch, *value.shape[1:])
