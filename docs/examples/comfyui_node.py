"""Nodes of ComfyUI for the solvers of iia_ode: copy this file into custom_nodes."""

import comfy.samplers

import iia_ode as iia
from iia_ode import kdiffusion


def _solver(name):
    """A fitted solver from a file or a repository of the hub, or a solver by its name."""
    return name if name in iia.solver_names() else iia.load(name)


class IIASampler:
    """A sampler for the node SamplerCustom, by the name of a solver or from a file."""

    RETURN_TYPES, FUNCTION = ("SAMPLER",), "make"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls):
        solver = ("STRING", {"default": "dpmpp_2m"})
        return {"required": {"solver": solver, "flow": ("BOOLEAN", {"default": False})}}

    def make(self, solver, flow):
        return (comfy.samplers.KSAMPLER(kdiffusion.sampler(_solver(solver), flow=flow)),)


class IIASigmas:
    """The levels of a fitted solver, for the node SamplerCustom."""

    RETURN_TYPES, FUNCTION = ("SIGMAS",), "make"
    CATEGORY = "sampling/custom_sampling/schedulers"

    @classmethod
    def INPUT_TYPES(cls):
        fit = ("STRING", {"default": "solver.safetensors"})
        return {"required": {"fit": fit, "flow": ("BOOLEAN", {"default": False})}}

    def make(self, fit, flow):
        return (kdiffusion.sigmas_of(iia.load(fit), flow=flow),)


NODE_CLASS_MAPPINGS = {"IIASampler": IIASampler, "IIASigmas": IIASigmas}
NODE_DISPLAY_NAME_MAPPINGS = {"IIASampler": "IIA sampler", "IIASigmas": "IIA sigmas"}
