"""Error against evaluations for every registered solver: python benchmarks/all_solvers.py [setting ...].

The script writes docs/results/all_solvers_SETTING.json and .md, and docs/images/all_solvers_SETTING.png, for the digits
denoiser and for the mixture. Every solver runs on the Karras grid (rho 7) from sigma 80 to 0.03, then the data; errors are
RMSE per component against a converged reference from the same noise. The digits take about ten minutes on one core.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import iia_ode as iia
from iia_ode.experiments import batch_seed, get_setting
from iia_ode.metrics import rmse

DOCS = Path(__file__).resolve().parent.parent / "docs"
NFES = (4, 5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 20, 21)
SHOWN = (5, 6, 7, 8, 10, 15, 16, 20)
LEVEL = 0.03
SAMPLES = {"mixture": 256, "digits": 32}
PANELS = {
    "Runge-Kutta in t": ["euler", "midpoint", "ralston", "heun", "heun3", "rk4", "rk4_38", "denoise_to_zero"],
    "Runge-Kutta in sigma/alpha": ["ddim", "dpm2", "deis_rho_heun", "deis_rho_kutta", "deis_rho_rk4", "analytic_first_step"],
    "singlestep DPM-Solver": [
        "dpm_solver_2s", "dpm_solver_3s", "dpmpp_2s", "dpmpp_3s", "dpmpp_2s_blocks", "dpmpp_3s_blocks",
    ],
    "multistep DPM-Solver, exponential Adams": [
        "dpm_solver_2m", "dpm_solver_3m", "dpmpp_2m", "dpmpp_3m", "expab2", "expab3", "expab4", "lower_order_final",
        "order_ramp", "lookahead",
    ],
    "DEIS, LMS, Adams-Bashforth": [
        "deis_lab1", "deis_lab2", "deis_lab3", "deis_tab1", "deis_tab2", "deis_tab3", "lms1", "lms2", "lms3", "lms",
        "ab2", "ab3", "ab4",
    ],
    "pseudo-numerical": ["ipndm1", "ipndm2", "ipndm3", "ipndm", "spndm", "plms", "fpndm"],
    "UniPC and DPM-Solver-v3": [
        "unipc1", "unipc2", "unipc", "unipc4", "unipc_bh1", "unipc_noise", "dpm_solver_v3",
    ],
}  # fmt: skip


def measure(name: str) -> dict[str, dict[str, float]]:
    """RMSE by solver and number of evaluations."""
    setting = get_setting(name)
    ode, x = setting.draw(SAMPLES[name], batch_seed(0, unseen=True))
    tolerance = setting.reference_tolerance
    start = setting.schedule.t_of_noise_to_signal(setting.sigma_max)
    end = setting.schedule.t_data
    exact = iia.reference.solve(ode, x, start, end, rtol=tolerance, atol=tolerance, sigma_min=setting.sigma_min)
    out: dict[str, dict[str, float]] = {}
    for solver in tqdm(iia.solver_names(), desc=name):
        for nfe in NFES:
            try:
                grid = iia.get_solver(solver).grid_for(nfe, make_grid, setting.schedule)
            except iia.errors.GridError:
                continue
            out.setdefault(solver, {})[str(nfe)] = float(f"{rmse(iia.sample(ode, x, grid, solver), exact):.4g}")
    return out


def make_grid(n: int) -> torch.Tensor:
    return iia.grids.karras(n, LEVEL, 80.0)


def table(rows: dict[str, dict[str, float]]) -> str:
    """A row for each solver; a star marks the lowest error of a column."""
    lowest = {n: min(row[str(n)] for row in rows.values() if str(n) in row) for n in SHOWN}

    def cell(row: dict[str, float], n: int) -> str:
        error = row.get(str(n))
        return "" if error is None else f"{error:.4f}{'*' if error == lowest[n] else ''}"

    lines = ["| solver | " + " | ".join(map(str, SHOWN)) + " |", "|---|" + "---:|" * len(SHOWN)]
    lines += [f"| `{s}` | " + " | ".join(cell(row, n) for n in SHOWN) + " |" for s, row in rows.items()]
    return "\n".join(lines) + "\n"


def page(name: str, rows: dict[str, dict[str, float]]) -> str:
    """The table below its answer: the most accurate solver at each number of evaluations."""
    best = [(min((s for s in rows if str(n) in rows[s]), key=lambda s: rows[s][str(n)]), n) for n in SHOWN]
    return (
        f"# Every registered solver on the {name}\n\n"
        f"The most accurate solver, by evaluations: {', '.join(f'`{solver}` at {n}' for solver, n in best)}.\n\n"
        f"{table(rows)}\n"
        "`python benchmarks/all_solvers.py` measures the errors and writes this page. Columns are numbers of evaluations.\n"
        f"An error is the RMSE per component against a converged reference from the same {SAMPLES[name]} initial states,\n"
        f"on the Karras grid (rho 7) from sigma 80 to {LEVEL:g}, then the data. A star marks the lowest error of a\n"
        "column; an empty cell marks a number of evaluations that a solver cannot make.\n"
    )


def plot(name: str, rows: dict[str, dict[str, float]], path: Path) -> None:
    """A panel per family; the gray lines are all other solvers."""
    figure = Figure(figsize=(13, 13), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True, sharey=True).flatten()
    for ax, (title, solvers) in zip(axes, PANELS.items(), strict=False):
        for row in rows.values():
            ax.plot([int(n) for n in row], list(row.values()), color="0.88", linewidth=0.8, zorder=0)
        for k, solver in enumerate(solvers):
            row = rows.get(solver, {})
            style = {"color": f"C{k % 10}", "marker": "os^vDP*X"[k % 8], "linestyle": "-" if k < 10 else "--"}
            ax.plot([int(n) for n in row], list(row.values()), label=solver, markersize=4, linewidth=1.3, **style)
        ax.set_title(title, fontsize="medium")
        ax.legend(fontsize="x-small", ncols=2)
        ax.grid(alpha=0.25)
        ax.tick_params(labelbottom=True)
    for ax in axes[len(PANELS) :]:
        ax.set_visible(False)
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    values = [e for row in rows.values() for e in row.values()]
    axes[0].set_ylim(0.7 * min(values), 3.0)
    ticks = (4, 5, 6, 8, 10, 15, 20)
    axes[0].set_xticks(ticks, [str(n) for n in ticks])
    axes[0].minorticks_off()
    figure.supxlabel("model evaluations (NFE)")
    figure.supylabel("endpoint error (RMSE per component)")
    figure.suptitle(f"{name}: every registered solver, Karras grids from 80 to {LEVEL:g}, then 0")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=["mixture", "digits"])
    options = parser.parse_args()
    for name in options.settings:
        rows = measure(name)
        (DOCS / "results" / f"all_solvers_{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        (DOCS / "results" / f"all_solvers_{name}.md").write_text(page(name, rows))
        plot(name, rows, DOCS / "images" / f"all_solvers_{name}.png")
        print(table(rows))


if __name__ == "__main__":
    main()
