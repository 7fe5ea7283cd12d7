"""The levels of a model's training: no path evaluates the model elsewhere, and no path reads levels as times."""

import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import F64, every_solver, generator, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.autofit import Budget
from iia_ode.errors import GridError, PlanError, ScheduleError, StateSizeWarning
from iia_ode.grids import GRIDS, align_your_steps, cut, discrete, karras, log_snr, uniform
from iia_ode.iia import refine
from iia_ode.plan import trace
from iia_ode.schedules import schedule_from_config

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
STABLE_DIFFUSION = iia.Discrete((1 - BETAS).cumprod(0))  # levels 0.0292 to 14.61 at timesteps 0 to 999
STATED = iia.EDM(known_levels=(0.02, 50.0))
SCHEDULES = [
    STABLE_DIFFUSION,
    STATED,
    iia.VP(known_levels=(0.05, 20.0)),
    iia.FlowMatching(known_levels=(0.01, math.inf)),
]
every_kind = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


class Witness(torch.nn.Module):
    """A model that keeps the lowest and the highest time of its calls, and is smooth enough for every fit."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.times += t.detach().unique().tolist()
        return 0.3 * torch.tanh(x) + 0.1 * x


def witness(schedule: iia.Schedule) -> tuple[iia.ProbabilityFlowODE, Witness, float]:
    """An ODE, its model, and the time from which the paths of the tests start."""
    model = Witness()
    start = schedule.t_of_noise_to_signal(min(schedule.known_levels[1], 50.0))
    return iia.ProbabilityFlowODE(model, schedule, "v", model_dtype=F64), model, start


def check_times(model: Witness, schedule: iia.Schedule) -> None:
    assert model.times
    levels = [schedule.noise_to_signal(t) for t in model.times]
    low, high = schedule.known_levels
    assert low * (1 - 1e-9) <= min(levels) and max(levels) <= high * (1 + 1e-9)
    if isinstance(schedule, iia.Discrete):
        assert min(model.times) >= 0 and max(model.times) <= schedule.t_noise


# ---- no path leaves them ---------------------------------------------------------------------------------------------

Path = Callable[[iia.ProbabilityFlowODE, Tensor, float], object]


def _grid(ode: iia.ProbabilityFlowODE, t: float, n: int = 4) -> Tensor:
    return karras(n, sigma_max=ode.schedule.noise_to_signal(t), schedule=ode.schedule)


PATHS: dict[str, Path] = {
    "sample": lambda ode, x, t: iia.sample(ode, x, _grid(ode, t), "midpoint"),
    "odeint": lambda ode, x, t: iia.odeint(ode, x, _grid(ode, t), method="unipc"),
    "torchdiffeq": lambda ode, x, t: iia.sample(ode, x, _grid(ode, t)[:-1], "dopri5", rtol=1e-3, atol=1e-3),
    "encoding": lambda ode, x, t: iia.sample(ode, x, _grid(ode, t)[:-1].flip(0), "rk4"),
    "restart": lambda ode, x, t: iia.sample(ode, x, cut(_grid(ode, t), end=ode.schedule.t_data), "heun3"),
    "teacher": lambda ode, x, t: iia.Teacher.solve(ode, x, t, ode.schedule.t_data),
    "teacher of a grid": lambda ode, x, t: iia.Teacher.for_grid(ode, x, _grid(ode, t)),
    "reference": lambda ode, x, t: iia.reference.solve(ode, x, t, ode.schedule.t_data, rtol=1e-4, atol=1e-4),
    "trajectory": lambda ode, x, t: iia.reference.trajectory(
        ode, x, t, ode.schedule.t_data, points=9, rtol=1e-4, atol=1e-4
    ),
    "IIA": lambda ode, x, t: iia.IIA("ddim", guard=False).fit(ode, x, _grid(ode, t)),
    "IIA over heun": lambda ode, x, t: iia.IIA("heun", target="trajectory", guard=False).fit(ode, x, _grid(ode, t)),
    "refine": lambda ode, x, t: refine(
        ode, x, trace(iia.get_solver("ddim"), ode.schedule, _grid(ode, t, 3)), 0 * x, iterations=1, sigma_min=0.0
    ),
    "fit": lambda ode, x, t: iia.fit(
        ode, 2, x=x, sigma_max=ode.schedule.noise_to_signal(t), budget=Budget(starts=1, iterations=1)
    ),
    "statistics": lambda ode, x, t: iia.ModelStatistics.estimate(ode, x, _grid(ode, t), points=4, mode="reverse"),
}


@every_kind
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.filterwarnings("ignore::iia_ode.errors.GuardWarning")
def test_no_path_evaluates_the_model_outside_of_the_levels_that_it_knows(path: str, schedule: iia.Schedule) -> None:
    ode, model, t = witness(schedule)
    x = schedule.sigma(t) * normal(16, 6)
    if path == "encoding":
        x = normal(16, 6)
    PATHS[path](ode, x, t)
    check_times(model, schedule)


@every_solver
@given(n=st.integers(1, 9), kind=st.sampled_from(["discrete", "levels", "stated"]))
@settings(max_examples=4)
def test_no_solver_evaluates_the_model_outside_of_the_levels_that_it_knows(name: str, n: int, kind: str) -> None:
    schedule = STATED if kind == "stated" else STABLE_DIFFUSION
    solver = iia.get_solver(name)
    grid = discrete(n, schedule, "linspace") if kind == "discrete" else log_snr(n, schedule=schedule)
    ode, model, _ = witness(schedule)
    iia.sample(ode, schedule.sigma(float(grid[0])) * normal(8, 6), grid, solver)
    if model.times:  # the analytic first step may be the only one
        check_times(model, schedule)


def test_models_of_whole_timesteps_are_fitted_too() -> None:
    table = torch.nn.Embedding(1000, 3)
    model = lambda x, t: 0.1 * x + table(t.round().long()).detach()  # noqa: E731  # an IndexError at every other timestep
    ode = iia.ProbabilityFlowODE(model, STABLE_DIFFUSION, "noise")
    fit = iia.IIA("ddim", guard=False).fit(ode, normal(64, 3, dtype=torch.float32), discrete(6, STABLE_DIFFUSION))
    assert fit.plan.nfe == 6


def test_a_model_evaluated_below_its_first_timestep_by_a_step_of_ones_own_is_a_plan_error_with_a_way_out() -> None:
    class Middle(iia.Solver):
        order = 1

        def step(self, ode, x, t, s, past):
            return x + (s - t) * ode.velocity(x, (t + s) / 2)

    solver, grid = Middle(), discrete(3, STABLE_DIFFUSION, "linspace")
    with pytest.raises(PlanError, match=r"t = -0\.5.*denoise_to_zero"):
        solver.plan(STABLE_DIFFUSION, grid)
    plan = iia.get_solver("denoise_to_zero", base=solver).plan(STABLE_DIFFUSION, grid)
    assert min(plan.evaluation_times) == 0


# ---- levels: defaults inside, others refused -------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("family", GRIDS)
def test_a_grid_without_levels_runs_between_the_known_ones(family: str, schedule: iia.Schedule) -> None:
    levels = schedule.noise_to_signal(GRIDS[family](6, schedule=schedule)[:-1])
    low, high = schedule.known_levels
    assert float(levels[-1]) == pytest.approx(low, rel=1e-9)
    assert float(levels[0]) == pytest.approx(high if high < math.inf else 80.0, rel=1e-9)


def test_on_timesteps_a_grid_without_levels_begins_and_ends_on_timesteps() -> None:
    grid = karras(10, schedule=STABLE_DIFFUSION)
    assert grid[[0, -2, -1]].tolist() == [999.0, 0.0, -1.0]
    assert karras(10, sigma_max=14.6, schedule=STABLE_DIFFUSION)[-2:].tolist() == [0.0, -1.0]


@given(share=st.floats(1.02, 100.0))
def test_a_level_that_the_model_does_not_know_is_a_grid_error_that_names_it(share: float) -> None:
    for schedule in SCHEDULES[:3]:
        low, high = schedule.known_levels
        with pytest.raises(GridError, match=r"sigma_min = .* below"):
            log_snr(5, low / share, schedule=schedule)
        with pytest.raises(GridError, match=r"sigma_max = .* above"):
            log_snr(5, sigma_max=high * share, schedule=schedule)


def test_rounded_levels_of_the_first_and_the_last_timestep_mean_these_timesteps() -> None:
    assert karras(5, 0.029, 14.615, schedule=STABLE_DIFFUSION)[[0, -2]].tolist() == [999.0, 0.0]


OUTSIDE: dict[str, Path] = {
    "a grid": lambda ode, x, t: iia.sample(ode, x, [t, ode.schedule.t_of_noise_to_signal(0.001)]),
    "an adaptive method": lambda ode, x, t: iia.sample(ode, x, [t, ode.schedule.t_of_noise_to_signal(0.001)], "dopri5"),
    "teacher": lambda ode, x, t: iia.Teacher.solve(ode, x, t, ode.schedule.t_data, sigma_min=0.001),
    "reference": lambda ode, x, t: iia.reference.solve(ode, x, t, ode.schedule.t_data, sigma_min=0.001),
    "fit": lambda ode, x, t: iia.fit(ode, 3, x=x, sigma_min=0.001),
    "fit above": lambda ode, x, t: iia.fit(ode, 3, x=x, sigma_max=1e3),
    "encoding": lambda ode, x, t: iia.sample(ode, x, [ode.schedule.t_of_noise_to_signal(0.001), t]),
}


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("path", OUTSIDE)
def test_an_explicit_level_outside_is_a_grid_error_on_every_path(path: str, schedule: iia.Schedule) -> None:
    ode, model, t = witness(schedule)
    with pytest.raises(GridError, match=r"knows?"):
        OUTSIDE[path](ode, schedule.sigma(t) * normal(16, 6), t)
    assert not model.times


# ---- levels that a user states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(0.0, 0.0), (1.0, 0.5), (-1.0, 2.0), (0.1,), 3.0, "ab", (math.nan, 1.0)], ids=str)
def test_impossible_known_levels_are_a_schedule_error(levels: object) -> None:
    for make in (iia.EDM, iia.VP, iia.FlowMatching):
        with pytest.raises(ScheduleError, match="known_levels"):
            make(known_levels=levels)


@every_kind
def test_known_levels_are_part_of_a_schedule_and_of_its_description(schedule: iia.Schedule) -> None:
    config = json.loads(json.dumps(schedule.config()))
    table = getattr(schedule, "alphas_cumprod", None)
    again = schedule_from_config(config, table)
    assert again == schedule and again.known_levels == schedule.known_levels
    if table is None:
        assert schedule != type(schedule)() and schedule.config() != type(schedule)().config()


def test_a_plan_keeps_the_known_levels_in_its_file(tmp_path) -> None:
    plan = iia.get_solver("heun").plan(STATED, karras(4, schedule=STATED))
    assert iia.load(plan.save(tmp_path / "plan.safetensors")).schedule.known_levels == (0.02, 50.0)


def test_functions_and_classes_of_ones_own_may_state_levels() -> None:
    flow = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t, known_levels=(0.01, 99.0))
    assert karras(5, schedule=flow)[0] == pytest.approx(0.99)
    assert flow.config()["known_levels"] == [0.01, 99.0]

    class Own(iia.Schedule):
        known_levels = (0.01, 348.0)

        def _alpha(self, t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def _sigma(self, t: Tensor) -> Tensor:
            return t

        def _t_of_lam(self, lam: Tensor) -> Tensor:
            return (-lam).exp()

    assert float(karras(5, schedule=Own())[0]) == pytest.approx(348.0)
    with pytest.raises(GridError, match=r"0\.01 to 348"):
        iia.plan.check_grid(Own(), [400.0, 1.0])


# ---- levels that are no times ----------------------------------------------------------------------------------------

OTHERS = [STABLE_DIFFUSION, iia.VE(), iia.VP(), iia.Cosine(), iia.FlowMatching()]
USES: dict[str, Callable[[iia.ProbabilityFlowODE, Tensor, Tensor], object]] = {
    "sample": lambda ode, x, grid: iia.sample(ode, x, grid, "ddim"),
    "odeint": lambda ode, x, grid: iia.odeint(ode, x, grid),
    "plan": lambda ode, x, grid: iia.get_solver("heun").plan(ode.schedule, grid),
    "teacher": lambda ode, x, grid: iia.Teacher.for_grid(ode, x, grid),
    "IIA": lambda ode, x, grid: iia.IIA("ddim").fit(ode, x, grid),
    "statistics": lambda ode, x, grid: iia.ModelStatistics.estimate(ode, x, grid),
}


@pytest.mark.parametrize("schedule", OTHERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("use", USES)
def test_a_grid_of_levels_on_a_schedule_of_other_times_is_an_error_that_shows_the_right_call(use, schedule) -> None:
    ode = iia.ProbabilityFlowODE(Witness(), schedule, "v")
    for grid in (karras(6), log_snr(3, 0.01, 0.9), align_your_steps(10), cut(karras(9), 0.9)):
        with pytest.raises(GridError, match=r"karras\(n, schedule=ode\.schedule\)"):
            USES[use](ode, normal(16, 6), grid)
    assert not ode.model.times


@given(n=st.integers(2, 60), family=st.sampled_from(sorted(GRIDS)))
@settings(max_examples=15)
def test_numbers_that_read_like_levels_are_no_timesteps(n: int, family: str) -> None:
    times = GRIDS[family](n).tolist()
    for given_times in (times, times[::-1]):
        with pytest.raises(GridError, match="noise levels"):
            iia.plan.check_grid(STABLE_DIFFUSION, given_times)


@given(
    n=st.integers(2, 120),
    family=st.sampled_from(sorted(GRIDS)),
    top=st.floats(0.1, 14.6),
    low=st.none() | st.floats(0.0292, 0.05),
)
@settings(max_examples=10)
def test_grids_of_timesteps_are_never_taken_for_levels(n: int, family: str, top: float, low: float | None) -> None:
    """By level in any family, with and without the data; by time; from any start; as lists of plain numbers."""
    grids = [GRIDS[family](n, low, top, schedule=STABLE_DIFFUSION, to_data=end) for end in (True, False)]
    start = float(grids[0][0])
    grids += [uniform(n, start, 0.0), torch.cat([uniform(n, start, 0.0), torch.tensor([-1.0])])]
    grids += [discrete(n, STABLE_DIFFUSION, spacing, to_data=False) for spacing in ("leading", "trailing", "linspace")]
    for grid in grids:
        assert iia.plan.check_grid(STABLE_DIFFUSION, grid.tolist()) == grid.tolist()


def test_a_grid_serves_every_schedule_on_which_its_times_mean_the_same_levels() -> None:
    grid = karras(6, 0.05, 40.0)
    for schedule in (iia.EDM(), STATED, iia.Schedule.from_functions(torch.ones_like, lambda t: t, t_noise=100.0)):
        assert iia.plan.check_grid(schedule, grid) == grid.tolist()
    flow = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t)
    assert iia.plan.check_grid(flow, karras(6, schedule=iia.FlowMatching()))
    with pytest.raises(GridError, match="another FlowMatching schedule"):
        iia.plan.check_grid(iia.VP(), karras(6, schedule=iia.FlowMatching()))


def test_levels_that_are_meant_as_times_are_passed_as_a_copy() -> None:
    levels = karras(6, 0.01, 0.9)  # Karras spacing of the times of a flow
    assert iia.plan.check_grid(iia.FlowMatching(), levels.clone()) == levels.tolist()


# ---- the size of the initial states ----------------------------------------------------------------------------------

STARTS = [
    (iia.EDM(), 80.0, "data"),
    (iia.VE(), 2500.0, "data"),
    (iia.EDM(), 700.0, "v"),
    (iia.EDM(), 14.6, "noise"),
]


@pytest.mark.parametrize(("schedule", "t", "prediction"), STARTS, ids=str)
def test_a_draw_of_randn_where_the_noise_is_large_gets_a_warning_on_every_path(schedule, t, prediction) -> None:
    ode = iia.ProbabilityFlowODE(Witness(), schedule, prediction)
    grid, x = karras(3, 0.1, schedule.noise_to_signal(t), schedule=schedule), normal(64, 3, dtype=torch.float32)
    for run in (
        lambda: iia.sample(ode, x, grid, "ddim"),
        lambda: iia.odeint(ode, x, grid, method="heun"),
        lambda: iia.sample(ode, x, grid[:-1], "dopri5", rtol=0.1, atol=0.1),
        lambda: iia.Teacher.for_grid(ode, x, grid),
        lambda: iia.reference.solve(ode, x, t, float(grid[-2]), rtol=0.1, atol=0.1),
        lambda: iia.IIA("ddim", guard=False).fit(ode, x, grid),
    ):
        with pytest.warns(StateSizeWarning, match="root mean square"):
            run()
    iia.sample(ode, x, grid, "ddim", check_finite=False)  # silent: nothing is read from the device


def test_noise_of_a_level_where_the_state_is_pure_noise_of_size_1_gets_a_warning() -> None:
    flow = iia.FlowMatching()
    ode, grid = iia.ProbabilityFlowODE(Witness(), flow, "velocity"), uniform(4, 1.0, 0.0)
    with pytest.warns(StateSizeWarning, match=r"are noise of standard deviation 1"):
        iia.sample(ode, 80 * normal(64, 3), grid, "ddim")


@given(
    scale=st.floats(1e-4, 1e4),
    level=st.floats(1e-3, 1e4),
    shape=st.sampled_from([(1, 1), (2, 3), (64, 3), (8, 3, 8, 8)]),
    seed=st.integers(0, 10**6),
)
def test_states_of_data_of_any_size_get_no_warning(scale, level, shape, seed) -> None:
    """An error in these tests, like every warning."""
    for schedule in (iia.EDM(), iia.VP(), iia.FlowMatching()):
        t = schedule.t_of_noise_to_signal(level)
        noise, data = (torch.randn(shape, generator=generator(seed + k), dtype=F64) for k in (0, 1))
        iia.plan.check_size(schedule, t, schedule.alpha(t) * scale * data + schedule.sigma(t) * noise)


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
