"""Few-evaluation samplers for diffusion and flow models; see the README.

>>> import iia_ode as iia
"""

from . import grids, problems
from .errors import IIAError
from .ode import ProbabilityFlowODE
from .plan import Past, Plan, trace
from .schedules import EDM, VE, VP, Cosine, Discrete, FlowMatching, Schedule, from_functions
from .solvers import Solver, get_solver, register, solver_names

__version__ = "0.1.0.dev0"
