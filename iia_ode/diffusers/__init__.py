"""Pipelines of diffusers as ODEs, and solvers of this library as their schedulers.

>>> ode = iia.diffusers.ode(pipe, prompt=prompts, guidance_scale=7.5)
>>> fit = iia.fit(ode, nfe=6, shape=ode.state_shape)
>>> pipe.scheduler = iia.diffusers.IIAScheduler.of(fit, pipe.scheduler)
"""

from ..errors import MissingDependencyError

try:
    from diffusers import SchedulerMixin  # noqa: F401  (pipelines look for this name in the module of a scheduler)
except ImportError as error:
    raise MissingDependencyError("iia_ode.diffusers needs diffusers: pip install 'iia-ode[diffusers]'") from error

from .pipeline import PipelineODE, ode
from .scheduler import IIAScheduler

__all__ = ["IIAScheduler", "PipelineODE", "ode"]

# The name under which a saved pipeline finds the class, and under which a reader imports it.
IIAScheduler.__module__ = __name__
