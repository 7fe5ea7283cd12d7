"""Objects of diffusers as objects of this library: schedulers in its terms, and networks as models."""

from .counterparts import solver_of
from .denoiser import denoiser
from .translation import grid_of, prediction_of, schedule_of, time_of

__all__ = ["denoiser", "grid_of", "prediction_of", "schedule_of", "solver_of", "time_of"]
