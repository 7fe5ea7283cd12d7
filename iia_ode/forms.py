"""Model outputs in every form: data, noise, score, v and velocity are linear in each other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from .errors import ScheduleError, unknown_name
from .schedules import Schedule
from .transforms import may_write

__all__ = ["PREDICTIONS", "Evaluation", "Forms", "Prediction", "check_prediction", "conversion", "converted"]

Prediction = Literal["data", "noise", "score", "v", "velocity"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

V = TypeVar("V")


def conversion(schedule: Schedule, t: Any, source: str, target: str) -> tuple[Any, Any]:
    """The pair (p, q) with ``target = p * x + q * source`` at time t, in float64.

    Every prediction type is a combination of the data x_0 and the noise eps, as is x = alpha x_0 + sigma eps itself:
    data (1, 0), noise (0, 1), score (0, -1/sigma), v (-sigma, alpha) [Salimans & Ho 2022], velocity (alpha', sigma').
    The target in the basis (x, source) follows from Cramer's rule, without cancellation near sigma = 0.

    Raises
    ------
    ScheduleError : t is a number at which the source does not determine the target (noise where alpha = 0, data where
        sigma = 0).
    """
    if source == target:
        return 0.0, 1.0
    a, s = schedule.alpha(t), schedule.sigma(t)
    at_number = not isinstance(t, Tensor)
    if at_number and s == 0 and "score" in (source, target):
        raise ScheduleError(f"the score is infinite at the data, t = {t:g}.")
    if at_number and s == 0 and target == "data" and a > 0:  # the state is alpha x_0, whatever the model says
        return 1 / a, 0.0
    m1, m2 = _in_data_and_noise(schedule, t, source, a, s)
    g1, g2 = _in_data_and_noise(schedule, t, target, a, s)
    determinant = a * m2 - s * m1
    if at_number and determinant == 0:
        raise ScheduleError(
            f"{source} does not determine {target} at t = {t:g}, where alpha = {a:g} and sigma = {s:g}: "
            "start or end the grid a little inside, or use a model with another prediction type."
        )
    factors = (g1 * m2 - g2 * m1) / determinant, (a * g2 - s * g1) / determinant
    if at_number and not all(math.isfinite(f) for f in factors):
        raise ScheduleError(f"{target} is infinite at t = {t:g}, where alpha = {a:g} and sigma = {s:g}.")
    return factors


def converted(x: Tensor, output: Tensor, factors: tuple[float, float]) -> Tensor:
    """A model's output at state x in another form: ``p * x + q * output``, a new tensor.

    Parameters
    ----------
    x, output : [B, ...], of equal dtype and device; neither is changed.
    factors : (p, q) of :func:`conversion`.
    """
    p, q = factors
    if (p, q) == (0.0, 1.0):
        return output.clone()
    scaled = torch.mul(x, p)
    return scaled.add_(output, alpha=q) if may_write() else scaled.add(output, alpha=q)


def check_prediction(prediction: object) -> None:
    """Raise UnknownNameError unless `prediction` is the name of a form."""
    if prediction not in PREDICTIONS:
        raise unknown_name("prediction type", prediction, PREDICTIONS)


def _in_data_and_noise(schedule: Schedule, t: Any, form: str, a: Any, s: Any) -> tuple[Any, Any]:
    match form:
        case "data":
            return 1.0, 0.0
        case "noise":
            return 0.0, 1.0
        case "score":
            return 0.0, -1 / s
        case "v":
            return -s, a
        case "velocity":
            return schedule.alpha_prime(t), schedule.sigma_prime(t)
    raise unknown_name("prediction type", form, PREDICTIONS)


@dataclass(frozen=True, eq=False)
class Evaluation(Generic[V]):
    """An evaluation of a model, in every form: the forms are linear in each other for given x and t.

    Parameters
    ----------
    schedule, t : schedule and time of the evaluation.
    x : the evaluated state, a tensor, or a symbolic vector while a plan is traced.
    output : the model output, in the form named by `form`.
    """

    schedule: Schedule
    t: Any
    x: V
    output: V
    form: str

    def as_form(self, form: str) -> V:
        """The evaluation as data, noise, score, v or velocity; shape and dtype of x, and a new tensor."""
        if form == self.form:
            out: Any = self.output
            own: Any = out.clone() if isinstance(out, Tensor) else out
            kept: V = own
            return kept
        p, q = conversion(self.schedule, self.t, self.form, form)
        x: Any = self.x
        result: V = _like(p, x) * x + _like(q, x) * self.output
        return result

    @property
    def data(self) -> V:
        """Estimate of x_0."""
        return self.as_form("data")

    @property
    def noise(self) -> V:
        """Estimate of eps."""
        return self.as_form("noise")

    @property
    def score(self) -> V:
        """Estimate of the gradient of log p_t: -eps / sigma."""
        return self.as_form("score")

    @property
    def v(self) -> V:
        """alpha eps - sigma x_0."""
        return self.as_form("v")

    @property
    def velocity(self) -> V:
        """dx/dt along the flow."""
        return self.as_form("velocity")


def _like(value: Any, x: Any) -> Any:
    """A float64 factor computed from a time on the device, shaped to scale x without widening its dtype."""
    if not isinstance(value, Tensor) or not isinstance(x, Tensor):
        return value
    value = value.to(device=x.device, dtype=x.dtype)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


class Forms(ABC, Generic[V]):
    """Evaluations of a model in a chosen form, on states V: tensors, or symbolic vectors of a plan."""

    @abstractmethod
    def evaluate(self, x: V, t: Any, form: str = "data") -> Evaluation[V]:
        """One evaluation, readable in any form.

        Parameters
        ----------
        x : the state, [B, ...].
        t : the time, a number.
        form : form in which a plan stores the output.

        Returns
        -------
        The evaluation.
        """

    def as_form(self, x: V, t: Any, form: str) -> V:
        """The model's output in the named form; one evaluation.

        Parameters
        ----------
        x : the state, [B, ...].
        t : the time, a number.
        form : ``"data"``, ``"noise"``, ``"score"``, ``"v"`` or ``"velocity"``.

        Returns
        -------
        The output, in the shape and dtype of x.
        """
        return self.evaluate(x, t, form).as_form(form)

    def data(self, x: V, t: Any) -> V:
        """Estimate of x_0; one evaluation.

        Parameters
        ----------
        x : the state, [B, ...].
        t : the time, a number.

        Returns
        -------
        The estimate, in the shape and dtype of x.
        """
        return self.as_form(x, t, "data")

    def noise(self, x: V, t: Any) -> V:
        """Estimate of eps; one evaluation.

        Parameters
        ----------
        x : the state, [B, ...].
        t : the time, a number.

        Returns
        -------
        The estimate, in the shape and dtype of x.
        """
        return self.as_form(x, t, "noise")

    def score(self, x: V, t: Any) -> V:
        """Estimate of the score; one evaluation.

        Parameters
        ----------
        x : the state, [B, ...].
        t : the time, a number.

        Returns
        -------
        The estimate, -eps / sigma, in the shape and dtype of x.
        """
        return self.as_form(x, t, "score")

    def v(self, x: V, t: Any) -> V:
        """alpha eps - sigma x_0; one evaluation.

        Parameters
        ----------
        x : the state, [B, ...].
        t : the time, a number.

        Returns
        -------
        The value, in the shape and dtype of x.
        """
        return self.as_form(x, t, "v")

    def velocity(self, x: V, t: Any) -> V:
        """dx/dt; one evaluation.

        Parameters
        ----------
        x : the state, [B, ...].
        t : the time, a number.

        Returns
        -------
        The velocity, in units of the state per unit of t, in the shape and dtype of x.
        """
        return self.as_form(x, t, "velocity")
