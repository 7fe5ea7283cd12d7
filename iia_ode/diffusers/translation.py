"""Schedulers of diffusers in the terms of this library: schedule, prediction type, told time and grid.

Each function reads the configuration of a scheduler and its tables, and changes nothing. Classes are known by name, so that a
subclass counts as the nearest known class.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import GridError, InputError
from ..grids.origin import made_for
from ..schedules import EDM, Cosine, Discrete, FlowMatching, Schedule
from .kinds import EDMS, FLOWS, config_of, is_edm, is_flow, name_of

__all__ = ["grid_of", "prediction_of", "schedule_of", "time_of"]

_F64 = torch.float64
_PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "v", "flow_prediction": "velocity"}
_ZERO = 1e-30  # alpha^2 in place of the 0 of a table with zero terminal SNR: alpha below the rounding of float64
_ABOVE = 1e-3  # relative distance of entries that would lie below the last one
_WHOLE = 1e-3  # distance from a whole timestep that is rounding of float32


def schedule_of(scheduler: Any) -> Schedule:
    """The noise schedule of a scheduler of diffusers.

    - ``FlowMatching`` for flow-matching schedulers and for ``use_flow_sigmas``,
      with ``reverse=True`` for ``invert_sigmas`` and MiniMax-H3;
    - ``EDM`` with the levels of the configuration for EDM schedulers;
    - ``Cosine`` for IPNDM, for continuous timesteps (Stable Video Diffusion, Stable Audio),
      and for EDM schedulers with v prediction (CosXL);
    - ``Discrete`` with the table of the scheduler for all others.

    In a table with zero terminal SNR, 1e-30 replaces a last entry of 0. A last entry of 2^-24, as of some schedulers, stays;
    lower entries before the last are raised just above the last.

    Parameters
    ----------
    scheduler : a scheduler of diffusers.

    Returns
    -------
    The schedule of the states alpha x_0 + sigma eps of the scheduler.

    Raises
    ------
    InputError : the scheduler has no noise schedule with states alpha x_0 + sigma eps.
    """
    name, config = name_of(scheduler), config_of(scheduler)
    if is_edm(name, config):
        return EDM(known_levels=(float(config["sigma_min"]), float(config["sigma_max"])))
    if name in (*EDMS, "CosineDPMSolverMultistep") or config.get("timestep_type") == "continuous":
        low, high = config.get("sigma_min"), config.get("sigma_max")
        return Cosine(known_levels=None if low is None or high is None else (float(low), float(high)))
    if is_flow(name, config):
        return FlowMatching(reverse=name == "MiniMaxH3" or bool(config.get("invert_sigmas")))
    if name == "IPNDM":
        return Cosine()
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise InputError(
            f"{type(scheduler).__name__} has no noise schedule of the form alpha x_0 + sigma eps that this library knows: "
            "make a schedule by hand, such as iia_ode.EDM() or iia_ode.FlowMatching()."
        )
    return Discrete(_decreasing(table.detach().to(_F64).tolist()))


def prediction_of(scheduler: Any) -> str:
    """The prediction type of the model of a scheduler.

    Parameters
    ----------
    scheduler : a scheduler of diffusers.

    Returns
    -------
    ``"noise"``, ``"data"``, ``"v"`` or ``"velocity"``. EDM schedulers have ``"data"``: their raw network becomes a model by
    :class:`~iia_ode.denoisers.EDMDenoiser`. With v prediction (CosXL) the network itself is the model.

    Raises
    ------
    InputError : another prediction type, such as ``"trigflow"``, or one with the opposite sign of its counterpart.
    """
    name, config = name_of(scheduler), config_of(scheduler)
    if name in (*EDMS, "CosineDPMSolverMultistep"):
        return _preconditioned(scheduler, name, config)
    default = "flow_prediction" if name in FLOWS else "v_prediction" if name == "IPNDM" else None
    kind = config.get("prediction_type", default)
    if kind not in _PREDICTIONS:
        raise InputError(f"{type(scheduler).__name__} has prediction_type {kind!r}, which has no counterpart.")
    return _PREDICTIONS[kind]


def _preconditioned(scheduler: Any, name: str, config: dict[str, Any]) -> str:
    """The prediction type of a model with the scalings of EDM, x_0 = c_skip x + c_out F, where v prediction has -c_out."""
    kind, size = config.get("prediction_type"), config.get("sigma_data")
    if is_edm(name, config) and kind == "epsilon":
        return "data"
    if kind == "v_prediction" and size == 1:
        return "v"
    raise InputError(
        f"{type(scheduler).__name__} with prediction_type={kind!r} and sigma_data={size} has no counterpart. For v_prediction "
        "the model of data prediction is EDMDenoiser around minus the network."
    )


def time_of(scheduler: Any) -> str | Callable[[Tensor], Tensor] | None:
    """The time that pipelines tell the model of a scheduler, for ``ProbabilityFlowODE(..., time=)``.

    Some pipelines change the time before the model receives the time: Flux divides by 1000, and Lumina 2 reverses the time.

    Parameters
    ----------
    scheduler : a scheduler of diffusers.

    Returns
    -------
    ``"index"``, ``"1000 sigma"``, ``"c_noise"``, None for the time of the schedule, or a function.
    """
    name, config = name_of(scheduler), config_of(scheduler)
    if name in ("IPNDM", "MiniMaxH3", "CosineDPMSolverMultistep"):
        return None
    if name in EDMS or config.get("timestep_type") == "continuous":
        return "c_noise"
    if not is_flow(name, config):
        return "index"
    total = int(config.get("num_train_timesteps", 1000))
    return "1000 sigma" if total == 1000 and not config.get("invert_sigmas") else partial(torch.mul, other=total)


def grid_of(scheduler: Any, n: int | None = None, *, tokens: int | None = None, **options: Any) -> Tensor:
    """The times through which a scheduler passes, repeats removed.

    The scheduler itself computes the times, with its spacing, its rule of levels (as ``use_karras_sigmas``) and its shift.

    Parameters
    ----------
    scheduler : a scheduler of diffusers, which stays as it is.
    n : number of steps, for ``set_timesteps`` on a copy; by default the steps that the scheduler has.
    tokens : number of image tokens (Flux: pixels / 256). Dynamic shifting computes ``mu`` from the number.
    options : further arguments of ``set_timesteps``, such as ``mu`` or ``sigmas``.

    Returns
    -------
    Times of :func:`schedule_of`, float64 [k + 1] for k steps.

    Raises
    ------
    InputError : the scheduler has no steps, or dynamic shifting has neither `tokens` nor ``mu``.
    GridError : the scheduler refuses the steps.
    """
    schedule, name, config = schedule_of(scheduler), name_of(scheduler), config_of(scheduler)
    if n is not None or options or tokens is not None:
        scheduler = _with_steps(scheduler, config, n, tokens, options)
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise InputError("the scheduler has no steps yet: call scheduler.set_timesteps(n), or pass n to grid_of.")
    if name == "DDIMInverse":
        times = scheduler.timesteps.to(_F64).cpu()
    elif hasattr(scheduler, "sigmas") or name == "IPNDM":
        times = _times_of_levels(scheduler, schedule, name, config)
    else:
        times = _whole_timesteps(scheduler, name, config)
    return made_for(times.unique_consecutive(), schedule)


def _decreasing(table: list[float]) -> Tensor:
    """A table of alpha_bar, made decreasing: for zero terminal SNR, a scheduler may have changed the last entry."""
    table[-1] = table[-1] or _ZERO
    for k in range(len(table) - 2, -1, -1):
        if table[k] > table[k + 1]:
            break
        table[k] = table[k + 1] * (1 + _ABOVE)
    return torch.tensor(table, dtype=_F64, device="cpu")


# ---- grids -----------------------------------------------------------------------------------------------------------


def _with_steps(
    scheduler: Any, config: dict[str, Any], n: int | None, tokens: int | None, options: dict[str, Any]
) -> Any:
    """A copy of the scheduler with steps."""
    if tokens is not None:
        low, high = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (high - low)
        options = {"mu": config["base_shift"] + slope * (tokens - low), **options}
    if config.get("use_dynamic_shifting") and "mu" not in options:
        raise InputError("use_dynamic_shifting needs tokens=, the number of image tokens, or mu= itself.")
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(*([] if n is None else [n]), **options)
    except Exception as error:  # of any kind: the scheduler is not ours
        raise GridError(f"{type(scheduler).__name__}.set_timesteps failed: {type(error).__name__}: {error}") from error
    return scheduler


def _times_of_levels(scheduler: Any, schedule: Schedule, name: str, config: dict[str, Any]) -> Tensor:
    """The times of the levels of a scheduler. The float32 level of a whole timestep gives the whole timestep."""
    if name == "IPNDM":
        sigma: Tensor = scheduler.betas.to(_F64).cpu()
        levels = sigma / (1 - sigma**2).sqrt()
    else:
        levels = torch.as_tensor(scheduler.sigmas, dtype=_F64, device="cpu")
    if is_edm(name, config) or is_flow(name, config):
        if isinstance(schedule, FlowMatching) and schedule.reverse:
            return 1 - levels if name == "MiniMaxH3" else levels
        return levels
    ends = sorted((schedule.t_data, schedule.t_noise))
    times = [schedule.t_noise if r == math.inf else schedule.t_of_noise_to_signal(r) for r in levels.tolist()]
    found = torch.tensor(times, dtype=_F64, device="cpu").clamp(*ends)
    whole = isinstance(schedule, Discrete) and not any(config.get(key) for key in config if key.startswith("use_"))
    near = found.round()
    return torch.where((found - near).abs() < _WHOLE, near, found) if whole else found


def _whole_timesteps(scheduler: Any, name: str, config: dict[str, Any]) -> Tensor:
    """The timesteps of a scheduler without levels, and the time at the end of its last step."""
    times: Tensor = scheduler.timesteps.to(_F64).cpu()
    if name == "PNDM" and not config.get("skip_prk_steps"):  # three steps of four calls
        times = torch.cat([times[:12:4], times[12:]])
    to_data = name != "TCD" and float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1.0
    return torch.cat([times, times.new_tensor([-1.0 if to_data else 0.0])])
