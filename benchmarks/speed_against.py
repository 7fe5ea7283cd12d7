"""CPU time of this tree over the CPU time of a commit: python benchmarks/speed_against.py [--commit 7de071f].

Both trees run the same tasks in turn, each in a process of its own with one thread. A task is repeated in every round; the
ratio divides the least times of all rounds. Needs a quiet machine, and takes about six minutes.

With --instructions the ratio is that of executed machine instructions, counted by valgrind, which does not depend on what
else the machine does. Needs valgrind with its headers and a C compiler, and takes about half an hour.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bit_equal import ROOT, unpack

# Runs in both trees.
TASKS = """
import ctypes, json, os, sys, time, warnings
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
counter = None
if "COUNTER" in os.environ:
    counter = ctypes.CDLL(os.environ["COUNTER"])
for name, task in tasks.items():
    task()
    if counter is not None:
        counter.begin()
        task()
        counter.end()
        continue
    repeats = []
    for _ in range(1 if name.startswith("fit") else 5):
        begun = time.process_time()
        task()
        repeats.append(time.process_time() - begun)
    times[name] = min(repeats)
print(json.dumps(times or list(tasks)))
"""

COUNTER = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(void) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS; }
"""


def measured(folder: Path) -> dict[str, float]:
    """CPU seconds of each task with the package in a folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", TASKS], check=True, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True
    )
    times: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return times


def counted(folder: Path) -> dict[str, float]:
    """Machine instructions of each task, after a first run of the task, with the package in a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "counter.c").write_text(COUNTER)
        library = place / "counter.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, place / "counter.c"], check=True)
        environment = {
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
            "COUNTER": str(library),
            "PYTHONHASHSEED": "0",
        }
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={place / 'count'}"]
        run = subprocess.run(
            [*tool, sys.executable, "-c", TASKS],
            check=True, env=os.environ | environment, cwd=folder, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        totals = [
            float(line.split()[1])
            for k in range(1, 1000)
            if (dump := place / f"count.{k}").exists()
            for line in dump.read_text().splitlines()
            if line.startswith("totals:")
        ]
    return dict(zip(json.loads(run.stdout.splitlines()[-1]), totals, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="7de071f")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instructions", action="store_true")
    options = parser.parse_args()
    folder = ROOT / "build" / "speed_against" / options.commit
    unpack(options.commit, folder)
    if options.instructions:
        rounds, unit = [(counted(folder), counted(ROOT))], "instructions"
    else:
        rounds, unit = [(measured(folder), measured(ROOT)) for _ in range(options.rounds)], "s"
    for name in rounds[0][0]:
        old, new = (min(r[side][name] for r in rounds) for side in (0, 1))
        print(f"{new / old:6.3f}  {name} ({new:.3g} {unit})")


if __name__ == "__main__":
    main()
