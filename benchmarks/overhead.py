"""Overhead of a plan: a run of Heun's plan against the same steps written by hand.

The model is a single multiplication, and nearly all of the time belongs to the solver. The script prints ratios; both sides
are timed alternately in one process.
"""

import statistics
import time

import torch

import iia_ode as iia


def by_hand(model, x, grid):
    """Heun's method [Karras et al. 2022, algorithm 1]."""
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        d = (x - model(x, torch.full((len(x),), t))) / t
        y = x + (s - t) * d
        x = y if s == 0 else x + (s - t) / 2 * (d + (y - model(y, torch.full((len(x),), s))) / s)
    return x


def main() -> None:
    def model(x, t):
        return 0.5 * x

    grid = iia.grids.karras(18)
    times = grid.tolist()
    ode = iia.ProbabilityFlowODE(model, iia.EDM())
    plan = iia.get_solver("heun").plan(iia.EDM(), grid)
    for shape in ((1, 16), (64, 1, 8, 8), (16, 3, 64, 64)):
        x = torch.randn(shape) * 80
        ratios = []
        for _ in range(30):
            begun = time.perf_counter()
            hand = by_hand(model, x, times)
            middle = time.perf_counter()
            ours = plan.run(ode, x)
            ratios.append((time.perf_counter() - middle) / (middle - begun))
        gap = float((hand - ours).abs().max())
        print(f"{shape!s:>18}: plan / hand-written = {statistics.median(ratios):.2f}   (difference {gap:.1e})")


if __name__ == "__main__":
    main()
