r"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, in float64, exact at both ends.

Time runs in each schedule's own unit (EDM: the noise level; VP, cosine, flow: [0, 1]; discrete: the timestep index) and
every schedule is defined by ``alpha`` and ``sigma``. Everything else follows: the half-log-SNR
:math:`\lambda_t = \log(\alpha_t/\sigma_t)` [Lu et al. 2022], its inverse, and the coefficients of the probability-flow
ODE :math:`dx/dt = f(t)\,x + g^2(t)/(2\sigma_t)\,\epsilon` with :math:`f = d\log\alpha/dt` and
:math:`g^2 = d\sigma^2/dt - 2 f \sigma^2` [Song et al. 2021, Kingma et al. 2021].
"""

from .base import FromFunctions, Schedule
from .standard import EDM, VE, VP, Cosine, Discrete, FlowMatching, schedule_from_config

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "FlowMatching",
    "FromFunctions",
    "Schedule",
    "schedule_from_config",
]
