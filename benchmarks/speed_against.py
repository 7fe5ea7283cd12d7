"""CPU time of this tree over the CPU time of a commit: python benchmarks/speed_against.py [--commit 7de071f].

Both trees run the same tasks in turn, each in a process of its own with one thread. A task is repeated in every round; the
ratio divides the least times of all rounds. Needs a quiet machine, and takes about six minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bit_equal import ROOT, unpack

# Runs in both trees.
TASKS = """
import json, sys, time, warnings
import torch
import iia_ode as iia
from iia_ode.experiments import get_setting
from iia_ode.plan import trace

warnings.simplefilter("ignore")
torch.set_num_threads(1)
edm, grid = iia.EDM(), iia.grids.karras(10)
tiny = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t[:, None] ** 2), edm, "data")
few = 80 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
digits, noise = get_setting("digits").draw(64, 0)
mixture, states = get_setting("mixture64").draw(256, 0)
mixed = iia.grids.karras(10, schedule=mixture.schedule)
numbers = iia.grids.karras(10, schedule=digits.schedule)
plan = trace(iia.get_solver("dpmpp_2m"), edm, grid)
fresh = iter(range(10**9))


def new_grid(n):
    return iia.grids.karras(n, sigma_max=80 + next(fresh) / 1e6)


def many(function, n):
    return lambda: [function() for _ in range(n)]


tasks = {
    "sample, ddim, tiny model": many(lambda: iia.sample(tiny, few, grid, "ddim"), 40),
    "sample, heun, tiny model": many(lambda: iia.sample(tiny, few, grid, "heun"), 40),
    "plan.run, dpmpp_2m, tiny model": many(lambda: plan.run(tiny, few), 40),
    "odeint, dopri5, tiny model": lambda: iia.odeint(tiny, few, grid[:-1], method="dopri5", rtol=1e-5, atol=1e-5),
    "trace, unipc": many(lambda: trace(iia.get_solver("unipc"), edm, new_grid(10)), 3),
    "trace, rk4": many(lambda: trace(iia.get_solver("rk4"), edm, new_grid(30)), 2),
    "sample, dpmpp_2m, digits": lambda: iia.sample(digits, noise, numbers, "dpmpp_2m"),
    "teacher, mixture64": lambda: iia.Teacher.for_grid(mixture, states, mixed),
    "IIA.fit, mixture64": lambda: iia.preset("iia-ddim").fit(mixture, states, mixed),
    "fit, closed-form, mixture64": lambda: iia.fit(mixture, 5, x=states, budget="closed-form"),
}
times = {}
for name, task in tasks.items():
    task()
    repeats = []
    for _ in range(1 if name.startswith("fit") else 5):
        begun = time.process_time()
        task()
        repeats.append(time.process_time() - begun)
    times[name] = min(repeats)
print(json.dumps(times))
"""


def measured(folder: Path) -> dict[str, float]:
    """CPU seconds of each task with the package in a folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", TASKS], check=True, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True
    )
    times: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="7de071f")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = ROOT / "build" / "speed_against" / options.commit
    unpack(options.commit, folder)
    rounds = [(measured(folder), measured(ROOT)) for _ in range(options.rounds)]
    for name in rounds[0][0]:
        old, new = (min(r[side][name] for r in rounds) for side in (0, 1))
        print(f"{new / old:6.3f}  {name} ({new:.3g} s)")


if __name__ == "__main__":
    main()
