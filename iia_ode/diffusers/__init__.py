"""diffusers: pipelines as ODEs, solvers as schedulers of pipelines, and networks and schedulers in the terms of this library.

>>> ode = iia.diffusers.ode(pipe, prompt=prompts, guidance_scale=7.5)
>>> fit = iia.fit(ode, nfe=6, shape=ode.state_shape)
>>> pipe.scheduler = iia.diffusers.IIAScheduler.of(fit, pipe.scheduler)
"""

from ..errors import MissingDependencyError

try:
    from diffusers import SchedulerMixin  # noqa: F401  (a pipeline looks for this name in the module of its scheduler)
except ImportError as error:
    raise MissingDependencyError("iia_ode.diffusers needs diffusers: pip install 'iia-ode[diffusers]'.") from error

from .calls import ode
from .counterparts import solver_of
from .denoiser import denoiser
from .in_use import against
from .pipeline import PipelineODE
from .saving import register
from .scheduler import IIAScheduler
from .translation import grid_of, prediction_of, schedule_of, time_of

__all__ = [
    "IIAScheduler",
    "PipelineODE",
    "against",
    "denoiser",
    "grid_of",
    "ode",
    "prediction_of",
    "schedule_of",
    "solver_of",
    "time_of",
]

# The name under which a saved pipeline finds the class, and under which a reader imports the class.
IIAScheduler.__module__ = __name__
register(__name__)
