"""Teacher: accurate trajectories of a batch, the reference for fits, guards and searches."""

from .integration import Integration
from .record import TeacherOptions, TeacherRecord
from .teacher import Teacher

__all__ = ["Integration", "Teacher", "TeacherOptions", "TeacherRecord"]
