"""What the families of solvers promise beyond the conformance suite: published formulas, options, ends, meta-solvers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import F64, close, every_schedule, gaussian, generator, mixture

import iia_ode as iia
from iia_ode.plan import Evaluate
from iia_ode.solvers import (
    AnalyticFirstStep,
    BlockDPMSolver,
    DenoiseToZero,
    DPMSolverMultistep,
    ExponentialAdams,
    Lookahead,
    LowerOrderFinal,
    OrderRamp,
    SinglestepDPMSolver,
    UniPC,
    same_solver,
)
from iia_ode.solvers.transfer import ExponentialStep, exponential_moments, lagrange_weights, noise_weights
from iia_ode.testing.cases import TRACKS
from iia_ode.testing.orders import measure_order, order_misses

EDM, VP, FLOW = iia.EDM(), iia.VP(), iia.FlowMatching()
GRID = iia.grids.karras(6, 0.02, 20.0)


def weights_of_step(solver: iia.Solver, grid: list[float], step: int) -> list[float]:
    """Weights of the model outputs in a step on EDM, newest first."""
    plan = solver.plan(EDM, torch.tensor(grid, dtype=F64))
    outputs = {k for k, ins in enumerate(plan.code, start=1) if isinstance(ins, Evaluate)}
    (state,) = (ins for ins in plan.code if getattr(ins, "step", None) == step)
    return [float(w) for j, w in sorted(state.terms, reverse=True) if j in outputs]


# ---- integrals -------------------------------------------------------------------------------------------------------


@given(H=st.floats(-12.0, 12.0).filter(lambda v: abs(v) > 1e-6))
def test_exponential_moments_satisfy_their_recurrence(H: float) -> None:
    """w_k = 1 - k w_(k-1) / H, by parts."""
    w = exponential_moments(H, 4)
    size = max(1.0, math.exp(-H))
    for k in (1, 2, 3):
        assert H * w[k] == pytest.approx(H - k * w[k - 1], abs=1e-13 * size * max(1.0, abs(H)))


@given(H=st.floats(1e-9, 1e-3))
def test_exponential_moments_do_not_cancel_at_small_steps(H: float) -> None:
    """w_k = H / (k + 1) - H^2 / ((k + 1)(k + 2)) + O(H^3)."""
    for k, w in enumerate(exponential_moments(H, 4)):
        assert w == pytest.approx(H / (k + 1) - H * H / ((k + 1) * (k + 2)), rel=2 * H * H + 1e-14)


@given(nodes=st.lists(st.floats(-3.0, 0.0), min_size=2, max_size=4, unique=True), end=st.floats(0.1, 2.0))
def test_lagrange_integrals_are_exact_for_the_polynomials_they_interpolate(nodes: list[float], end: float) -> None:
    gaps = [abs(a - b) for i, a in enumerate(nodes) for b in nodes[:i]]
    if min(gaps) < 0.1:  # weights of order 1 / gap^3: rounding, not the promise
        return
    weights = lagrange_weights(nodes, 0.0, end)
    for k in range(len(nodes)):
        total = sum(w * u**k for w, u in zip(weights, nodes, strict=True))
        assert total == pytest.approx(end ** (k + 1) / (k + 1), abs=1e-10)


@pytest.mark.parametrize("schedule", [EDM, VP, FLOW, iia.Cosine(), iia.VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("high", "low"), [(5.0, 3.0), (80.0, 0.002), (0.01, 0.002), (0.5, 0.0), (0.3, 5.0)])
def test_deis_integrates_over_sigma_over_alpha_exactly_on_every_schedule(
    schedule: iia.Schedule, high: float, low: float
) -> None:
    """Against adaptive quadrature of the same integrals."""
    from scipy.integrate import quad

    t, s = schedule.t_of_noise_to_signal(high), schedule.t_of_noise_to_signal(low)
    nodes = [t, schedule.t_of_noise_to_signal(1.5 * high)]
    weights = noise_weights(schedule, nodes, t, s)
    assert sum(weights) == pytest.approx(low - high, rel=1e-13)

    def linear(theta: float) -> float:
        rho = math.sinh(theta)
        return (schedule.t_of_noise_to_signal(rho) - nodes[0]) / (nodes[1] - nodes[0]) * math.cosh(theta)

    exact = quad(linear, math.asinh(high), math.asinh(low), epsabs=1e-13, epsrel=1e-12, limit=500)[0]
    assert weights[1] == pytest.approx(exact, rel=1e-9, abs=1e-12)


# ---- published formulas ----------------------------------------------------------------------------------------------


def test_adams_weights_on_a_uniform_grid_are_the_textbook_ones() -> None:
    grid = [5.0, 4.0, 3.0, 2.0, 1.0]
    for name in ("lms", "ab4", "ipndm"):
        slopes = [w / -1.0 for w in weights_of_step(iia.get_solver(name), grid, 4)]
        if name == "ab4":  # stored as velocities
            assert slopes == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24], rel=1e-12)
        else:
            assert slopes == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24], rel=1e-12)


def test_dpmpp_2m_has_the_published_weights() -> None:
    """x_s = (sigma_s/sigma_t) x - alpha_s (e^-h - 1) ((1 + 1/(2r)) D_t - 1/(2r) D_q) [Lu et al. 2022b, alg. 2]."""
    q, t, s = 8.0, 3.0, 0.9
    h, r = math.log(t / s), math.log(q / t) / math.log(t / s)
    expected = [-math.expm1(-h) * (1 + 1 / (2 * r)), math.expm1(-h) / (2 * r)]
    assert weights_of_step(iia.get_solver("dpmpp_2m"), [q, t, s], 2) == pytest.approx(expected, rel=1e-12)


def test_the_published_third_order_has_half_the_weight_that_the_exact_integral_has_on_its_second_difference() -> None:
    grid = [20.0, 8.0, 3.0, 0.9]
    published, exact = (
        weights_of_step(s, grid, 3) for s in (DPMSolverMultistep(max_order=3), iia.get_solver("expab3"))
    )
    lam = [-math.log(v) for v in grid]
    h = lam[3] - lam[2]
    u = [(v - lam[2]) / h for v in (lam[2], lam[1], lam[0])]
    difference = [1 / math.prod(a - b for b in u if b != a) for a in u]
    w2 = ExponentialStep.of(EDM, "data", 3.0, 0.9).moments(3)[2]
    gaps = [a - b for a, b in zip(exact, published, strict=True)]
    assert gaps == pytest.approx([w2 / 2 * d for d in difference], rel=1e-9)


def test_dpm_solver_3s_has_the_published_stages_and_evaluation_levels() -> None:
    plan = iia.get_solver("dpm_solver_3s").plan(EDM, [8.0, 1.0])
    assert plan.evaluation_times == pytest.approx([8.0, 4.0, 2.0], rel=1e-12)
    plan = SinglestepDPMSolver(r1=0.25).plan(EDM, [16.0, 1.0])
    assert plan.evaluation_times == pytest.approx([16.0, 8.0], rel=1e-12)
    plan = SinglestepDPMSolver(max_order=3, spacing="time").plan(VP, [0.9, 0.6])
    assert plan.evaluation_times == pytest.approx([0.9, 0.8, 0.7], rel=1e-12)


def test_ralston_and_kutta_evaluate_where_their_tableaus_say() -> None:
    assert iia.get_solver("ralston").plan(EDM, [3.0, 0.0]).evaluation_times == pytest.approx([3.0, 1.0])
    assert iia.get_solver("heun3").plan(EDM, [3.0, 0.0]).evaluation_times == pytest.approx([3.0, 2.0, 1.0])
    assert iia.get_solver("rk4_38").plan(EDM, [4.0, 1.0]).evaluation_times == pytest.approx([4.0, 3.0, 2.0, 1.0])


def test_torchdiffeqs_rk4_is_the_three_eighths_rule() -> None:
    problem = mixture()
    ode, x = problem.ode(VP), problem.noisy(4, VP, 0.9, generator())
    grid = iia.grids.uniform(5, 0.9, 0.2)
    theirs = iia.sample(ode, x, grid, "torchdiffeq:rk4")
    close(iia.sample(ode, x, grid, "rk4_38"), theirs, atol=1e-12)
    assert float((iia.sample(ode, x, grid, "rk4") - theirs).abs().max()) > 1e-4


@pytest.mark.parametrize(("steps", "spndm", "fpndm"), [(5, 6, 14), (10, 11, 19), (20, 21, 29)])
def test_pseudo_numerical_starts_cost_what_the_paper_says(steps: int, spndm: int, fpndm: int) -> None:
    grid = iia.grids.uniform(steps, 10.0, 0.5)
    counts = [iia.get_solver(name).plan(EDM, grid).nfe for name in ("ipndm", "spndm", "plms", "fpndm")]
    assert counts == [steps, spndm, spndm, fpndm]


@every_schedule
@pytest.mark.parametrize("name", ["unipc", "unipc1", "unipc_noise"])
def test_the_corrector_of_unipc_costs_no_evaluation(name: str, schedule: iia.Schedule) -> None:
    for to_data in (True, False):
        grid = iia.grids.karras(7, schedule=schedule, to_data=to_data)
        assert iia.get_solver(name).plan(schedule, grid).nfe == len(grid) - 1
        assert iia.get_solver(name, corrector=False).plan(schedule, grid).nfe == len(grid) - 1


def test_the_corrector_of_unipc_raises_the_order_by_one() -> None:
    assert [UniPC(p).order for p in (1, 2, 3, 4)] == [2, 3, 4, 5]
    assert [UniPC(p, corrector=False).order for p in (1, 2, 3, 4)] == [1, 2, 3, 4]


# ---- ends ------------------------------------------------------------------------------------------------------------

ENDS_ON_THE_ESTIMATE = [
    "ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_3s", "dpm_solver_2m", "dpm_solver_3s", "dpm2",
    "expab4", "deis_lab3", "deis_rho_heun", "deis_rho_rk4", "denoise_to_zero",
]  # fmt: skip


@every_schedule
@pytest.mark.parametrize("name", ENDS_ON_THE_ESTIMATE)
def test_exponential_integrators_end_on_the_models_data_estimate(name: str, schedule: iia.Schedule) -> None:
    problem, grid = mixture(), iia.grids.karras(4, 0.5, 20.0, schedule=schedule)
    ode = problem.ode(schedule)
    states = iia.odeint(ode, problem.noisy(5, schedule, float(grid[0]), generator(4)), grid, method=name)
    close(states[-1], ode.data(states[-2], float(grid[-2])), atol=1e-12)


# ---- options ---------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("ipndm", {"max_order": 5}, "max_order of ipndm must be a whole number from 1 to 4, got 5"),
    ("lms", {"max_order": 0}, "from 1 to 4, got 0"),
    ("lms", {"max_order": 2.0}, "got 2.0"),
    ("expab2", {"form": "x0"}, "form of expab2 must be one of 'data', 'noise', got 'x0'"),
    ("dpmpp_2m", {"solver_type": "heun"}, "'midpoint', 'taylor', got 'heun'"),
    ("dpmpp_2s", {"r1": 1.0}, "r1 of dpmpp_2s must be a number between 0 and 1, got 1.0"),
    ("dpmpp_3s", {"r1": 0.7, "r2": 0.5}, "r1 < r2"),
    ("dpmpp_2s", {"spacing": "uniform"}, "spacing of dpmpp_2s"),
    ("dpm2", {"r": 0}, "r of dpm2 must be a number between 0 and 1, got 0"),
    ("unipc", {"variant": "bh3"}, "variant of unipc must be one of 'bh1', 'bh2', got 'bh3'"),
    ("spndm", {"start": "rk"}, "start of ipndm must be one of 'euler', 'heun', 'runge_kutta', got 'rk'"),
    ("lookahead", {"lam": float("nan")}, "lam of lookahead must be a finite number"),
    ("lookahead", {"base": 3}, "expected the name of a registered solver"),
    ("lower_order_final", {"base": "heun"}, "needs a base with an option max_order"),
    ("order_ramp", {"orders": ()}, "at least one order"),
    ("order_ramp", {"orders": 5}, "at least one order"),
    ("unipc", {"corrector": 2}, "corrector of unipc must be True or False, got 2"),
    ("dpm_solver_v3", {"drop_oldest": "no"}, "drop_oldest of dpm_solver_v3 must be True or False"),
    ("dpmpp_2s_blocks", {"lower_order_final": "False"}, "must be True or False"),
    ("lookahead", {"base": {"name": "heun", "options": None}}, "expected the name of a registered solver"),
    ("order_ramp", {"orders": (1, 3)}, "rise by one at a time"),
    ("order_ramp", {"orders": (1, 2, 3, 4), "base": "dpmpp_2m"}, "from 1 to 3, got 4"),
]


@pytest.mark.parametrize(("name", "options", "text"), BAD_OPTIONS)
def test_an_option_that_cannot_be_is_refused_with_what_could(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(iia.errors.InputError) as caught:
        iia.get_solver(name, **options)
    assert text in str(caught.value)


def test_a_variant_is_the_class_with_its_options_and_says_so() -> None:
    assert iia.get_solver("dpmpp_3m") == iia.get_solver("dpmpp_2m", max_order=3) == DPMSolverMultistep(max_order=3)
    assert iia.get_solver("dpmpp_2m", max_order=3).label == "dpmpp_3m"
    assert iia.get_solver("lms", max_order=4).label == "lms"
    assert iia.get_solver("deis_rhoab2").label == "lms2"
    assert iia.get_solver("unipc", max_order=2, form="noise").label == "unipc(max_order=2, form='noise')"
    assert "deis_rhoab2" not in iia.solver_names()
    assert same_solver("lms2") == same_solver("deis_rhoab2") == ["lms2", "deis_rhoab2"]
    assert iia.get_solver("expab3").plan(EDM, GRID).name == "expab3"


def test_the_order_of_the_third_singlestep_formula_depends_on_its_stages() -> None:
    assert iia.get_solver("dpmpp_3s").order == 3
    assert iia.get_solver("dpmpp_3s", r2=0.5, r1=0.25).order == 2
    assert iia.get_solver("dpmpp_3s", r1=0.25).order == 3


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("solver_type", ["midpoint", "taylor"])
@pytest.mark.parametrize(("r1", "r2"), [(1 / 3, 2 / 3), (0.25, 2 / 3), (0.25, 0.5), (0.5, 0.9)])
def test_singlestep_stages_elsewhere_have_the_order_that_the_solver_says(
    form: str, solver_type: str, r1: float, r2: float
) -> None:
    solver = SinglestepDPMSolver(form, 3, r1, r2, solver_type)
    orders = [m for m in measure_order(solver, VP, TRACKS[-1])]
    assert not order_misses(orders, solver.order)
    assert solver.order == (3 if r2 == 2 / 3 else 2)


@pytest.mark.parametrize(
    "solver",
    [
        BlockDPMSolver(3, lower_order_final=True),
        LowerOrderFinal("spndm"),
        OrderRamp("spndm", (2, 1)),
        LowerOrderFinal("unipc"),
        Lookahead("deis_lab1", 0.5),
        Lookahead("unipc"),
        OrderRamp("unipc", (1, 2)),
        AnalyticFirstStep("lms"),
        DenoiseToZero("unipc"),
    ],
    ids=lambda s: s.label,
)
def test_a_choice_of_options_or_of_bases_has_the_order_that_it_says(solver: iia.Solver) -> None:
    assert not order_misses(measure_order(solver, VP, TRACKS[-1]), solver.order)


def test_lowering_the_order_at_the_end_never_costs_evaluations() -> None:
    grid = iia.grids.karras(9, 0.02, 20.0, to_data=False)
    for base in ("spndm", "plms", "fpndm", "dpmpp_3s", "unipc", "ipndm"):
        assert LowerOrderFinal(base).plan(EDM, grid).nfe <= iia.get_solver(base).plan(EDM, grid).nfe


def test_a_count_of_evaluations_is_found_where_levels_cost_less_than_one_each() -> None:
    solver = AnalyticFirstStep("ddim")
    grid = solver.grid_for(5, lambda n: iia.grids.karras(n, to_data=False), EDM)
    assert (len(grid), solver.plan(EDM, grid).nfe) == (7, 5)


def test_solvers_with_the_same_options_are_equal() -> None:
    for name in iia.solver_names():
        assert iia.get_solver(name) == iia.get_solver(name)
        assert hash(iia.get_solver(name)) == hash(iia.get_solver(name))
    assert iia.get_solver("heun") != iia.get_solver("euler")
    assert Lookahead("heun") == Lookahead("heun") != Lookahead("euler")


def test_a_solver_may_be_given_as_the_mapping_that_options_wrote() -> None:
    problem = gaussian()
    ode, x = problem.ode(EDM), problem.noisy(3, EDM, 20.0, generator())
    given = {"name": "unipc", "options": {"max_order": 2}}
    close(iia.sample(ode, x, GRID, given), iia.sample(ode, x, GRID, "unipc2"))


def test_lookahead_looks_at_the_grid_point_before_whatever_the_base_evaluates_when() -> None:
    """UniPC evaluates at the end of each step, twice in the first: over it, later steps are those of dpmpp_2m too."""
    grid = iia.grids.log_snr(5, 0.1, 10.0, to_data=False).tolist()
    looked, two_step = Lookahead(UniPC(1, corrector=False), 0.5), iia.get_solver("dpmpp_2m")
    assert weights_of_step(looked, grid, 4) == pytest.approx(weights_of_step(two_step, grid, 4), rel=1e-12)


# ---- meta-solvers ----------------------------------------------------------------------------------------------------


def test_a_meta_solver_wraps_a_name_an_instance_or_what_options_wrote() -> None:
    by_name, by_instance = Lookahead("ipndm"), Lookahead(iia.get_solver("ipndm"))
    again = iia.get_solver("lookahead", **by_name.options())
    assert by_name == by_instance == again
    assert by_name.label == "lookahead(ipndm, lam=0.1)"
    assert iia.get_solver("lookahead").label == "lookahead"


@pytest.mark.parametrize("base", ["ddim", "heun", "ipndm", "unipc", "dpmpp_3s", "plms"])
def test_lookahead_without_extrapolation_is_its_base_and_costs_the_same(base: str) -> None:
    plan = iia.get_solver(base).plan(EDM, GRID)
    assert Lookahead(base, 0.0).plan(EDM, GRID).difference(plan) < 1e-14
    extrapolated = Lookahead(base, 0.3).plan(EDM, GRID)
    assert extrapolated.nfe == plan.nfe
    assert extrapolated.difference(plan) > 1e-3


def test_lookahead_extrapolates_the_data_estimate_of_the_step_before() -> None:
    problem, grid = mixture(), [5.0, 2.0, 0.8]
    ode = problem.ode(EDM)
    x = problem.noisy(3, EDM, 5.0, generator(1))
    first = ode.data(x, 5.0)
    y = 2 / 5 * x + 3 / 5 * first
    second = ode.data(y, 2.0)
    looked = second + 0.25 * (second - first)
    close(iia.sample(ode, x, grid, Lookahead(lam=0.25)), 0.8 / 2 * y + 1.2 / 2 * looked, atol=1e-13)


@pytest.mark.parametrize("base", ["ddim", "heun", "lms", "dpmpp_3s", "unipc"])
def test_an_analytic_first_step_saves_one_evaluation(base: str) -> None:
    plan = iia.get_solver(base).plan(EDM, iia.grids.karras(6))
    saved = AnalyticFirstStep(base).plan(EDM, iia.grids.karras(6))
    assert saved.nfe == plan.nfe - 1
    assert saved.evaluation_times == plan.evaluation_times[1:]


def test_the_analytic_first_step_is_right_at_high_noise() -> None:
    """From sigma = 80 its data estimate, x / 160 or so, is off by the data's size, which moves the state by that much."""
    problem, grid = gaussian(), iia.grids.karras(30)
    ode, x = problem.ode(EDM), problem.noisy(64, EDM, 80.0, generator(2))
    gap = (iia.sample(ode, x, grid, AnalyticFirstStep("ddim")) - iia.sample(ode, x, grid, "ddim")).abs()
    assert float(gap.max()) < 0.2
    assert iia.get_solver("afs") == AnalyticFirstStep()


def test_lower_order_final_is_the_ramp_that_ends_in_three_two_one() -> None:
    ramp = OrderRamp("dpmpp_3m", (1, 2, 3, 3, 2, 1))
    assert LowerOrderFinal("dpmpp_3m").plan(EDM, GRID).difference(ramp.plan(EDM, GRID)) < 1e-15
    inner = iia.grids.karras(7, 0.02, 20.0, to_data=False)
    plans = [s.plan(EDM, inner) for s in (LowerOrderFinal("dpmpp_2m"), iia.get_solver("dpmpp_2m"))]
    assert plans[0].difference(plans[1]) > 1e-3


def test_the_last_order_of_a_ramp_serves_all_later_steps() -> None:
    assert OrderRamp("lms", (1, 2)).plan(EDM, GRID).difference(iia.get_solver("lms2").plan(EDM, GRID)) < 1e-15
    assert OrderRamp(ExponentialAdams(max_order=4), (1, 2, 3, 4)).order == 4
    assert OrderRamp("expab4", [1, 2]).order == 2


def test_denoise_to_zero_replaces_only_the_step_to_the_data() -> None:
    inner, whole = iia.grids.karras(5, to_data=False), iia.grids.karras(5)
    base = iia.get_solver("midpoint")
    assert DenoiseToZero(base).plan(EDM, inner).difference(base.plan(EDM, inner)) == 0.0
    ended = DenoiseToZero(base).plan(EDM, whole)
    assert ended.nfe == base.plan(EDM, whole).nfe - 1
    assert ended.difference(base.plan(EDM, whole)) > 1e-6


@pytest.mark.parametrize(
    ("order", "steps", "positions"),
    [
        (2, 6, [1, 2, 1, 2, 1, 2]),
        (2, 5, [1, 2, 1, 2, 1]),
        (3, 7, [1, 2, 3, 1, 2, 3, 1]),
        (3, 8, [1, 2, 3, 1, 2, 3, 1, 2]),
    ],
)
def test_blocks_fill_the_grid_from_the_start(order: int, steps: int, positions: list[int]) -> None:
    assert BlockDPMSolver(order).positions(steps) == positions
