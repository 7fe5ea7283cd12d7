"""Names and configurations of the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

__all__ = ["EDMS", "FLOWS", "config_of", "is_flow", "name_of"]

EDMS = ("EDMEuler", "EDMDPMSolverMultistep")
FLOWS = (
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMapEulerDiscrete"),
    *("LTXEulerAncestralRF", "FlowMatchLCM", "MiniMaxH3"),
)
_OTHERS = (
    *("DDIM", "DDIMParallel", "DDIMInverse", "CogVideoXDDIM", "TCD", "PNDM", "IPNDM", "LMSDiscrete", "EulerDiscrete"),
    *("HeunDiscrete", "KDPM2Discrete", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep"),
    *("UniPCMultistep", "DEISMultistep", "CosineDPMSolverMultistep"),
)


def name_of(scheduler: Any) -> str:
    """The name of the nearest known class of a scheduler, without "Scheduler": ``"DDIM"`` for a ``DDIMScheduler``."""
    names = [kind.__name__.removesuffix("Scheduler") for kind in type(scheduler).__mro__]
    return next((name for name in names if name in (*EDMS, *FLOWS, *_OTHERS)), names[0])


def config_of(scheduler: Any) -> dict[str, Any]:
    """The configuration of a scheduler; InputError for an object that is no scheduler."""
    config = getattr(scheduler, "config", None)
    if config is None or not hasattr(scheduler, "set_timesteps"):
        raise InputError(f"expected a scheduler of diffusers, got {type(scheduler).__name__}.")
    return dict(config)


def is_flow(name: str, config: dict[str, Any]) -> bool:
    """Whether the states of a scheduler are (1 - sigma) x_0 + sigma eps."""
    return name in FLOWS or bool(config.get("use_flow_sigmas"))
