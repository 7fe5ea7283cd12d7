"""The table of the schedulers of the installed diffusers, with the solver, schedule and time of each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import diffusers

from ..errors import InputError, first_line
from ..solvers import LowerOrderFinal
from .counterparts import solver_of
from .translation import schedule_of, time_of

__all__ = ["scheduler_table"]

_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "PNDMScheduler": ({"skip_prk_steps": True}, {}),
    "DPMSolverMultistepScheduler": (
        {},
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "DPMSolverSinglestepScheduler": ({"lower_order_final": True}, {"solver_order": 3, "lower_order_final": True}),
    "UniPCMultistepScheduler": (
        {},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"predict_x0": False},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
    "DEISMultistepScheduler": ({}, {"solver_order": 3}),
    "EulerDiscreteScheduler": (
        {},
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0},
    ),
    "LTXEulerAncestralRFScheduler": ({"eta": 0.0}, {}),
    "FlowMatchEulerDiscreteScheduler": ({}, {"invert_sigmas": True}, {"stochastic_sampling": True}),
}
"""Configurations with rows of their own."""

_FEW, _MANY = 10, 20  # steps below and above the number where some schedulers lower their order


def scheduler_table() -> str:
    """Describe the schedulers of the installed diffusers in the terms of this library.

    Returns
    -------
    A table in Markdown: a row for each scheduler and for each configuration with another solver. The columns are scheduler,
    solver, schedule and the time that a pipeline tells its model. A row without a counterpart says why.
    """
    rows = [f"| {' | '.join(cells)} |" for cells in _rows()]
    return "\n".join(["| scheduler | solver | schedule | `time` |", "|---|---|---|---|", *rows])


def _rows() -> Iterator[tuple[str, str, str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated configurations
        for name in sorted(dir(diffusers)):
            kind = getattr(diffusers, name) if name.endswith("Scheduler") else None
            if kind is None or not _takes_steps(kind):
                continue
            for config in _VARIANTS.get(name, ({},)):
                shown = "".join(f", `{key}={value!r}`" for key, value in config.items())
                yield (f"`{name}`{shown}", *_cells(kind, config))


def _takes_steps(kind: Any) -> bool:
    try:
        return hasattr(kind, "set_timesteps")
    except ImportError:  # of a package that is not installed
        return False


def _cells(kind: Any, config: dict[str, Any]) -> tuple[str, str, str]:
    """The solver, the schedule and the told time, or the reason why there is none."""
    try:
        scheduler = kind(**config)
    except Exception as error:  # of any kind: some need arguments, or packages that are not installed
        return f"none: it is made with arguments ({type(error).__name__})", "", ""
    try:
        solver = _label(scheduler)
    except InputError as error:
        solver = f"none: it {first_line(error).split('. ')[0].partition(' ')[2]}"
    try:
        time = time_of(scheduler)
        return solver, f"`{_brief(schedule_of(scheduler))}`", f"`{time!r}`" if not callable(time) else "a function"
    except InputError:
        return solver, "", ""


def _label(scheduler: Any) -> str:
    few, many = solver_of(scheduler, _FEW), solver_of(scheduler, _MANY)
    if isinstance(few, LowerOrderFinal):
        where = "" if isinstance(many, LowerOrderFinal) else " below 15 steps"
        base: Any = few.base
        return f"`{base.label}` in `lower_order_final`{where}"
    return f"`{few.label}`"


def _brief(schedule: Any) -> str:
    config = schedule.config()
    inside = {"Discrete": "table", "EDM": "known_levels", "Cosine": "known_levels"}.get(config["type"], "reverse")
    if inside == "table":
        return "Discrete(alphas_cumprod)"
    return f"{config['type']}({f'{inside}={config[inside]}' if inside in config else ''})"
