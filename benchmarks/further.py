"""`iia_ode.fit` on small denoisers of other data: python benchmarks/further.py [--nfe 5].

The script trains six small networks, half a minute each. No default was chosen by three of them; the sizes of the budgets
were chosen with the other three in view. ``iia_ode.fit(ode, nfe, noise=noise)`` fits each network with 256 draws, at every
budget. Each result is stored under --out as soon as it is measured, and a rerun measures missing results only. --table writes
docs/results/further.md.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product

import torch
from common import CHOICE, KARRAS, Entry, Store, conditions, number, parser, say, table, write_page
from torch import Tensor, nn

import iia_ode as iia
from iia_ode.autofit import BUDGETS
from iia_ode.forms import Prediction
from iia_ode.metrics import rmse_with_error
from iia_ode.plan import Plan

NFES = (5, 8)
FITTING, UNSEEN = 256, 2048
STEPS, BATCH = 3000, 256  # training steps and batch size
# Start of the Karras grids where the noisiest level is infinite, tried too where it is above; the first level is then moved.
TOP = 80.0

TITLE = "# Denoisers of other data\n"

HOW = f"""## How these denoisers were measured

`python benchmarks/further.py` trains the networks and measures whatever the stored results lack, and `python
benchmarks/further.py --table` writes this page. No default of the library was chosen by {{unseen}}, by their schedules or by
their kinds of prediction. The sizes of the budgets (draws, trials, iterations) were chosen with {{seen}} in view. Results on
the first three led to one change of method, the probes orthogonal to the residual in refinements. States are float64.
`iia_ode.fit(ode, nfe, noise=..., budget=...)` gets {FITTING} draws and no other option. A budget uses as many of them as it
says, and `thorough` makes more of its own. Errors are measured on {UNSEEN} other draws against dopri8 at tolerance 1e-6.

*Best classic* is the best pair of solver and grid on the fitting noise, among all registered solvers with exactly the given
number of evaluations and the 28 Karras grids of the acceptance page. Where the schedule starts above level 80, Karras grids
made from level 80 were tried too, with their first level moved to the start.
"""


@dataclass(frozen=True)
class Case:
    """A network to train.

    Attributes
    ----------
    what : data, network and kind of prediction, in words.
    data : draws of the data [n, d] float32.
    dimension : number of components d.
    schedule, prediction : schedule and prediction of the ODE.
    activation : activation of the network.
    seen : whether the sizes of the budgets were chosen with the network in view.
    """

    what: str
    data: Callable[[int, torch.Generator], Tensor]
    dimension: int
    schedule: iia.Schedule
    prediction: Prediction
    activation: type[nn.Module]
    seen: bool = False


def moons(n: int, generator: torch.Generator) -> Tensor:
    """Two half circles in the plane."""
    angle = math.pi * torch.rand(n, generator=generator)
    first = torch.rand(n, generator=generator) < 0.5
    across = torch.where(first, angle.cos(), 1 - angle.cos()) - 0.5
    up = torch.where(first, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([across, up], dim=1) + 0.05 * torch.randn((n, 2), generator=generator)


def swiss_roll(n: int, generator: torch.Generator) -> Tensor:
    """A rolled sheet, turned into 12 dimensions."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    height = 2 * torch.rand(n, generator=generator) - 1
    rolled = torch.stack([angle * angle.cos() / 10, height, angle * angle.sin() / 10], dim=1)
    turn = torch.randn((3, 12), generator=torch.Generator().manual_seed(5)) / 3**0.5
    return rolled @ turn + 0.03 * torch.randn((n, 12), generator=generator)


def sines(n: int, generator: torch.Generator) -> Tensor:
    """Waves at 24 points, of random phase, frequency and height: a family of curves."""
    phase, frequency, height = (torch.rand((n, 1), generator=generator) for _ in range(3))
    at = torch.linspace(0, 1, 24)
    return (0.5 + height) * torch.sin(2 * math.pi * (phase + (1 + frequency) * at))


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """The black squares of a board of four by four squares."""
    row, half = torch.randint(4, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
    corner = torch.stack([2 * half + row % 2, row], dim=1)
    return (corner + torch.rand((n, 2), generator=generator) - 2) / 2


def trefoil(n: int, generator: torch.Generator) -> Tensor:
    """A closed curve with a knot, turned into 6 dimensions."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    curve = torch.stack(
        [angle.sin() + 2 * (2 * angle).sin(), angle.cos() - 2 * (2 * angle).cos(), -(3 * angle).sin()], dim=1
    )
    turn = torch.randn((3, 6), generator=torch.Generator().manual_seed(6)) / 6**0.5
    return 0.5 * curve @ turn + 0.02 * torch.randn((n, 6), generator=generator)


def bumps(n: int, generator: torch.Generator) -> Tensor:
    """A bump at 32 points, of random place, width and sign."""
    place, width, sign = (torch.rand((n, 1), generator=generator) for _ in range(3))
    at = torch.linspace(0, 1, 32)
    return (2 * (sign < 0.5) - 1) * torch.exp(-0.5 * ((at - place) / (0.05 + 0.1 * width)) ** 2)


CASES = {
    "moons": Case(
        "two moons in 2 dimensions; SiLU; EDM schedule, data", moons, 2, iia.schedules.EDM(), "data", nn.SiLU, True
    ),
    "swiss-roll": Case(
        "a Swiss roll in 12 dimensions; ReLU; variance-preserving schedule, noise", swiss_roll, 12,
        iia.schedules.VP(), "noise", nn.ReLU, True,
    ),
    "sines": Case(
        "waves at 24 points; SiLU; flow matching, velocity", sines, 24, iia.schedules.FlowMatching(), "velocity", nn.SiLU,
        True,
    ),
    "checkerboard": Case(
        "a checkerboard in 2 dimensions; SiLU; flow matching, velocity", checkerboard, 2, iia.schedules.FlowMatching(),
        "velocity", nn.SiLU,
    ),
    "trefoil": Case(
        "a trefoil knot in 6 dimensions; SiLU; EDM schedule, data", trefoil, 6, iia.schedules.EDM(), "data", nn.SiLU
    ),
    "bumps": Case(
        "bumps at 32 points; ReLU; variance-preserving schedule, noise", bumps, 32, iia.schedules.VP(), "noise", nn.ReLU
    ),
}  # fmt: skip


class Network(nn.Module):
    """A residual network on vectors, conditioned on the logarithm of the noise level, with the prediction of its case.

    Every kind of prediction is preconditioned as in Karras et al. (2022, table 1), for equal accuracy.
    """

    def __init__(self, case: Case, spread: float, width: int = 128) -> None:
        super().__init__()
        self.case, self.spread = case, spread
        self.first, self.last = nn.Linear(case.dimension + 16, width), nn.Linear(width, case.dimension)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.activation = case.activation()
        self.register_buffer("frequencies", 0.3 + 0.5 * torch.arange(8))

    def data(self, y: Tensor, level: Tensor) -> Tensor:
        """The data estimate [n, d] from `y`, data plus noise of the given level [n, 1]."""
        size = (level**2 + self.spread**2).sqrt()
        angle = level.log() / 4 * self.frequencies.to(y)
        h = self.activation(self.first(torch.cat([y / size, angle.sin(), angle.cos()], dim=1)))
        for block in self.blocks:
            h = h + self.activation(block(h))
        return self.spread**2 / size**2 * y + level * self.spread / size * self.last(h)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction of the case at a time of its schedule."""
        time = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)  # one time for all samples, or one per sample
        alpha, sigma = self.case.schedule.alpha(time), self.case.schedule.sigma(time)
        # A state without data is estimated at a level far above the data.
        level = sigma / torch.maximum(alpha, sigma / 1e3)
        estimate = self.data(x / sigma * level, level.expand(len(x), 1))
        if self.case.prediction == "data":
            return estimate
        noise = (x - alpha * estimate) / sigma
        return noise if self.case.prediction == "noise" else noise - estimate


@cache
def ode_of(name: str) -> iia.ProbabilityFlowODE:
    """The network of a case, trained, in float64."""
    case = CASES[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    spread = float(case.data(4096, generator).std())
    network = Network(case, spread)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            x = case.data(BATCH, generator)
            level = (1.6 * torch.randn((BATCH, 1), generator=generator) - 0.8).exp()
            found = network.data(x + level * torch.randn(x.shape, generator=generator), level)
            weight = (level**2 + spread**2) / (level * spread) ** 2
            loss = (weight * (found - x).square()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    say(f"{name}: trained, last loss {float(loss.detach()):.3g}")
    return iia.ProbabilityFlowODE(network.double().eval().requires_grad_(False), case.schedule, case.prediction)


def draws(name: str, unseen: bool) -> Tensor:
    """Standard normal noise."""
    generator = torch.Generator().manual_seed(int(unseen))
    return torch.randn((UNSEEN if unseen else FITTING, CASES[name].dimension), generator=generator, dtype=torch.float64)


@cache
def batch_of(name: str, start: float, unseen: bool) -> tuple[Tensor, Tensor]:
    """Initial states at a time, and their exact final states."""
    ode = ode_of(name)
    x = ode.schedule.sigma(start) * draws(name, unseen)
    return x, iia.reference.solve(ode, x, start, ode.schedule.t_data, rtol=1e-6, atol=1e-6, sigma_min=0.002)


def error_of(plan: Plan, name: str, unseen: bool) -> tuple[float, float]:
    """RMSE and its standard error; infinite where the run is not finite."""
    x, final = batch_of(name, plan.grid[0], unseen)
    value, error = rmse_with_error(plan.run(ode_of(name), x, check_finite=False), final)
    return (value, error) if math.isfinite(value) else (math.inf, math.inf)


def classic(name: str, nfe: int, start: float) -> Entry:
    """The best of all solvers and Karras grids on the fitting noise, measured on the unseen noise."""
    schedule, tried = CASES[name].schedule, []
    noisiest = schedule.noise_to_signal(start) if schedule.alpha(start) > 0 else math.inf
    tops = sorted({min(noisiest, TOP), noisiest} - {math.inf})

    def plan_of(solver: str, rho: float, level: float, top: float) -> Plan:
        def family(n: int) -> Tensor:
            grid = iia.grids.karras(n, level, top, rho, schedule=schedule)
            grid[0] = start
            return grid

        own = iia.get_solver(solver)
        return iia.plan.trace(own, schedule, own.grid_for(nfe, family, schedule), consistent=False)

    for solver, karras, top in product(iia.solver_names(), KARRAS, tops):
        grid = (*karras, top)
        try:
            tried.append((error_of(plan_of(solver, *grid), name, unseen=False)[0], solver, grid))
        except iia.IIAError:  # the solver cannot make this number of evaluations on this grid
            continue
    _, solver, grid = min(tried)
    value, error = error_of(plan_of(solver, *grid), name, unseen=True)
    return {
        "rmse": value,
        "error": error,
        "solver": solver,
        "rho": grid[0],
        "sigma_min": grid[1],
        "top": grid[2],
        "pairs": len(tried),
    }


def fitted(name: str, nfe: int, budget: str) -> Entry:
    """`iia_ode.fit` at a budget."""
    found = iia.fit(ode_of(name), nfe, noise=draws(name, unseen=False), budget=budget)
    value, error = error_of(found.plan, name, unseen=True)
    recipe = found.record.search
    return {
        "rmse": value,
        "error": error,
        "start": found.plan.grid[0],
        "chosen": recipe.chosen.name,
        "held_out_rmse": found.record.endpoint.fit,
        "sample_evaluations": found.record.sample_evaluations,
    }


def cells(store: Store, name: str, nfe: int) -> None:
    """All rows of a case at a number of evaluations; classic solvers start at the time of the fits."""
    under = {"samples": UNSEEN, "fit_samples": FITTING, "network": ode_of(name).fingerprint()}
    file, rows = f"{name}-nfe{nfe:02}", []
    for budget in BUDGETS:
        more = under | {"budget": asdict(BUDGETS[budget]), "choice": CHOICE}
        rows.append(store.cell(file, budget, more, lambda b=budget: fitted(name, nfe, b)))  # type: ignore[misc]
    store.cell(file, "classic", under, lambda: classic(name, nfe, rows[0]["start"]))


def page(files: dict[str, dict[str, Entry]]) -> str:
    """The whole page from the stored results."""
    out = [TITLE, answer(files)]
    for name, case in CASES.items():
        rows = {int(file.rsplit("nfe", 1)[1]): rows for file, rows in files.items() if file.rsplit("-", 1)[0] == name}
        if not rows:
            continue
        entries = [entry for own in rows.values() for entry in own.values()]
        out.append(f"## {name}\n\n{case.what[0].upper() + case.what[1:]}. {conditions(entries)}.\n")
        lines = []
        for nfe, own in sorted(rows.items()):
            if not own.keys() >= {"classic", *BUDGETS}:  # some rows are still missing
                continue
            best = own["classic"]
            ratios = [
                f"{number(own[b]['rmse'])} ± {number(own[b]['error'])} = {number(own[b]['rmse'] / best['rmse'], 2)}"
                for b in BUDGETS
            ]
            which = f"`{best['solver']}`, rho {best['rho']:g}, sigma_min {best['sigma_min']:g}"
            error = f"{number(best['rmse'])} ± {number(best['error'])}"
            lines.append([str(nfe), error, which, *ratios, own["standard"]["chosen"]])
        budgets = [f"`{b}`: error = ratio" for b in BUDGETS]
        out.append(table(["NFE", "best classic", "which", *budgets, "standard chose"], lines))
    return "\n".join([*out, HOW.format(unseen=names(seen=False), seen=names(seen=True))])


def names(seen: bool) -> str:
    """The cases with or without influence on the budgets, in words."""
    *first, last = [f"`{name}`" for name, case in CASES.items() if case.seen == seen]
    return f"{', '.join(first)} and {last}"


def answer(files: dict[str, dict[str, Entry]]) -> str:
    """The first sentence of the page."""
    unseen = {file: rows for file, rows in files.items() if not CASES[file.rsplit("-", 1)[0]].seen}
    known = [rows for rows in unseen.values() if rows.keys() >= {"classic", "standard"}]
    ratios = [rows["standard"]["rmse"] / rows["classic"]["rmse"] for rows in known]
    if not ratios:
        return ""
    return (
        f"On small networks that influenced no default, `iia_ode.fit` at budget `standard` has {min(ratios):.2f} to "
        f"{max(ratios):.2f} of the endpoint error of the best classic solver, whose grid is tuned.\n"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command line."""
    store = Store(options.out)
    if options.table:
        write_page(options.page, page(store.files()))
        return
    for name, nfe in product(options.settings, options.nfe):
        cells(store, name, nfe)


if __name__ == "__main__":
    with torch.no_grad():
        run(parser(__doc__ or "", "further", list(CASES), NFES).parse_args())
