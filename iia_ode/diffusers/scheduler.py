"""IIAScheduler: every plan of this library as a scheduler of diffusers."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from torch import Tensor

from ..errors import InputError, MismatchError
from ..solvers.base import SolverLike
from .choice import Choice, Fixed, chosen
from .identity import check_networks, scheduler_of
from .running import PipelineRun, check_step, first_state, mean_of
from .saving import KEY, Saved, described, frozen
from .timesteps import Clock, Order, check_given, check_told, order_of
from .translation import prediction_of, schedule_of

__all__ = ["IIAScheduler"]


class IIAScheduler(Saved):
    """A scheduler of diffusers that runs the plan of a fitted or classic solver; :meth:`of` makes it.

    The scheduler is deterministic. States are alpha x_0 + sigma noise, and states of half precision are kept in float32 inside
    of the scheduler. ``num_inference_steps`` counts the evaluations of a fitted solver or a plan. For a classic solver, and
    for a plan with an equal number of evaluations in every step, such as Heun's method, ``num_inference_steps`` counts steps.
    The configuration is the configuration of the replaced scheduler, from which other schedulers can still be made.
    ``clip_sample`` and ``thresholding`` in the configuration have no effect.

    >>> pipe.scheduler = IIAScheduler.of(fit, pipe.scheduler)
    >>> image = pipe(prompt, num_inference_steps=fit.nfe).images[0]

    Attributes
    ----------
    timesteps, sigmas : timesteps of the evaluations [N], and their levels with the last level of the grid [N + 1].
    plan : the plan of the next run.
    order : evaluations per unit of ``num_inference_steps``.
    init_noise_sigma : factor of the initial noise; 1 for states of unit size.
    replaced, whole_timesteps : arguments of :meth:`of`.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012  (as the base class has it)

    def __init__(self, choice: Choice, base: Any, whole_timesteps: bool = False) -> None:
        self._choice, self.replaced, self.whole_timesteps = choice, base, whole_timesteps
        self._clock = Clock.of(base, whole_timesteps)
        self._prediction = prediction_of(base)
        self._internal_dict = frozen({**base.config, KEY: described(choice, base, whole_timesteps)})
        shift = base.config.get("base_shift") if base.config.get("use_dynamic_shifting") else None
        self.set_timesteps(10 if choice.classic is not None else min(choice.plans), mu=shift)

    @classmethod
    def of(
        cls,
        solver: Fixed | SolverLike | list[Fixed] | tuple[Fixed, ...],
        scheduler: Any,
        *,
        otherwise: SolverLike | None = None,
        whole_timesteps: bool | None = None,
    ) -> Self:
        """Make a scheduler from a solver and the pipeline, or the scheduler that it replaces.

        Parameters
        ----------
        solver : a fitted solver or a plan; a list of them with different numbers of evaluations; or a classic solver by name,
            such as ``"dpmpp_2m"``, which takes the grid of `scheduler` for each ``num_inference_steps``. A plan on ``EDM()``
            moves to the schedule of the pipeline.
        scheduler : the pipeline, or its scheduler, whose noise schedule, prediction type and configuration stay. The networks
            of a fit are compared with those of a pipeline; a scheduler has no networks.
        otherwise : classic solver for runs that begin in the middle of a fitted solver or a plan, as image-to-image does with
            ``strength`` below 1. The solver takes the remaining timesteps. By default such a run is an error.
        whole_timesteps : whether the model is told whole numbers, as by ``UniPCMultistepScheduler``; by default as in the fit.

        Returns
        -------
        The scheduler, for ``pipe.scheduler = ...``.

        Raises
        ------
        InputError : no solver, or a scheduler whose states are not alpha x_0 + sigma noise of unit size.
        UnknownNameError : no such solver.
        MismatchError : the solver was made for another schedule or prediction type, or has constants per condition.

        Warns
        -----
        FingerprintWarning : the fit was made for a network that the pipeline does not have.
        """
        base = scheduler_of(scheduler)
        base = base.replaced if isinstance(base, IIAScheduler) else base
        choice = chosen(solver, schedule_of(base), prediction_of(base), otherwise)
        check_networks(choice.fixed.values(), scheduler)
        return cls(choice, copy.deepcopy(base), choice.is_whole if whole_timesteps is None else whole_timesteps)

    # ---- before a run --------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Start anew with the plan for a number of steps.

        Parameters
        ----------
        num_inference_steps : number of steps; by default the length of `sigmas` or `timesteps`.
        device : of ``timesteps``.
        sigmas, timesteps, mu : grid of a classic solver, as for the replaced scheduler. A fitted solver or a plan accepts its
            own levels only, and the equidistant sigmas that pipelines of flow models pass by default.

        Raises
        ------
        InputError : no number of steps.
        MismatchError : no plan has this number of steps, or the levels are not those of the plan.
        """
        options: dict[str, Any] = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
        given = {k: v for k, v in options.items() if v is not None}
        n = next((len(given[k]) for k in ("sigmas", "timesteps") if k in given), num_inference_steps)
        if n is None:
            raise InputError("set_timesteps takes num_inference_steps, sigmas or timesteps.")
        check_told(self.replaced, given, self._clock)
        self.plan = self._choice.plan(n, self.replaced, given)
        self.num_inference_steps, self.order = n, order_of(self.plan)
        times = self.plan.evaluation_times
        self.timesteps = self._clock.timesteps(times, device)
        self._order = Order(self.timesteps, tuple(self._clock.timesteps(times).tolist()))
        self.sigmas = self._clock.sigmas((*times, self.plan.grid[-1]))
        if self._choice.classic is None:
            check_given(given, torch.tensor(self._order.values), self.sigmas, self.plan.name, self._clock)
        self.init_noise_sigma = max(1.0, self._clock.schedule.sigma(self.plan.grid[0]))
        self._run: PipelineRun | None = None
        self._is_started = self._is_noised = False
        self._is_warm = self.plan.starts[0] != 0  # the model is evaluated at another state than the initial one
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Index of the next evaluation; None before the first :meth:`step`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first evaluation, if the pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the first evaluation of a run that begins in the middle."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Tensor | float) -> int:
        """The index of a timestep: its own index for an entry of ``timesteps``, else the index of the first nearest value."""
        return self._order.index(timestep)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The state of the evaluation [B, ...]: `sample`, or at the first timestep the end of a warm start."""
        if not self._is_warm or self._run is not None or (timestep is not None and self.index_for_timestep(timestep)):
            return sample
        self._is_started = True
        return first_state(self.plan, sample, self._prediction)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at timesteps [B], or at one timestep for all; nothing is read from a device.

        Parameters
        ----------
        original_samples, noise : data and noise [B, ...].
        timesteps : timesteps [B] or [1], of the plan or others.

        Returns
        -------
        The state [B, ...], in the dtype and on the device of `original_samples`.

        Raises
        ------
        InputError : no timestep, as with a small ``strength``.
        """
        self._is_noised = True
        times = (self.plan.grid[0], *self.plan.evaluation_times[1:])  # a warm start comes before the first evaluation
        return self._clock.noised(original_samples, noise, timesteps, times)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same as :meth:`add_noise`, for flow models."""
        return self.add_noise(sample, noise, timestep)

    # ---- a run ---------------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        return_dict: bool = True,
        **others: Any,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the model's output, and run on to the state of the next evaluation.

        Parameters
        ----------
        model_output : output of the model [B, ...], guidance included; channels of a learned variance are left out.
        timestep : the timestep of the evaluation.
        sample : the state [B, ...] that was evaluated. A changed state, as by inpainting or a callback, replaces the state of
            the run.
        eta, use_clipped_model_output, generator : 0, and arguments without effect: a plan is deterministic.
        return_dict : whether to return a ``SchedulerOutput``, or a tuple.
        others : refused: arguments for schedulers of one kind, such as ``per_token_timesteps``.

        Returns
        -------
        The state of the next evaluation, or the final state, in the dtype of `sample`.

        Raises
        ------
        InputError : eta is not 0, the step is out of order, or a tensor does not fit.
        MismatchError : the run cannot begin at this timestep, or the weights belong to states of another shape.

        Warns
        -----
        MismatchWarning : a fit from noised images begins, and the pipeline has noised no image.
        """
        check_step(self.plan.name, eta, others)
        if self._run is None:
            run, k = self._begun(timestep, sample)
        else:
            run, k = self._run, self._step_index or 0
            self._order.check(timestep, k, self.plan.name)
            run.accept(sample)
        state = run.give(mean_of(model_output, sample, self.config), sample.dtype)
        self._run, self._step_index = run, k + 1
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def _begun(self, timestep: Tensor | float, sample: Tensor) -> tuple[PipelineRun, int]:
        k = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        self._order.check(timestep, k, self.plan.name)
        if k == 0 and self._is_warm and not self._is_started:
            raise MismatchError(
                f"{self.plan.name} begins with a warm start, which changes the first state before its evaluation, and this "
                "pipeline does not call scale_model_input: fit again without a warm start (budget='standard')."
            )
        if k == 0 and not self._is_noised:
            self._choice.check_noise(self.plan)
        return PipelineRun.begin(self._choice.rest(self.plan, k) if k else self.plan, sample, self._prediction), k
