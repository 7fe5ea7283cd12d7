"""Fits for somebody else's network: python benchmarks/third_party.py --fetch.

The network is that of the package 21cmpsdenoiser (MIT license): a conditional U-Net with attention that predicts the noise on
power spectra [1, 32, 16] of the 21-cm line, on the schedule VP(0.1, 20). ``--fetch`` downloads the package with pip into
build/third_party; nothing of it is part of this repository. The error is the root mean square distance to the accurate
solution from the same noise under the same conditions, on noise and conditions that took no part in the fits. The classic
solvers get their best of six grids on the samples of the comparison itself, which favors them. The fits share their noise,
conditions and accurate trajectories. The defaults take less than 20 minutes on one core.

The committed table: python benchmarks/third_party.py --fetch > benchmarks/results/third_party.md
"""

import argparse
import importlib.util
import platform
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import iia_ode as iia

FOLDER = Path(__file__).resolve().parent.parent / "build" / "third_party"
PACKAGES = ("21cmpsdenoiser==1.0.2", "einops>=0.8")
LOWEST = 0.0105  # the smallest level sigma/alpha of its training, t = 0.001
CLASSICS = ("ddim", "heun", "dpmpp_2m", "unipc", "ipndm3")
GRIDS = tuple(product((LOWEST, 3 * LOWEST), (3.0, 7.0, 11.0)))
"""Karras grids of the classic solvers: the last level before the data, and rho."""


def fetch() -> None:
    """Download the package and its one dependency, without the others that it names."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(FOLDER)]
    subprocess.run([*command, *PACKAGES], check=True)


def network() -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network in evaluation mode, and the constants of its units."""
    package = FOLDER / "psdenoiser"
    if not package.exists():
        raise SystemExit("the package is not there: run this script with --fetch, which downloads 34 MB with pip.")
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("psdenoiser_model", package / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{package} has no model.py: delete the folder, and run this script with --fetch.")
    module = importlib.util.module_from_spec(spec)
    state = torch.get_rng_state()
    spec.loader.exec_module(module)
    torch.set_rng_state(state)  # the module seeds torch
    net = module.UNet(dim=(32, 16), channels=2, dim_mults=(1, 2, 4, 8), cdn_len=None)
    net.load_state_dict(torch.load(package / "denoiser_model.pt", map_location="cpu", weights_only=True))  # noqa: TID251  (the package has no other file)
    constants = np.load(package / "constants.npz", allow_pickle=False)
    return net.eval().requires_grad_(False), {name: constants[name] for name in constants.files}


def spectra(constants: dict[str, Any], n: int, seed: int) -> Tensor:
    """Synthetic noisy spectra in the units of the network, float32 [n, 1, 32, 16]."""
    k = np.hypot(*np.meshgrid(constants["kperp"], constants["kpar"], indexing="ij"))
    modes, random = np.maximum(constants["Nmodes"], 1), np.random.default_rng(seed)
    amplitude, tilt = 10 ** random.uniform(0.3, 1.5, (n, 1, 1)), random.uniform(0.1, 1.0, (n, 1, 1))
    noisy = amplitude * (k / 0.3) ** tilt * random.gamma(modes / 2, 2 / modes, size=(n, *k.shape))
    mean, std = (float(constants[f"noisy_{name}"][0]) for name in ("mean", "std"))
    return torch.tensor(2 * (np.log10(noisy) - mean) / std - 1, dtype=torch.float32)[:, None]


def problem(net: torch.nn.Module, constants: dict[str, Any], n: int, seed: int) -> tuple[Any, Tensor]:
    """The ODE under the conditions of n samples, and standard normal noise."""
    conditions = spectra(constants, n, seed)
    ode = iia.ProbabilityFlowODE(
        net, iia.VP(0.1, 20.0), "noise", time=lambda t: 999 * t, conditioning={"x_cdn": conditions}
    )
    noise = torch.randn(conditions.shape, generator=torch.Generator().manual_seed(seed))
    return ode, noise


def best_classics(schedule: iia.Schedule, nfe: int, error: Any) -> list[tuple[str, float]]:
    """The classic solvers with their lowest error over the grids; `error` maps a grid and a solver to a number."""
    start = schedule.t_noise
    highest, best = schedule.noise_to_signal(start), []
    for name in CLASSICS:
        solver, found = iia.get_solver(name), []
        for low, rho in GRIDS:
            try:
                grid = solver.grid_for(
                    nfe, lambda n, a=low, r=rho: iia.grids.karras(n, a, highest, r, schedule=schedule), schedule
                )
            except iia.errors.GridError:
                continue  # no such number of evaluations
            grid[0] = start
            found.append(error(grid=grid, solver=solver))
        if found:
            best.append((f"{name}, best of {len(found)} grids", min(found)))
    return best


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", action="store_true", help="download the package first")
    parser.add_argument("--draws", type=int, default=24, help="draws of the fits")
    parser.add_argument("--unseen", type=int, default=24, help="samples of the comparison")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 8], help="evaluations")
    parser.add_argument("--budgets", nargs="+", default=["standard"], help="budgets of the fits")
    options = parser.parse_args()
    if options.fetch:
        fetch()
    net, constants = network()
    ode, noise = problem(net, constants, options.draws, 0)
    unseen, other = problem(net, constants, options.unseen, 1)
    schedule = ode.schedule
    start, end = schedule.t_noise, schedule.t_data
    x, own = (schedule.sigma(start) * draws for draws in (other, noise))
    exact = iia.Teacher.solve(unseen, x, start, end, steps=120, sigma_min=LOWEST, chunk_size=64)
    steps = max(iia.Budget().steps(nfe) for nfe in options.nfe)
    teacher = iia.Teacher.solve(ode, own, start, end, steps=steps, sigma_min=LOWEST, chunk_size=64)

    def error(**how: Any) -> float:
        return float((iia.sample(unseen, x, **how) - exact.final).square().mean().sqrt())

    print(f"`python benchmarks/third_party.py {' '.join(sys.argv[1:])}`\n")
    print(
        f"{PACKAGES[0]}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters; iia_ode {iia.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()} with {torch.get_num_threads()} "
        f"threads. Fits on {options.draws} draws, errors on {options.unseen} others. The accurate solutions of the others are "
        f"known to about {exact.record.error:.1e}. They took {exact.record.sample_evaluations} sample evaluations, and the "
        f"trajectories of the fits {teacher.record.sample_evaluations}.\n"
    )
    row("evaluations", "solver", "error", "sample evaluations of the fit", "CPU seconds of the fit")
    row(*["---"] * 5)
    for nfe in options.nfe:
        for name, value in best_classics(schedule, nfe, error):
            row(nfe, name, f"{value:.4f}", "-", "-")
        for budget in options.budgets:
            began = time.process_time()
            fit = iia.fit(ode, nfe, x=own, teacher=teacher, sigma_min=LOWEST, budget=budget)
            spent = time.process_time() - began
            row(nfe, f"fit, {budget}", f"{error(solver=fit):.4f}", fit.record.sample_evaluations, f"{spent:.0f}")
    print(f"\nThe whole table took {time.process_time():.0f} CPU seconds.")


if __name__ == "__main__":
    main()
