"""Many samples, written to a folder by any number of processes; see :func:`iia_ode.sample_many`."""

from .folder import read_samples
from .sampling import Samples, sample_many

__all__ = ["Samples", "read_samples", "sample_many"]
