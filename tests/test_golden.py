"""Euler, Heun and DDIM give the numbers of the public samplers of that name (tests/data/README.md)."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALPHAS_CUMPROD, F64, close
from torch import Tensor

import iia_ode as iia
from iia_ode.problems import Mixture

with gzip.open(Path(__file__).parent / "data" / "golden.json.gz", "rt") as file:
    GOLDEN: dict[str, Any] = json.load(file)

SOLVERS = {
    "euler": "euler",
    "heun": "heun",
    "ddim": "ddim",
    "DDIM": "ddim",
    "dpmsolver": "ddim",  # order 1
    "dpmsolver++": "ddim",  # order 1
}
PREDICTIONS = {"x0": "data", "epsilon": "noise", "flow": "velocity", "edm_F": "data"}

every_entry = pytest.mark.parametrize("entry", GOLDEN["entries"], ids=lambda e: e["name"])


def problem() -> Mixture:
    p = GOLDEN["problem"]
    means, stds = (torch.tensor(p[k], dtype=F64).reshape(-1, *p["shape"]) for k in ("means", "stds"))
    return Mixture(torch.tensor(p["weights"], dtype=F64), means, stds)


def states(entry: dict[str, Any], key: str) -> Tensor:
    return torch.tensor(entry[key], dtype=F64).reshape(-1, *GOLDEN["problem"]["shape"])


def levels(entry: dict[str, Any], key: str) -> tuple[Tensor, Tensor]:
    alpha, sigma = (torch.tensor(entry[key][k], dtype=F64) for k in ("alpha", "sigma"))
    return alpha, sigma


def schedule_and_grid(entry: dict[str, Any]) -> tuple[iia.Schedule, Tensor]:
    """The schedule that the state lives on, and the entry's grid in that schedule's own time."""
    alpha, sigma = levels(entry, "grid")
    labels = entry["grid"]["t"]
    match entry["state_space"], entry["schedule"]:
        case "ve", _:
            return iia.EDM(), sigma
        case "vp", "vp_linear":
            return iia.VP(), torch.tensor(labels, dtype=F64)
        case "flow", "flow":
            return iia.FlowMatching(), torch.tensor(labels, dtype=F64) / 1000
        case "vp", "ddpm_discrete":
            schedule = iia.Discrete(ALPHAS_CUMPROD)
            nodes = zip(labels, alpha.tolist(), sigma.tolist(), strict=True)
            return schedule, torch.tensor([timestep(schedule, *node) for node in nodes], dtype=F64)
    raise AssertionError(f"no schedule for {entry['name']}")


def timestep(schedule: iia.Discrete, label: float | None, alpha: float, sigma: float) -> float:
    """The source's label where the table has that level there, else the time of the level."""
    if label is not None and 0 <= label < 1000 and math.isclose(schedule.alpha(label), alpha, rel_tol=1e-12):
        return label
    return schedule.t_data if sigma == 0 else schedule.t_of_lam(math.log(alpha / sigma))


@every_entry
def test_the_public_sampler_of_that_name_gives_the_same_numbers(entry: dict[str, Any]) -> None:
    schedule, grid = schedule_and_grid(entry)
    alpha, sigma = levels(entry, "grid")
    close(schedule.alpha(grid), alpha, rtol=1e-9)
    close(schedule.sigma(grid), sigma, rtol=1e-9)

    plan = iia.get_solver(SOLVERS[entry["solver"]]).plan(schedule, grid)
    assert plan.nfe == entry["nfe"]
    times = torch.tensor(plan.evaluation_times, dtype=F64)
    alpha, sigma = levels(entry, "evals")
    if (
        entry["state_space"] == "ve"
    ):  # discrete samplers that keep x / alpha call their model on x: the ratio is what counts
        alpha, sigma = torch.ones_like(alpha), sigma / alpha
    close(schedule.alpha(times), alpha, rtol=1e-9)
    close(schedule.sigma(times), sigma, rtol=1e-9)

    ode = problem().ode(schedule, PREDICTIONS[entry["prediction"]])
    with ode.counting() as spent:
        final = iia.sample(ode, states(entry, "x_T"), solver=plan)
    assert spent.evaluations == entry["nfe"]
    expected = states(entry, "x_final")
    close(final, expected, atol=1e-9 * max(1.0, float(expected.abs().max())))


def gap(entry: dict[str, Any], solver: str) -> float:
    """Largest difference between a solver's final state on the entry's grid and the entry's, relative to its size."""
    schedule, grid = schedule_and_grid(entry)
    final, expected = iia.sample(problem().ode(schedule), states(entry, "x_T"), grid, solver), states(entry, "x_final")
    return float((final - expected).abs().max()) / max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("entry", [e for e in GOLDEN["entries"] if e["solver"] == "euler"], ids=lambda e: e["name"])
def test_euler_in_sigma_is_ddim(entry: dict[str, Any]) -> None:
    assert gap(entry, "ddim") <= 1e-9


@pytest.mark.parametrize("entry", [e for e in GOLDEN["entries"] if e["solver"] == "heun"], ids=lambda e: e["name"])
def test_the_numbers_tell_solvers_apart(entry: dict[str, Any]) -> None:
    assert gap(entry, "heun") <= 1e-9
    assert gap(entry, "euler") > 1e-3
    assert gap(entry, "midpoint") > 1e-3


def test_the_data_hold_what_the_readme_says() -> None:
    kinds = [SOLVERS[e["solver"]] for e in GOLDEN["entries"]]
    assert {k: kinds.count(k) for k in kinds} == {"euler": 20, "heun": 19, "ddim": 16}
    assert all(e["status"] == "ok" for e in GOLDEN["entries"])


@pytest.mark.parametrize("n", range(1, 21))
def test_heun_on_n_karras_levels_makes_2n_minus_1_evaluations(n: int) -> None:
    ode = problem().ode(iia.EDM())
    plan = iia.get_solver("heun").plan(ode.schedule, iia.grids.karras(n))
    x = torch.ones(2, *GOLDEN["problem"]["shape"], dtype=F64)
    plan.run(ode, x)
    assert plan.nfe == ode.nfe == 2 * n - 1
