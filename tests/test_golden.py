"""Recorded runs of public samplers are repeated to rounding by the solvers of the library (tests/data/README.md)."""

import gzip
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evidence import golden, upstream
from support import F64, close
from torch import Tensor

import iia_ode as iia
from iia_ode.problems import Mixture
from iia_ode.solvers import LMS, PNDM, MetaSolver

DATA = Path(__file__).parent / "data"

with gzip.open(DATA / "golden.json.gz", "rt") as file:
    GOLDEN: dict[str, Any] = json.load(file)
ENTRIES: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in GOLDEN["entries"]}

every_entry = pytest.mark.parametrize("entry", GOLDEN["entries"], ids=lambda e: e["name"])


class Recorder(Mixture):
    """The mixture of the golden data, keeping the levels that its denoiser is asked for."""

    def __init__(self) -> None:
        known = golden.as_problem(GOLDEN["problem"])
        assert isinstance(known, Mixture)
        super().__init__(known.log_weights.exp(), known.means, known.variances.sqrt())
        self.levels: list[tuple[float, float]] = []

    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        level = [v.flatten()[0].item() if isinstance(v, Tensor) else v for v in (alpha, sigma)]
        self.levels.append((level[0], level[1]))
        return super().denoise(x, alpha, sigma)


PROBLEM = golden.as_problem(GOLDEN["problem"])


@cache
def case_of(name: str) -> golden.Case:
    return golden.case_for(ENTRIES[name])


def states(entry: dict[str, Any], key: str) -> Tensor:
    return torch.tensor(entry[key], dtype=F64)


def equal(actual: Tensor, expected: Tensor) -> None:
    close(actual, expected, atol=1e-9 * max(1.0, float(expected.abs().max())))


def gap(entry: dict[str, Any], solver: str | iia.Solver) -> float:
    """Largest difference of a solver's final state on the entry's schedule and grid from the entry's, relative to its size."""
    case, expected = case_of(entry["name"]), states(entry, "x_final")
    x = states(entry, "x_T").reshape(-1, *PROBLEM.shape)
    final = iia.sample(case.ode(PROBLEM), x, golden.grid_for(entry), solver).reshape(expected.shape)
    return float((final - expected).abs().max()) / max(1.0, float(expected.abs().max()))


# ---- the public runs -------------------------------------------------------------------------------------------------


@every_entry
def test_the_public_run_is_repeated_at_every_grid_point(entry: dict[str, Any]) -> None:
    problem = Recorder()
    ours, nfe = golden.run(entry, problem)
    assert nfe == entry["nfe"]
    final = ours[-1]
    equal(final, states(entry, "x_final"))
    if "trajectory_note" not in entry:
        equal(ours, states(entry, "trajectory"))
    alpha, sigma = torch.tensor(problem.levels, dtype=F64).T
    theirs = [torch.tensor(entry["evals"][key], dtype=F64) for key in ("alpha", "sigma")]
    if entry["state_space"] == "ve":  # samplers that keep x / alpha scale it for their model: only the ratio is known
        alpha, sigma, theirs = alpha / sigma, torch.ones_like(sigma), [theirs[0] / theirs[1], torch.ones_like(sigma)]
    close(alpha, theirs[0], rtol=1e-9)
    close(sigma, theirs[1], rtol=1e-9)
    if "x_final_as_shipped" in entry:  # the same run with upstream's tables in float32
        close(final, states(entry, "x_final_as_shipped"), atol=3 * entry["as_shipped_max_abs_diff"])


def test_every_recorded_run_is_in_the_data() -> None:
    statuses = [entry["status"] for entry in ENTRIES.values()]
    assert {s: statuses.count(s) for s in statuses} == {"ok": 345, "upstream bug": 14, "upstream quirk": 8}


def test_only_what_differs_from_the_registered_methods_needs_a_variant() -> None:
    variants: dict[str, set[str]] = {}
    for name, entry in ENTRIES.items():
        solver = golden.solver_for(entry)
        base = solver.solver if isinstance(solver, MetaSolver) else solver
        if base.name not in iia.solver_names():
            variants.setdefault(base.name, set()).add("/".join(name.split("/")[:2]) + ": " + entry["status"])
    assert variants == {
        "DDIMAsInDiffusers": {"diffusers/DDIMScheduler: upstream bug"},
        "IPNDMvAsPublished": {"diff-sampler/ipndm_v-3: upstream bug", "diff-sampler/ipndm_v-4: upstream bug"},
        "IPNDMDropsFirstEstimate": {"diffusers/IPNDMScheduler: ok"},
        "TabulatedAdams": {f"diff-sampler/deis-tab-{k}: ok" for k in ("2", "3", "4", "3-fineN")},
    }
    bugs = [entry for entry in ENTRIES.values() if entry["status"] == "upstream bug"]
    assert all(type(golden.solver_for(entry)).__module__ == upstream.__name__ for entry in bugs)


def test_no_variant_is_registered() -> None:
    assert not set(upstream.__all__) & set(iia.solver_names())


@pytest.mark.parametrize("name", sorted(n for n, e in ENTRIES.items() if e["status"] == "upstream bug"))
def test_a_published_bug_is_not_what_the_method_of_that_name_computes(name: str) -> None:
    entry = ENTRIES[name]
    method = "ddim" if entry["solver"] == "ddim" else LMS(max_order=entry["options"]["max_order"])
    assert gap(entry, method) > 1e-4


# ---- what the numbers can tell apart ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, others",
    [
        ("edm/heun/N=9", ["euler", "midpoint", "deis_rho_rk4", "dpm2"]),
        ("k-diffusion/lms/n=10", ["lms3", "ipndm", "deis_lab3"]),
        ("k-diffusion/dpmpp_2m/n=10", ["expab2", "dpm_solver_2m", "ddim"]),
        ("k-diffusion/dpmpp_2m_sde-heun-eta0/n=10", ["dpmpp_2m"]),
        ("k-diffusion/dpmpp_3m_sde-eta0/n=10", ["expab3", "dpmpp_3m", "expab2"]),
        ("dpm_solver_pytorch/dpmsolver/singlestep_fixed-2/logSNR/steps=10", ["dpmpp_2s", "deis_rho_heun"]),
        ("UniPC/bh2-3/data_prediction/logSNR/steps=10", ["unipc", "unipc2", "unipc_noise"]),
        ("UniPC/bh1-2/data_prediction/logSNR/steps=10", ["unipc2"]),
        ("diff-sampler/ipndm-4/polynomial/num_steps=11", ["ipndm3", "lms"]),
        ("diffusers/DEISMultistepScheduler/logrho/order=2/steps=10", ["deis_lab2", "deis_tab2", "dpm_solver_2m"]),
        ("diffusers/PNDMScheduler/skip_prk=True/alpha_to_one=True/steps=10", ["fpndm", "ipndm", "spndm"]),
        ("PNDM/S-PNDM/N=10/model-at-t+1", ["plms", "ipndm2"]),
        ("PNDM/F-PNDM/N=10/model-at-t+1", ["plms", "ipndm"]),
        (
            "diffusers/DPMSolverSinglestepScheduler/dpmsolver++/order=3/final=zero/steps=10",
            ["dpmpp_2s_blocks", "expab3"],
        ),
        ("diffusers/IPNDMScheduler/default/steps=10", ["ipndm"]),
    ],
)
def test_the_numbers_tell_solvers_apart(name: str, others: list[str]) -> None:
    assert gap(ENTRIES[name], golden.solver_for(ENTRIES[name])) <= 1e-9
    for other in others:
        assert gap(ENTRIES[name], other) > 1e-6, other


@pytest.mark.parametrize("entry", [e for e in ENTRIES.values() if e["solver"] == "euler"], ids=lambda e: e["name"])
def test_euler_in_sigma_is_ddim(entry: dict[str, Any]) -> None:
    if entry["state_space"] == "ve":
        assert case_of(entry["name"]).plan.equivalent(iia.get_solver("ddim").plan(iia.EDM(), golden.grid_for(entry)))
    assert gap(entry, "ddim") <= 1e-9


@pytest.mark.parametrize("n", range(1, 21))
def test_heun_on_n_karras_levels_makes_2n_minus_1_evaluations(n: int) -> None:
    assert iia.get_solver("heun").plan(iia.EDM(), iia.grids.karras(n)).nfe == 2 * n - 1


# ---- DEIS in time ----------------------------------------------------------------------------------------------------


def vp_of_deis_tab() -> iia.Schedule:
    """The time of diff-sampler's DEIS: linear beta such that sigma/alpha is 0.002 at t = 1e-3 and 80 at t = 1.

    Its beta is slightly negative at t = 0, beyond the end of the grid, so it is no iia_ode.VP.
    """
    first, low, high = 1e-3, math.log1p(0.002**2), math.log1p(80.0**2)
    slope = 2 * (high - low / first) / (1 - first)
    start = high - slope / 2

    def log_alpha(t: Tensor) -> Tensor:
        return -(slope * t * t / 2 + start * t) / 2

    return iia.Schedule.from_functions(
        lambda t: log_alpha(t).exp(), lambda t: (-torch.expm1(2 * log_alpha(t))).sqrt(), t_data=first
    )


@pytest.mark.parametrize("levels", [6, 11])
@pytest.mark.parametrize("spacing", ["polynomial", "logsnr"])
def test_the_exact_weights_of_deis_tab_are_the_limit_of_the_riemann_sums(spacing: str, levels: int) -> None:
    schedule, solver = vp_of_deis_tab(), iia.get_solver("deis_tab3")
    coarse, fine = (ENTRIES[f"diff-sampler/deis-tab-3{n}/{spacing}/num_steps={levels}"] for n in ("", "-fineN"))
    inside = (schedule.t_data, schedule.t_noise)
    t = [min(max(schedule.t_of_noise_to_signal(s), inside[0]), inside[1]) for s in fine["grid"]["sigma"]]
    rows: list[tuple[float, ...]] = []
    for i, end in enumerate(t[1:]):
        _, weights = solver.coefficients(schedule, t[i::-1][:3], end)
        rows.append(tuple(w / schedule.alpha(end) for w in weights))
        sums = [entry["deis_coefficients"][i] for entry in (coarse, fine)]
        if i == 0:
            assert sums == [[], []]
            continue
        close(torch.tensor(rows[i], dtype=F64), torch.tensor(sums[0], dtype=F64), rtol=1e-4)  # 10^4 points
        close(torch.tensor(rows[i], dtype=F64), torch.tensor(sums[1], dtype=F64), rtol=1e-6)  # 10^6 points
        limit = [(100 * b - a) / 99 for a, b in zip(*sums, strict=True)]  # a left sum's error falls like 1 / points
        close(torch.tensor(rows[i], dtype=F64), torch.tensor(limit, dtype=F64), rtol=1e-9)
    assert gap(fine, upstream.TabulatedAdams(tuple(rows))) < 1e-5 < gap(coarse, upstream.TabulatedAdams(tuple(rows)))


# ---- the mapping reads the entry, and nothing but it -----------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ENTRIES if n.endswith(("steps=6", "n=6", "num_steps=6", "N=10"))][::7])
def test_names_and_results_are_not_read(name: str) -> None:
    entry = ENTRIES[name]
    results = ("name", "item", "source", "x_final", "trajectory", "nfe", "notes", "max_abs_error_vs_exact_ode")
    bare = {key: value for key, value in entry.items() if key not in results}
    assert golden.describe(bare) == golden.describe(entry)
    for problem in (PROBLEM, GOLDEN["problem"]):
        ours, nfe = golden.run(bare, problem)
        assert nfe == entry["nfe"] and ours.shape[1:] == (GOLDEN["problem"]["batch"], GOLDEN["problem"]["dim"])
        equal(ours[-1], states(entry, "x_final"))


OTHER = {
    "shape": [5],
    "weights": [0.4, 0.6],
    "means": [[1.0, -0.4, 0.2, 0.7, -1.2], [-0.8, 0.9, 0.1, -0.3, 0.5]],
    "stds": [[0.3, 0.5, 0.2, 0.6, 0.4], [0.7, 0.2, 0.4, 0.3, 0.8]],
}
"""Another problem: shape, number of components and batch are others."""


def other_entry(solver: str, sigma: list[float], **fields: Any) -> dict[str, Any]:
    x = np.random.default_rng(5).standard_normal((3, 5)) * sigma[0]
    ones = [1.0] * len(sigma)
    entry = {"solver": solver, "options": {}, "schedule": "edm", "state_space": "ve", "prediction": "x0"}
    grid = {"t": sigma, "alpha": ones, "sigma": sigma}
    return entry | {"status": "ok", "grid": grid, "x_T": x.tolist()} | fields


def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """The closed-form denoiser of OTHER at alpha = 1, written out once more."""
    w, m, v = np.array(OTHER["weights"]), np.array(OTHER["means"]), np.array(OTHER["stds"]) ** 2
    r = x[:, None] - m
    g = np.log(w) - 0.5 * (np.log(v + sigma**2) + r**2 / (v + sigma**2)).sum(-1)
    g = np.exp(g - g.max(1, keepdims=True))
    g /= g.sum(1, keepdims=True)
    return np.einsum("bk,bkd->bd", g, m + v / (v + sigma**2) * r)


SEVEN = [20.0, 9.0, 4.0, 1.5, 0.6, 0.2, 0.05, 0.0]


def test_dpmpp_2m_on_another_problem_is_its_published_loop() -> None:
    entry = other_entry("dpmpp_2m", SEVEN)
    x, old, lam = np.array(entry["x_T"]), None, [-math.log(s) if s else math.inf for s in SEVEN]
    for i, s in enumerate(SEVEN[:-1]):
        D = denoise(x, s)
        blend = D
        if old is not None and SEVEN[i + 1] > 0:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            blend = (1 + 1 / (2 * r)) * D - 1 / (2 * r) * old
        x, old = SEVEN[i + 1] / s * x + (1 - SEVEN[i + 1] / s) * blend, D
    ours, nfe = golden.run(entry, OTHER)
    equal(ours[-1], torch.from_numpy(x))
    assert nfe == 7


def test_ipndm_on_another_problem_is_its_published_loop() -> None:
    sigma = SEVEN[:-1]
    entry = other_entry("ipndm-3", sigma, options={"max_order": 3})
    weights = [[1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12]]
    x, slopes = np.array(entry["x_T"]), []
    for s, end in zip(sigma, sigma[1:], strict=False):
        slopes.insert(0, (x - denoise(x, s)) / s)
        row = weights[min(len(slopes), 3) - 1]
        x = x + (end - s) * sum(w * d for w, d in zip(row, slopes, strict=False))
    ours, nfe = golden.run(entry, OTHER)
    equal(ours[-1], torch.from_numpy(x))
    assert nfe == 6


def test_lms_on_another_problem_integrates_polynomials_in_sigma() -> None:
    entry = other_entry("lms", SEVEN, options={"order": 3})
    x, slopes = np.array(entry["x_T"]), []
    for i, s in enumerate(SEVEN[:-1]):
        slopes.insert(0, (x - denoise(x, s)) / s)
        nodes = np.array(SEVEN[: i + 1][::-1][:3])
        # Column j of the inverse holds the coefficients of the Lagrange polynomial of node j, lowest power first.
        coefficients = np.linalg.inv(np.vander(nodes, increasing=True))
        powers = [(SEVEN[i + 1] ** (k + 1) - s ** (k + 1)) / (k + 1) for k in range(len(nodes))]
        x = x + sum(w * d for w, d in zip(np.array(powers) @ coefficients, slopes, strict=False))
    ours, nfe = golden.run(entry, OTHER)
    equal(ours[-1], torch.from_numpy(x))
    assert nfe == 7


def test_thresholding_on_another_problem_clamps_and_rescales_each_sample() -> None:
    entry = other_entry("euler", SEVEN, options={"dynamic_thresholding": True})
    x = np.array(entry["x_T"])
    for s, end in zip(SEVEN[:-1], SEVEN[1:], strict=True):
        D = denoise(x, s)
        bound = np.maximum(np.quantile(np.abs(D), 0.995, axis=1, keepdims=True), 1.0)
        x = end / s * x + (1 - end / s) * np.clip(D, -bound, bound) / bound
    equal(golden.run(entry, OTHER)[0][-1], torch.from_numpy(x))


def discrete_entry(solver: str, times: list[int], **fields: Any) -> dict[str, Any]:
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[times]
    alpha, sigma = np.sqrt(table).tolist(), np.sqrt(1 - table).tolist()
    entry = other_entry(solver, sigma, schedule="ddpm_discrete", state_space="vp", prediction="epsilon", **fields)
    return entry | {"grid": {"t": times, "alpha": alpha, "sigma": sigma}}


def test_an_odd_step_in_diffusers_f_pndm_is_evaluated_one_timestep_below_its_state() -> None:
    times = [875, 750, 625, 500, 375, 250, 125, 0]
    entry = discrete_entry("pndm", times, options={"skip_prk_steps": False})
    case = golden.case_for(entry)
    assert case.solver == upstream.FPNDMAsInDiffusers()
    assert case.plan.evaluation_times[:8] == (875, 812, 812, 750, 750, 687, 687, 625)
    # Computed with diffusers 0.42.1 (float64, 8 steps, skip_prk_steps=False, set_alpha_to_one=True), first sample.
    theirs = [0.30019375930991576, 1.1099419931059942, -1.2157057926541726]
    theirs += [-0.04959758427747882, -0.7529744329746316, 0.7387012962275671]
    grid = {key: [*values, end] for (key, values), end in zip(entry["grid"].items(), (-125, 1.0, 0.0), strict=True)}
    start = states(GOLDEN["problem"], "z")[:1] * grid["sigma"][0]
    ours, nfe = golden.run(entry | {"grid": grid, "x_T": start.tolist()}, PROBLEM)
    equal(ours[-1], torch.tensor([theirs], dtype=F64))
    assert nfe == 17


def test_f_pndm_rounds_the_middle_of_an_odd_step_down_and_is_itself_on_even_steps() -> None:
    odd = golden.case_for(discrete_entry("F-PNDM", [876, 751, 626, 501, 376, 251, 126, 1, 0]))
    assert odd.solver == upstream.FPNDMAtIntegerTimes()
    assert odd.plan.evaluation_times[:5] == (876, 813, 813, 751, 751)
    even = discrete_entry("F-PNDM", [801, 601, 401, 201, 1, 0])
    assert golden.solver_for(even) == PNDM(start="runge_kutta")
    plans = [s.plan(golden.schedule_for(even), golden.grid_for(even)) for s in VARIANTS_OF_FPNDM]
    assert all(plan.equivalent(golden.case_for(even).plan) for plan in plans)


VARIANTS_OF_FPNDM = (upstream.FPNDMAtIntegerTimes(), upstream.FPNDMAsInDiffusers())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solver": "heum"}, "unknown solver of a golden entry 'heum'. Did you mean 'heun'"),
        ({"schedule": "sigmoid", "state_space": "vp"}, "no schedule here is 'sigmoid'"),
        ({"prediction": "score"}, "unknown prediction of a golden entry 'score'"),
        ({"options": {"eta": 0.5}}, "eta = 0.5 is not repeated here"),
        ({"solver": "dpmsolver++", "options": {"order": 2, "method": "adaptive"}}, "the method 'adaptive'"),
        ({"solver": "dpmsolver++", "options": {"order": 2, "solver_type": "rk"}}, "unknown solver_type"),
        ({"solver": "dpmsolver++", "options": {"solver_order": 2}, "order_list": [1, 1, 2]}, "has the positions"),
        ({"solver": "deis", "options": {"solver_type": "midpoint"}}, "repeated in log-rho, got 'midpoint'"),
        ({"solver": "deis-tab-2", "deis_coefficients": [[], [0.1, 0.2]]}, "has 2 rows, and the grid 7 steps"),
        ({"solver": "deis-tab-2", "deis_coefficients": [[0.1, 0.2]]}, "more weights than there are slopes"),
        ({"status": "upstream quirk", "evals": {"alpha": [1.0], "sigma": [1.0]}}, "a level for each of 7"),
        ({"solver": "lms"}, "the field 'order'"),
        ({"grid": {"alpha": [1.0, 1.0], "sigma": [1.0, 2.0, 0.0]}}, "as many alphas as sigmas"),
        ({"grid": {"alpha": [1.0] * 4, "sigma": [2.0, 1.0, 1.0, 0.0]}}, "strictly monotone"),
    ],
)
def test_what_cannot_be_repeated_is_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    entry = other_entry("euler", SEVEN) | change
    with pytest.raises(iia.errors.InputError, match=message.replace("(", r"\(")):
        golden.run(entry, OTHER)
    assert message in str(golden.uncovered(entry))


def test_states_of_another_size_than_the_problem_are_refused() -> None:
    with pytest.raises(iia.errors.InputError, match=r"x_T has shape \[3, 5\]"):
        golden.run(other_entry("euler", SEVEN), PROBLEM)
    with pytest.raises(iia.errors.InputError, match="the field 'means'"):
        golden.run(other_entry("euler", SEVEN), {"shape": [5]})


def test_the_variants_refuse_what_they_were_not_made_for() -> None:
    with pytest.raises(iia.errors.InputError, match="timesteps of a Discrete schedule"):
        upstream.DDIMAsInDiffusers(100).plan(iia.EDM(), iia.grids.karras(5))
    model = upstream.ModelAtOtherLevels(PROBLEM, {1.0: (1.0, 0.9)})
    with pytest.raises(iia.errors.InputError, match=r"knows the times \[1.0\], got 2.0"):
        model(torch.zeros(1, *PROBLEM.shape, dtype=F64), torch.tensor([2.0]))
