"""Names and configurations of the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

__all__ = ["EDMS", "FLOWS", "config_of", "is_edm", "is_flow", "name_of"]

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


def is_edm(name: str, config: dict[str, Any]) -> bool:
    """Whether the states of a scheduler are x_0 + sigma eps, with the scalings of EDM.

    EDM schedulers with v prediction and ``sigma_data=1`` (CosXL) have the states and outputs of a cosine schedule, because
    their c_out has the opposite sign.
    """
    is_cosine = config.get("prediction_type") == "v_prediction" and config.get("sigma_data") == 1
    return name in EDMS and not is_cosine


def is_flow(name: str, config: dict[str, Any]) -> bool:
    """Whether the states of a scheduler are (1 - sigma) x_0 + sigma eps."""
    return name in FLOWS or bool(config.get("use_flow_sigmas"))
