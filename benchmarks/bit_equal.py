"""Fits of an older commit and of this one, plan by plan: python benchmarks/bit_equal.py [--commit 036dfa1].

Fits mixture64, digits and patches at 5 and 8 evaluations with budgets "closed-form" and "standard", at the commit and in this
tree. For each pair, prints `plan.difference`, 0 for equal plans, and the errors of both on unseen noise. The standard error is
that of the difference, sample by sample. The plans of the commit are kept under build/bit_equal, and a rerun makes only
missing ones. All twelve take about twenty minutes on a core.
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
UNSEEN = {"mixture64": 4096, "digits": 256, "patches": 256}
SEED = 7  # of the unseen noise
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


def unseen_errors(name: str, plans: list[iia.Plan]) -> list[torch.Tensor]:
    """Mean squared error of each unseen sample for each plan, against 120 steps of the teacher, float64 [samples]."""
    ode, x = get_setting(name).draw(UNSEEN[name], SEED)
    exact = iia.Teacher.solve(ode, x, plans[0].grid[0], plans[0].grid[-1], steps=120, sigma_min=0.002, chunk_size=256)
    ends = [torch.cat([plan.run(ode, part) for part in x.split(256)]) for plan in plans]
    return [(end.cpu().double() - exact.final.double()).square().flatten(1).mean(dim=1) for end in ends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="036dfa1")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=SETTINGS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    differ = 0
    for name in options.settings:
        keys = list(product(NFES, BUDGETS))
        old = [old_plan(options.commit, name, *key) for key in keys]
        new = []
        for key in keys:
            begun = time.perf_counter()
            new.append(new_plan(name, *key))
            print(f"{name} {key}: fitted in {time.perf_counter() - begun:.0f} s", flush=True)
        squares = unseen_errors(name, [*old, *new])
        for (nfe, budget), before, after, a, b in zip(
            keys, old, new, squares[: len(old)], squares[len(old) :], strict=True
        ):
            difference = after.difference(before)
            differ += difference != 0
            first, second = (float(v.mean().sqrt()) for v in (a, b))
            spread = float((b - a).std()) / len(a) ** 0.5 / (2 * first)
            print(
                f"{name} {nfe} {budget}: difference {difference:.2g}, error {first:.4g} before, {second:.4g} now",
                end="",
            )
            print(f", change {second - first:+.2g} with standard error {spread:.2g}", flush=True)
    print(f"{differ} of {len(options.settings) * len(NFES) * len(BUDGETS)} plans differ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
