"""Time of `sample` over the time of the same sums written by hand: python benchmarks/overhead.py.

The model is a single multiplication, and nearly all of the time belongs to the solver. The loop by hand is straight-line code
with the weights of the plan in it, and checks nothing; `sample` finds its plan, checks its arguments and the final state.
diffusers' scheduler of DPM-Solver++ 2M stands beside it where the package is installed. One thread, medians, both sides in
turn in one process. Needs a quiet machine, and takes about a minute.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import iia_ode as iia
from iia_ode.plan import Evaluate, Plan

Model = Callable[[Tensor, Tensor], Tensor]

SOLVERS = ("ddim", "dpmpp_2m", "ipndm3", "unipc2", "heun", "fitted")
SHAPES = ((4, 1, 64, 64), (4, 4, 160, 160), (4, 4, 307, 307))  # 1.6e4, 4.1e5 and 1.5e6 numbers
STEPS = 10


def model(x: Tensor, t: Tensor) -> Tensor:
    """A model that costs nothing."""
    return 0.5 * x


def by_hand(plan: Plan) -> Callable[[Model, Tensor], Tensor]:
    """The evaluations and sums of a plan as straight-line code, each vector dropped after its last use."""
    lines, last = ["def run(model, x):", "v0, size = x, len(x)"], plan.last_use
    for k, ins in enumerate(plan.code, start=1):
        if isinstance(ins, Evaluate):
            lines.append(f"v{k} = model(v{ins.state}, torch.full((size,), {ins.t!r}))")
        else:
            (j, weight), *others = ins.terms
            if others and weight == 1.0:
                (i, alpha), *others = others
                lines.append(f"v{k} = torch.add(v{j}, v{i}, alpha={alpha!r})")
            else:
                lines.append(f"v{k} = v{j}" if weight == 1.0 else f"v{k} = v{j} * {weight!r}")
            lines += [f"v{k}.add_(v{i}, alpha={alpha!r})" for i, alpha in others]
        dead = [f"v{j}" for j in {*ins.reads, k} if last[j] == k and k < len(plan.code)]
        lines += [f"del {', '.join(dead)}"] if dead else []
    names: dict[str, object] = {"torch": torch}
    exec("\n    ".join([*lines, f"return v{len(plan.code)}"]), names)
    return names["run"]  # type: ignore[return-value]


def medians(*tasks: Callable[[], object], seconds: float = 1.5) -> list[float]:
    """Median seconds of each task; the tasks run in turn."""
    for task in tasks:
        task()
    times: list[list[float]] = [[] for _ in tasks]
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds * len(tasks):
        for task, found in zip(tasks, times, strict=True):
            start = time.perf_counter()
            task()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def of_diffusers(steps: int) -> Callable[[Tensor], Tensor] | None:
    """A loop over diffusers' scheduler of DPM-Solver++ 2M, or None without the package."""
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError:
        return None
    scheduler = DPMSolverMultistepScheduler()

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        return x

    return run


def row(ode: iia.ProbabilityFlowODE, solver: str | iia.Plan, nfe: int, other: Callable[[Tensor], object]) -> str:
    """For each shape the time of `sample` over the time of `other`, and its time per evaluation."""
    grid = None if isinstance(solver, iia.Plan) else iia.grids.karras(STEPS)
    cells = ""
    for shape in SHAPES:
        x = 80 * torch.randn(shape)
        ours, theirs = medians(partial(iia.sample, ode, x, grid, solver), partial(other, x))
        cells += f"{ours / theirs:12.2f} ({1e6 * ours / nfe:7.0f})"
    return cells


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    edm, grid = iia.EDM(), iia.grids.karras(STEPS)
    print(
        "Time of sample over the time of the sums by hand (microseconds of sample per evaluation), by numbers in the state"
    )
    print(" " * 12 + "".join(f"{torch.Size(shape).numel():>22}" for shape in SHAPES))
    for name in SOLVERS:
        plan = fitted() if name == "fitted" else iia.get_solver(name).plan(edm, grid)
        form = next(ins.form for ins in plan.code if isinstance(ins, Evaluate))  # nothing to convert, as by hand
        ode = iia.ProbabilityFlowODE(model, edm, form)
        cells = row(ode, plan if name == "fitted" else name, plan.nfe, partial(by_hand(plan), model))
        print(f"{name:>12}{cells}", flush=True)
    theirs = of_diffusers(STEPS)
    if theirs is not None:
        cells = row(iia.ProbabilityFlowODE(model, edm), "dpmpp_2m", STEPS, theirs)
        print(f"Over diffusers' DPM-Solver++ 2M\n{'dpmpp_2m':>12}{cells}")


def fitted() -> iia.Plan:
    """The plan of a fit of DPM-Solver++ 2M to another model that costs nothing."""
    start = 80 * torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ode = iia.ProbabilityFlowODE(lambda x, t: x / (1 + t[:, None] ** 2), iia.EDM())
    return iia.IIA("dpmpp_2m", history=1).fit(ode, start, iia.grids.karras(STEPS)).plan


if __name__ == "__main__":
    main()
