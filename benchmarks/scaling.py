"""The same problem in other units: python benchmarks/scaling.py [--nfe 5] [--settings mixture64 digits].

Fits mixture64 (256 draws, float64) and digits (64 draws, a float64 copy of the network) with data, states and noise levels
times c = 1e-4, 1, 64 and 1e4, by both quick budgets. For each fit, prints the difference of grid / c and of
the reported error / c from those at c = 1.
"""

import argparse
import copy
import time

import torch
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.experiments import get_setting

UNITS = (1.0, 1e-4, 64.0, 1e4)
DRAWS = {"mixture64": 256, "digits": 64}


class Scaled(nn.Module):
    """A model of data times c: D_c(x, sigma) = c D(x / c, sigma / c)."""

    def __init__(self, model: nn.Module, c: float) -> None:
        super().__init__()
        self.model, self.c = model, c

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Evaluate the model in its own unit."""
        out: Tensor = self.model(x / self.c, t / self.c, **conditions)
        return self.c * out


def draw(name: str, c: float) -> tuple[iia.ProbabilityFlowODE, Tensor]:
    """The ODE of a setting in units of c, and its initial states, in float64."""
    ode, x = get_setting(name).draw(DRAWS[name], 0)
    model = copy.deepcopy(ode.model).double()
    return iia.ProbabilityFlowODE(Scaled(model, c), ode.schedule, "data", conditioning=ode.conditioning), c * x.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--settings", nargs="*", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--budgets", nargs="*", default=["closed-form", "standard"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.settings:
        for budget in options.budgets:
            first = None
            for c in UNITS:
                ode, x = draw(name, c)
                begun = time.perf_counter()
                fit = iia.fit(ode, options.nfe, x=x, sigma_max=80 * c, sigma_min=0.002 * c, budget=budget)
                grid, error = fit.grid / c, fit.record.endpoint.fit / c
                first = first or (grid, error)
                apart = float((grid - first[0]).abs().max() / first[0].abs().max())
                print(
                    f"{name} {budget} c={c:g}: error / c {error:.9g} (differs by {abs(error / first[1] - 1):.1e}), grid / c "
                    f"differs by {apart:.1e}, teacher's error / c {fit.record.endpoint.teacher_error / c:.2e}, "
                    f"{fit.record.sample_evaluations} sample evaluations, {time.perf_counter() - begun:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
