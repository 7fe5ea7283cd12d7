"""The registry and one short file per family of solvers."""

from .base import Solver, get_solver, register, solver_names
from .exponential import DDIM
from .runge_kutta import RK4, Euler, Heun, Midpoint, RungeKutta

__all__ = ["DDIM", "RK4", "Euler", "Heun", "Midpoint", "RungeKutta", "Solver", "get_solver", "register", "solver_names"]
