"""How costs grow: python benchmarks/growth.py writes docs/results/growth.md and docs/images/growth.png. Needs a quiet machine.

Seconds of a run against evaluations, samples, components and history, of tracing a plan against evaluations, sample
evaluations of a fit against the evaluations of its solver, and seconds of a run shared by processes. The model of the runs is
a single multiplication, so that the costs are those of the library. One thread per process; least of several times.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import PAGES, ROOT, table, write_page
from overhead import by_hand
from torch import Tensor

import iia_ode as iia
from iia_ode.plan import Plan, trace

EDM = iia.EDM()
SHARED = (256, 4096)  # shape of the states of the run that processes share, and of its model's matrix
PAGE = """# How costs grow

{answer}

![Costs against sizes](../images/growth.png)

{table}
`python benchmarks/growth.py` measures and writes this page. An exponent is the slope of log cost against log size over the
larger half of the sizes: 0 is constant, 1 is linear. The model of a run is a single multiplication. A run with history k has
the weights of a fit whose steps sum the states and the data estimates of k earlier steps. The processes share the samples of a
model that multiplies by a matrix; with perfect sharing the exponent is -1.
"""


@dataclass(frozen=True)
class Curve:
    """Costs against sizes.

    Attributes
    ----------
    what, against, unit : the cost, the size, and the unit of the cost.
    sizes, costs : the measurements.
    """

    what: str
    against: str
    unit: str
    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of log cost against log size over the larger half of the sizes."""
        first = min(len(self.sizes) // 2, len(self.sizes) - 2)
        slope, _ = np.polyfit(np.log(self.sizes[first:]), np.log(self.costs[first:]), 1)
        return float(slope)


def model(x: Tensor, t: Tensor) -> Tensor:
    """A model that costs nothing."""
    return 0.5 * x


ODE = iia.ProbabilityFlowODE(model, EDM, "data")


def least(task: Callable[[], object], seconds: float = 0.5) -> float:
    """Least seconds of a task over several repetitions."""
    task()
    found, begun = [], time.perf_counter()
    while len(found) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        task()
        found.append(time.perf_counter() - start)
    return min(found)


def run(plan: Plan, *shape: int) -> float:
    """Seconds of a run over states of a shape."""
    x = 80 * torch.randn(shape)
    return least(lambda: plan.run(ODE, x))


def by_hand_of(x: Tensor) -> float:
    """Seconds of the sums of a run of 10 evaluations, written by hand."""
    sums = by_hand(plan_of(10))
    return least(lambda: sums(model, x))


def plan_of(nfe: int) -> Plan:
    """The plan of DPM-Solver++ 2M."""
    return iia.get_solver("dpmpp_2m").plan(EDM, iia.grids.karras(nfe))


def with_history(history: int) -> Plan:
    """A fitted plan of 16 evaluations whose steps look back that far."""
    start = 80 * torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t[:, None] ** 2), EDM)
    method = iia.IIA("ddim", terms="window", target="trajectory", history=history, ridge=1e-6, guard=False)
    return method.fit(ode, start, iia.grids.karras(16)).plan


def measured() -> list[Curve]:
    """All curves of one process."""
    solver = iia.get_solver("dpmpp_2m")
    numbers, batches, pasts = (8, 16, 32, 64, 128, 256), (1, 4, 16, 64, 256, 1024), (1, 2, 4, 8)
    sizes = (10**3, 10**4, 10**5, 10**6, 10**7)
    traces = [least(lambda n=n: trace(solver, EDM, iia.grids.karras(n))) for n in numbers]  # type: ignore[misc]
    fits = [iia.fit_cost(ODE, n, "closed-form", shape=(3, 64, 64)).sample_evaluations for n in numbers]
    seconds = {
        "evaluations": (numbers, [run(plan_of(n), 16, 4096) for n in numbers]),
        "samples of 4096": (batches, [run(plan_of(10), b, 4096) for b in batches]),
        "components": (sizes, [run(plan_of(10), 1, d) for d in sizes]),
        "history": (pasts, [run(with_history(h), 16, 4096) for h in pasts]),
    }
    sums = [by_hand_of(torch.randn(1, d)) for d in sizes]
    return [
        *(Curve("run", against, "s", at, tuple(costs)) for against, (at, costs) in seconds.items()),
        Curve("the sums of a run by hand", "components", "s", sizes, tuple(sums)),
        Curve("trace of a plan", "evaluations", "s", numbers, tuple(traces)),
        Curve("fit, `closed-form`", "evaluations", "sample evaluations", numbers, tuple(map(float, fits))),
    ]


# ---- processes -----------------------------------------------------------------------------------------------------------


def shared() -> None:
    """The part of one process of a shared run; the first prints the seconds."""
    torch.distributed.init_process_group("gloo")
    matrix = torch.randn(SHARED[1], SHARED[1]) / SHARED[1]
    ode = iia.distributed(iia.ProbabilityFlowODE(lambda x, t: x @ matrix, EDM, "data", tag="matrix"))
    x = 80 * torch.randn(SHARED, generator=torch.Generator().manual_seed(0))
    seconds = least(lambda: iia.sample(ode, x, iia.grids.karras(4), "dpmpp_2m"), 0.0)
    if torch.distributed.get_rank() == 0:
        print(seconds)
    torch.distributed.destroy_process_group()


def processes(counts: tuple[int, ...]) -> Curve:
    """Seconds of a run against the number of processes that share it."""
    costs = []
    for count in counts:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=29517"]
        done = subprocess.run(
            [*command, __file__, "--shared"],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        costs.append(float(done.stdout.split()[-1]))
    return Curve("run, shared", "processes", "s", counts, tuple(costs))


# ---- the page ------------------------------------------------------------------------------------------------------------


def page(curves: list[Curve]) -> str:
    """The page of all curves."""
    head = ["cost", "against", "from", "to", "cost at the first", "cost at the last", "exponent"]
    rows = [
        [
            c.what,
            c.against,
            f"{c.sizes[0]:,}",
            f"{c.sizes[-1]:,}",
            *(f"{1e3 * v:.3g} ms" if c.unit == "s" else f"{v:,.0f} {c.unit}" for v in (c.costs[0], c.costs[-1])),
            f"{c.exponent:.2f}",
        ]
        for c in curves
    ]
    largest = max((c for c in curves if "hand" not in c.what), key=lambda c: c.exponent)
    hand = next(c for c in curves if "hand" in c.what)
    answer = (
        f"The largest exponent of the library is {largest.exponent:.2f} ({largest.what}, against {largest.against}). The sums "
        f"of a run written by hand have {hand.exponent:.2f} against components: large states leave the caches."
    )
    return PAGE.format(answer=answer, table=table(head, rows))


def draw(curves: list[Curve], path: Path) -> None:
    """A panel per curve; the sums by hand stand beside the run that makes them."""
    import matplotlib.pyplot as plt

    hand = next(c for c in curves if "hand" in c.what)
    others = [c for c in curves if c is not hand]
    figure, axes = plt.subplots(2, 4, figsize=(11, 5))
    for ax, c in zip(axes.flat, others, strict=False):
        ax.loglog(c.sizes, c.costs, "o-", color="tab:blue", label="the library")
        if c.what == "run" and c.against == hand.against:
            ax.loglog(hand.sizes, hand.costs, ".--", color="0.5", label="by hand")
            ax.legend(frameon=False, fontsize=8)
        ax.set_title(f"{c.what}\nexponent {c.exponent:.2f}".replace("`", ""), fontsize=8)
        ax.set(xlabel=c.against, ylabel=c.unit)
        if len(c.sizes) < 5:
            ax.set_xticks(c.sizes, map(str, c.sizes))
        ax.minorticks_off()
        if max(c.costs) < 30 * min(c.costs):  # too few powers of ten for ticks
            ends = min(c.costs), max(c.costs)
            ax.set_yticks(ends, [f"{v:.2g}" for v in ends])
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(others) :]:
        ax.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGES / "growth.md")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shared", action="store_true", help="be one of the processes of a shared run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.shared:
        shared()
        return
    curves = [*measured(), processes(tuple(options.processes))]
    write_page(options.page, page(curves))
    draw(curves, ROOT / "docs" / "images" / "growth.png")


if __name__ == "__main__":
    with torch.no_grad():
        main()
