"""Fits of an older commit and of this one, plan by plan: python benchmarks/bit_equal.py [--commit 036dfa1].

Fits mixture64, digits and patches at 5 and 8 evaluations with budgets "closed-form" and "standard", at the commit and in this
tree, and prints `plan.difference` of each pair: 0 for equal plans. The plans of the commit are kept under build/bit_equal,
and a rerun makes only missing ones. All twelve take about twenty minutes on a core.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import time
from itertools import product
from pathlib import Path

import torch

import iia_ode as iia
from iia_ode.experiments import get_setting

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("mixture64", "digits", "patches")
NFES = (5, 8)
BUDGETS = ("closed-form", "standard")
DRAWS = {"mixture64": 256, "digits": 64, "patches": 64}
# Runs in the tree of the older commit, whose `fit` recognizes initial states by their size.
OLD = """
import sys
import torch
import iia_ode as iia
from iia_ode.experiments import get_setting
torch.set_num_threads(1)
path, name, nfe, budget, draws = sys.argv[1:]
ode, x = get_setting(name).draw(int(draws), 0)
iia.fit(ode, int(nfe), x, budget=budget, report=None).plan.save(path)
"""


def unpack(commit: str, folder: Path) -> None:
    """Write the package of a commit into a folder."""
    if not (folder / "iia_ode").exists():
        archive = subprocess.run(
            ["git", "archive", commit, "iia_ode"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")


def old_plan(commit: str, name: str, nfe: int, budget: str) -> iia.Plan:
    """The plan of a fit at the commit, made in a process of its own."""
    folder = ROOT / "build" / "bit_equal" / commit
    path = folder / f"{name}-{nfe}-{budget}.safetensors"
    if not path.exists():
        unpack(commit, folder)
        arguments = [str(path), name, str(nfe), budget, str(DRAWS[name])]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        subprocess.run([sys.executable, "-c", OLD, *arguments], check=True, env=environment, cwd=folder)
    return iia.load(path)


def new_plan(name: str, nfe: int, budget: str) -> iia.Plan:
    """The plan of a fit in this tree."""
    ode, x = get_setting(name).draw(DRAWS[name], 0)
    return iia.fit(ode, nfe, x=x, budget=budget).plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="036dfa1")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=SETTINGS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    differ = 0
    for name, nfe, budget in product(options.settings, NFES, BUDGETS):
        old = old_plan(options.commit, name, nfe, budget)
        begun = time.perf_counter()
        difference = new_plan(name, nfe, budget).difference(old)
        differ += difference != 0
        print(f"{name} {nfe} {budget}: difference {difference:g} ({time.perf_counter() - begun:.0f} s)", flush=True)
    print(f"{differ} of {len(options.settings) * len(NFES) * len(BUDGETS)} plans differ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
