"""Solvers of this library that make the steps of the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError
from ..solvers import BlockDPMSolver, DPMSolverMultistep, LowerOrderFinal, OrderRamp, Solver, UniPC, get_solver
from .kinds import config_of, is_edm, name_of

__all__ = ["solver_of"]

_STOCHASTIC = (
    *("DDPM", "DDPMParallel", "DDPMWuerstchen", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"),
    *("CosineDPMSolverMultistep", "CogVideoXDPM", "SASolver", "LCM", "FlowMatchLCM", "SCM", "CMStochasticIterative"),
    *("UnCLIP", "RePaint", "ScoreSdeVe"),
)
_FEW = 15  # steps below which lower_order_final of DPM-Solver and DEIS applies


def solver_of(scheduler: Any, n: int | None = None) -> Solver:
    """The solver of this library that makes the steps of a scheduler.

    On the grid of :func:`~iia_ode.diffusers.grid_of`, solver and scheduler return the same numbers. ``clip_sample`` and
    ``thresholding`` are not part of a solver: :func:`~iia_ode.denoisers.static_thresholding` and
    :func:`~iia_ode.denoisers.dynamic_thresholding` wrap the ODE instead.

    Parameters
    ----------
    scheduler : a scheduler of diffusers.
    n : number of steps, by default the number of the scheduler. Some schedulers lower their order at the end of few steps.

    Returns
    -------
    The solver, with the options of the scheduler.

    Raises
    ------
    InputError : the scheduler draws noise, has options without counterpart, or needs `n`.
    """
    name, config = name_of(scheduler), config_of(scheduler)
    if n is None:
        n = getattr(scheduler, "num_inference_steps", None)
    found = _SOLVERS.get(name)
    if found is None:
        why = "draws noise in its steps" if name in _STOCHASTIC else "is no solver of an ordinary differential equation"
        raise _none(scheduler, why)
    return found(_Options(scheduler, config, n))


class _Options:
    """The configuration of a scheduler and its number of steps."""

    def __init__(self, scheduler: Any, config: dict[str, Any], n: int | None) -> None:
        self.scheduler, self.config, self._n = scheduler, config, n
        self.order = int(config.get("solver_order", 2))

    @property
    def n(self) -> int:
        if self._n is None:
            raise InputError(
                f"{type(self.scheduler).__name__} uses other orders with few steps: call set_timesteps, or pass n."
            )
        return self._n

    def choice(self, key: str, *known: Any, default: Any = None) -> Any:
        """The value of an option; InputError for a value without a counterpart."""
        value = self.config.get(key, known[0] if default is None else default)
        if value not in known:
            raise _none(self.scheduler, f"has no counterpart with {key}={value!r}")
        return value


def _named(name: str) -> Callable[[_Options], Solver]:
    return lambda options: get_solver(name)


def _dpm_multistep(o: _Options) -> Solver:
    form = {"dpmsolver++": "data", "dpmsolver": "noise"}[o.choice("algorithm_type", "dpmsolver++", "dpmsolver")]
    kind = {"midpoint": "midpoint", "heun": "taylor"}[o.choice("solver_type", "midpoint", "heun")]
    solver: Solver = DPMSolverMultistep(form=form, max_order=o.order, solver_type=kind)
    if o.config.get("lower_order_final", True) and (o.order > 1 and o.n < _FEW):
        return LowerOrderFinal(solver)
    if o.config.get("euler_at_final") and o.order > 1:
        return OrderRamp(solver, (*(min(i, o.order) for i in range(1, o.n)), 1))
    return solver


def _dpm_singlestep(o: _Options) -> Solver:
    o.choice("algorithm_type", "dpmsolver++")
    o.choice("solver_type", "midpoint")
    return BlockDPMSolver(o.order, lower_order_final=bool(o.config.get("lower_order_final", False)))


def _unipc(o: _Options) -> Solver:
    form = "data" if o.config.get("predict_x0", True) else "noise"
    if o.config.get("solver_p") is not None:
        raise _none(o.scheduler, "has no counterpart with a predictor of its own (solver_p)")
    off = set(o.config.get("disable_corrector") or ())
    if off and off & (corrected := set(range(o.n - 1))) not in (set(), corrected):
        raise _none(o.scheduler, "has no counterpart with a corrector in some steps only (disable_corrector)")
    variant = o.choice("solver_type", "bh2", "bh1")
    solver = UniPC(max_order=o.order, form=form, variant=variant, corrector=not off or not off & set(range(o.n - 1)))
    return LowerOrderFinal(solver) if o.config.get("lower_order_final", True) else solver


def _deis(o: _Options) -> Solver:
    o.choice("algorithm_type", "deis")
    o.choice("solver_type", "logrho")
    solver = get_solver(f"deis_lab{o.order}")
    lowered = o.config.get("lower_order_final", True) and o.order > 1
    return LowerOrderFinal(solver) if lowered and o.n < _FEW else solver


def _pndm(o: _Options) -> Solver:
    o.choice("prediction_type", "epsilon")
    return get_solver("plms" if o.config.get("skip_prk_steps") else "fpndm")


def _flow_euler(o: _Options) -> Solver:
    o.choice("stochastic_sampling", False)
    if name_of(o.scheduler) == "LTXEulerAncestralRF":
        o.choice("eta", 0.0, default=1.0)
    return get_solver("euler")


def _edm_euler(o: _Options) -> Solver:
    return get_solver("euler" if is_edm("EDMEuler", o.config) else "ddim")  # Euler's method on x / alpha


_SOLVERS: dict[str, Callable[[_Options], Solver]] = {
    "DDIM": _named("ddim"),
    "DDIMParallel": _named("ddim"),
    "DDIMInverse": _named("ddim"),
    "CogVideoXDDIM": _named("ddim"),
    "TCD": _named("ddim"),
    "PNDM": _pndm,
    "IPNDM": _named("ipndm"),
    "LMSDiscrete": _named("lms"),
    "EulerDiscrete": _named("ddim"),
    "HeunDiscrete": _named("deis_rho_heun"),
    "KDPM2Discrete": _named("dpm2"),
    "DPMSolverMultistep": _dpm_multistep,
    "DPMSolverMultistepInverse": _dpm_multistep,
    "EDMDPMSolverMultistep": _dpm_multistep,
    "DPMSolverSinglestep": _dpm_singlestep,
    "UniPCMultistep": _unipc,
    "DEISMultistep": _deis,
    "EDMEuler": _edm_euler,
    "FlowMatchEulerDiscrete": _flow_euler,
    "FlowMapEulerDiscrete": _flow_euler,
    "LTXEulerAncestralRF": _flow_euler,
    "MiniMaxH3": _flow_euler,
    "FlowMatchHeunDiscrete": _named("heun"),
}


def _none(scheduler: Any, why: str) -> InputError:
    names: Sequence[str] = sorted(f"{name}Scheduler" for name in _SOLVERS)
    return InputError(f"{type(scheduler).__name__} {why}. Schedulers with a counterpart: {', '.join(names)}.")
