"""Solvers side by side with the schedulers of the installed diffusers package: same model, same grid, same numbers.

`iia_ode.diffusers` says which solver is which scheduler, on which schedule and on which grid. LMS, Euler, Heun and KDPM2 keep
x / alpha as their state. PNDM and IPNDM combine other outputs than noise otherwise than their counterparts (tests below).

The model is evaluated at the scheduler's levels, and the grid is what the scheduler passes through. Every pair runs twice:
as installed, where tables and weights are float32, and the state of some (see `float32_rounding`); and with the same code in
double precision, where every digit belongs to the method. Where a scheduler does otherwise than its counterpart, a test
below says what it does.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import pytest
import torch
from support import F64, close, generator, mixture
from torch import Tensor

import iia_ode as iia
from iia_ode.diffusers import grid_of, prediction_of, schedule_of, solver_of
from iia_ode.solvers import OrderRamp, Solver, get_solver

diffusers = pytest.importorskip("diffusers", reason="needs an extra: pip install 'iia-ode[diffusers]'")

# NumPy on what torch's tensors answer when diffusers hands them to it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

STATE_IS_X_OVER_ALPHA = {"LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete"}
FLOWS = {"FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMapEulerDiscrete", "LTXEulerAncestralRF", "MiniMaxH3"}


@dataclass(frozen=True)
class Case:
    """A scheduler (the name of its class without the last word), its configuration, and how it is run."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 10
    step_options: dict[str, Any] = field(default_factory=dict)
    timestep_options: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    """The timestep that it starts from, as in image-to-image."""

    def __str__(self) -> str:
        options = self.config | self.step_options | self.timestep_options
        return "-".join([self.name, *(f"{k}={v}" for k, v in options.items()), f"{self.first}..{self.steps}"])

    @property
    def is_flow(self) -> bool:
        return self.name in FLOWS or bool(self.config.get("use_flow_sigmas"))

    @property
    def order(self) -> int:
        """How many outputs its weights join by divided differences."""
        if self.name == "LMSDiscrete":
            return int(self.step_options.get("order", 4))
        solvers = ("DPMSolver", "EDMDPMSolver", "UniPC", "DEIS")
        return int(self.config.get("solver_order", 2)) if self.name.startswith(solvers) else 1

    def make(self) -> Any:
        """The scheduler, ready to run."""
        kind = scheduler_class(self.name)
        config = ({"clip_sample": False} if "DDIM" in self.name else {}) | self.config
        if config.get("algorithm_type") == "dpmsolver":
            with pytest.warns(FutureWarning, match="algorithm_type `?dpmsolver`? is deprecated"):
                scheduler = kind(**config)
        else:
            scheduler = kind(**config)
        scheduler.set_timesteps(self.steps, **self.timestep_options)
        if self.first:
            scheduler.set_begin_index(self.first)
        return scheduler


def scheduler_class(name: str) -> Any:
    kind = getattr(diffusers, f"{name}Scheduler", None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}Scheduler")
    return kind


def counterpart(case: Case, scheduler: Any) -> Solver:
    """The solver of this library that does what the scheduler does, with the options of its steps."""
    if case.name == "LMSDiscrete":
        return get_solver("lms", max_order=case.order)
    if case.name == "PNDM" and scheduler.config.prediction_type != "epsilon":
        return get_solver("plms")
    return solver_of(scheduler)


def levels_at_calls(case: Case, scheduler: Any) -> Tensor:
    """sigma/alpha (of flows sigma) at each call of the scheduler."""
    calls = len(scheduler.timesteps)
    if case.name == "IPNDM":
        sigma = scheduler.betas.double()
        return (sigma / (1 - sigma**2).sqrt())[:calls]
    if hasattr(scheduler, "sigmas"):
        at_calls = scheduler.sigmas.double()[:calls].clone()
        if case.name == "KDPM2Discrete":  # every second call stands between two levels
            at_calls[1::2] = scheduler.sigmas_interpol[1:calls:2]
        return at_calls
    table = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return ((1 - table) / table).sqrt()


def times_of(case: Case, schedule: iia.Schedule, values: Tensor) -> Tensor:
    """Their times; within the schedule, since the float32 level of an end may lie a little beyond it."""
    if case.name == "MiniMaxH3":
        return 1 - values
    if case.name.startswith("EDM") or case.is_flow:
        return values
    ends = sorted((schedule.t_data, schedule.t_noise))
    times = [schedule.t_noise if r == math.inf else schedule.t_of_noise_to_signal(r) for r in values.tolist()]
    return torch.tensor(times, dtype=F64).clamp(*ends)


class Pair:
    """A scheduler and all that its counterpart needs to do the same."""

    def __init__(self, case: Case) -> None:
        self.case, self.scheduler = case, case.make()
        self.schedule = schedule_of(self.scheduler)
        self.times = times_of(case, self.schedule, levels_at_calls(case, self.scheduler))[case.first :]
        self.grid = grid_of(self.scheduler)[case.first :]
        self.ode = mixture().ode(self.schedule, prediction_of(self.scheduler))
        self.x = mixture().noisy(6, self.schedule, float(self.grid[0]), generator())
        self.plan = counterpart(case, self.scheduler).plan(self.schedule, self.grid)

    @cached_property
    def ours(self) -> Tensor:
        return iia.sample(self.ode, self.x, solver=self.plan)

    @cached_property
    def theirs(self) -> list[Tensor]:
        """The states after each call, by the loop of a diffusers pipeline."""
        case, scheduler = self.case, self.scheduler
        x, states = self.x, []
        if case.name in STATE_IS_X_OVER_ALPHA:
            x = x / self.schedule.alpha(float(self.grid[0]))
        for timestep, t in zip(scheduler.timesteps[case.first :], self.times.tolist(), strict=True):
            y = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(self.model(y, t), timestep, x, **case.step_options).prev_sample
            states.append(x)
        return states

    @property
    def final(self) -> Tensor:
        """Their final state, as a state of the schedule."""
        over_alpha = self.case.name in STATE_IS_X_OVER_ALPHA
        return self.theirs[-1] * (self.schedule.alpha(float(self.grid[-1])) if over_alpha else 1.0)

    def model(self, x: Tensor, t: float) -> Tensor:
        """What a pipeline calls: the closed-form model, in the form that the scheduler takes."""
        if not self.case.name.startswith("EDM"):
            return self.ode.output(x, t)
        size = math.hypot(t, 0.5)  # F of Karras et al. [2022, eq. 7] with sigma_data = 1/2, of the state over `size`
        return (self.ode.data(size * x, t) - 0.25 / size * x) * size / (0.5 * t)

    def gap(self) -> float:
        """Largest difference of the final states, relative to their size."""
        return float((self.final - self.ours).abs().max()) / max(1.0, float(self.ours.abs().max()))

    def times_of_timesteps(self) -> Tensor | None:
        """The times of what the pipeline tells its model, where the schedule here has them."""
        case, timesteps = self.case, self.scheduler.timesteps[self.case.first :].double()
        if case.name.startswith("EDM"):
            return (4 * timesteps).exp()
        if case.name in FLOWS:
            return timesteps if case.name == "MiniMaxH3" else timesteps / 1000
        if case.name == "IPNDM":
            return timesteps
        rounded = any(key.startswith("use_") for key in case.config)
        on_table = isinstance(self.schedule, iia.Discrete) and bool((timesteps == timesteps.round()).all())
        return timesteps if on_table and not rounded else None

    def float32_rounding(self) -> float:
        """What float32 weights, and a float32 state, may do to a final state of size 1.

        An interval makes some 16 roundings (weights, products, sums), each 2^-24 of a term no larger than the state, and
        the flow contracts, so that at most they add up. Weights of order p are divided differences of numbers of size 1,
        which are rounded themselves: p - 1 divisions by a step in log-SNR.
        """
        lam = self.schedule.lam(self.grid)
        shortest = float(lam[lam.isfinite()].diff().abs().min())
        return 16 * (len(self.grid) - 1) * 2**-24 * max(1.0, shortest ** (1 - self.case.order))


DOUBLE = 1e-11
"""What double precision leaves: 2^-53 in place of 2^-24 above, and the way from a level to a time and back, which at
alpha = 2^-12, where a rescaled table ends, costs 12 bits."""


class _Doubled:
    """A module whose float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture
def double_precision(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers' code as it is, with float64 wherever it says float32."""
    scheduler_class(case.name)  # loads its module
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.schedulers.scheduling_"):
            for library in {"torch", "np"} & set(vars(module)):
                monkeypatch.setattr(module, library, _Doubled(getattr(module, library)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def variants(name: str, *configs: dict[str, Any], **options: Any) -> list[Case]:
    return [Case(name, config, **options) for config in configs or ({},)]


KARRAS, EXPONENTIAL, BETA = ({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
PLMS, PRK = {"skip_prk_steps": True}, {"skip_prk_steps": False}

DPM_SOLVERS = [
    {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind} | end
    for algorithm in ("dpmsolver++", "dpmsolver")
    for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
    for end in ({}, TO_SIGMA_MIN)
    if algorithm == "dpmsolver++" or end  # dpmsolver refuses to go to 0
]
UNIPCS = [
    {"solver_order": order, "solver_type": kind, "predict_x0": on_data} | end
    for order in (1, 2, 3)
    for kind in ("bh1", "bh2")
    for on_data in (True, False)
    for end in ({}, TO_SIGMA_MIN)
    if end or (kind == "bh2" and on_data)  # to 0, bh1 gives no number (below), nor does noise
]

CASES = [
    *variants(
        "DDIM",
        {},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction"},
        ZERO_SNR,
    ),
    *variants("DDIMParallel"),
    *variants("CogVideoXDDIM", {}, ZERO_SNR),
    *variants("TCD", step_options={"eta": 0.0}),
    *variants("PNDM", *(kind | {"set_alpha_to_one": True} for kind in (PLMS, PRK))),
    *variants("PNDM", *(kind | {"steps_offset": 1} for kind in (PLMS, PRK)), steps=20),
    *variants("IPNDM", first=1),
    *variants("LMSDiscrete", {}, BETA, {"prediction_type": "v_prediction", "timestep_spacing": "leading"}),
    *(Case("LMSDiscrete", step_options={"order": order}) for order in (1, 2, 3)),
    *variants("EulerDiscrete", {}, KARRAS, EXPONENTIAL, BETA, TO_SIGMA_MIN | LEADING, ZERO_SNR),
    *variants("EulerDiscrete", steps=6),  # between integer timesteps
    *variants("HeunDiscrete", {}, KARRAS, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    *variants("KDPM2Discrete", {}, EXPONENTIAL | {"prediction_type": "v_prediction"}),
    *variants("DPMSolverMultistep", *DPM_SOLVERS),
    *variants("DPMSolverMultistep", KARRAS, EXPONENTIAL, BETA, {"use_lu_lambdas": True}, FLOW),
    *variants("DPMSolverMultistep", {"solver_order": 3, "timestep_spacing": "leading"}, TO_SIGMA_MIN, steps=20),
    *variants("DPMSolverMultistep", TO_SIGMA_MIN | {"solver_order": 3, "euler_at_final": True}, steps=20),
    *variants("DPMSolverMultistep", TO_SIGMA_MIN | {"solver_order": 3, "lower_order_final": False}),
    *variants("DPMSolverMultistep", {"solver_order": 3, "prediction_type": "v_prediction"}, first=4),
    *variants("DPMSolverSinglestep", *({"solver_order": k, "lower_order_final": True} for k in (1, 2, 3))),
    *variants("DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": True} | TO_SIGMA_MIN, steps=11),
    *variants("DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": True} | KARRAS, steps=12),
    *variants("DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": False} | TO_SIGMA_MIN, steps=12),
    *variants("DPMSolverSinglestep", {"lower_order_final": True} | FLOW, steps=11),
    *variants("UniPCMultistep", *UNIPCS, {"solver_order": 4}, KARRAS, FLOW, {"disable_corrector": list(range(10))}),
    *variants("UniPCMultistep", TO_SIGMA_MIN | {"solver_order": 3, "lower_order_final": False}),
    *(Case("DEISMultistep", {"solver_order": order}, steps) for order in (1, 2, 3) for steps in (10, 20)),
    *variants("EDMEuler", {}, {"sigma_schedule": "exponential"}),
    *variants("EDMDPMSolverMultistep", {}, {"solver_type": "heun"}, {"solver_order": 3}),
    *variants("FlowMatchEulerDiscrete", {"shift": 3.0}, KARRAS, {"shift_terminal": 0.1}, {"invert_sigmas": True}),
    *variants("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, timestep_options={"mu": 0.8}),
    *variants("FlowMatchHeunDiscrete", {}, {"shift": 3.0}),
    *variants("FlowMapEulerDiscrete", {"shift": 3.0}),
    *variants("LTXEulerAncestralRF", {"eta": 0.0}),
    *variants("MiniMaxH3"),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_the_installed_scheduler_gives_the_same_numbers(case: Case) -> None:
    pair = Pair(case)
    assert pair.gap() <= pair.float32_rounding()


@every_case
@pytest.mark.usefixtures("double_precision")
def test_its_code_in_double_precision_gives_the_same_numbers(case: Case) -> None:
    pair = Pair(case)
    assert pair.gap() <= DOUBLE
    close(torch.tensor(pair.plan.evaluation_times, dtype=F64), pair.times, rtol=1e-9, atol=1e-9)
    timesteps = pair.times_of_timesteps()
    if timesteps is not None:
        close(timesteps, pair.times, rtol=1e-9, atol=1e-7)


# ---- what the schedulers do otherwise ----------------------------------------------------------------------------------


def chain(pair: Pair, solver: str, intervals: list[tuple[float, float]]) -> Tensor:
    """Single steps over intervals that need not join."""
    x = pair.x
    for interval in intervals:
        x = iia.sample(pair.ode, x, torch.tensor(interval, dtype=F64), solver)
    return x


@pytest.mark.parametrize("case", [Case("DDIM", {"timestep_spacing": "linspace"})], ids=str)
@pytest.mark.usefixtures("double_precision")
def test_ddim_lands_a_tenth_of_the_timesteps_further_wherever_its_next_timestep_is(case: Case) -> None:
    pair = Pair(case)
    timesteps = pair.scheduler.timesteps.tolist()
    assert timesteps == list(range(999, -1, -111))
    close(pair.final, chain(pair, "ddim", [(t, max(t - 1000 // 10, -1)) for t in timesteps]), atol=DOUBLE)
    assert pair.gap() > 1e-2  # what it would be on its grid


@pytest.mark.parametrize("case", [Case("DDIMInverse", {"set_alpha_to_one": False})], ids=str)
@pytest.mark.usefixtures("double_precision")
def test_the_inverse_of_ddim_calls_the_model_where_the_interval_ends(case: Case) -> None:
    scheduler = case.make()
    schedule = iia.Discrete(scheduler.alphas_cumprod)
    ode = mixture().ode(schedule, "noise")
    x = y = mixture().noisy(6, schedule, 0, generator())
    assert scheduler.timesteps.tolist() == list(range(0, 1000, 100))
    for timestep in scheduler.timesteps:
        start = max(int(timestep) - 100, 0)
        y = scheduler.step(ode.output(y, start), timestep, y).prev_sample
    close(y, iia.sample(ode, x, scheduler.timesteps, "ddim"), atol=DOUBLE)


@pytest.mark.parametrize("case", [Case("DPMSolverMultistepInverse", {"solver_order": k}) for k in (2, 3)], ids=str)
@pytest.mark.usefixtures("double_precision")
def test_the_inverse_of_dpm_solver_is_the_same_solver_on_a_grid_towards_the_noise(case: Case) -> None:
    pair = Pair(case)
    assert pair.times.tolist() == sorted(pair.times.tolist())
    assert pair.gap() <= DOUBLE


@pytest.mark.parametrize("case", [Case("IPNDM")], ids=str)
@pytest.mark.usefixtures("double_precision")
def test_the_first_step_of_ipndm_loses_the_data_estimate(case: Case) -> None:
    pair = Pair(case)
    first, second = pair.grid[:2].tolist()
    assert pair.schedule.alpha(first) == 0
    whole = chain(pair, "ipndm", [(first, second)])
    close(pair.theirs[0], whole - pair.schedule.alpha(second) * pair.ode.data(pair.x, first), atol=DOUBLE)


@pytest.mark.parametrize("case", [Case("PNDM", PLMS | {"prediction_type": "v_prediction", "steps_offset": 1})], ids=str)
@pytest.mark.usefixtures("double_precision")
def test_pndm_combines_v_where_plms_combines_noise(case: Case) -> None:
    pair = Pair(case)
    assert pair.gap() > 1e-2
    close(pair.theirs[0], chain(pair, "ddim", [tuple(pair.grid[:2].tolist())]), atol=DOUBLE)


RISING = (1, 2, 3, 3, 3, 3, 3, 3, 2)


@pytest.mark.parametrize(
    ("case", "solver"),
    [
        (Case("DEISMultistep", KARRAS | {"solver_order": 3}), OrderRamp(get_solver("deis_lab3"), RISING)),
        (Case("EulerDiscrete", TO_SIGMA_MIN), get_solver("ddim")),
        (Case("EDMEuler", TO_SIGMA_MIN), get_solver("euler")),
        (Case("PNDM", PLMS), get_solver("plms")),
        (Case("PNDM", PRK), get_solver("fpndm")),
    ],
    ids=lambda value: getattr(value, "label", None) or str(value),
)
@pytest.mark.usefixtures("double_precision")
def test_a_last_level_that_repeats_the_one_before_is_an_evaluation_for_nothing(case: Case, solver: Solver) -> None:
    pair = Pair(case)
    plan = solver.plan(pair.schedule, pair.grid)
    assert plan.nfe == len(pair.times) - 1
    close(pair.theirs[-1], pair.theirs[-2], atol=DOUBLE)
    close(pair.final, iia.sample(pair.ode, pair.x, solver=plan), atol=DOUBLE)


@pytest.mark.parametrize("case", [Case("UniPCMultistep", {"solver_type": "bh1"})], ids=str)
def test_unipc_bh1_to_sigma_0_is_not_a_number(case: Case) -> None:
    pair = Pair(case)
    assert bool(pair.final.isnan().all())
    assert bool(pair.ours.isfinite().all())


@pytest.mark.parametrize(
    ("case", "lowest", "highest"),
    [
        *((Case(f"{name}Multistep", KARRAS), -0.6, 0.6) for name in ("DPMSolver", "UniPC", "DEIS")),
        (Case("DPMSolverSinglestep", KARRAS | {"lower_order_final": True}), -0.6, 0.6),
        *((Case("DPMSolverMultistep", kind), -1.0, 0.1) for kind in (EXPONENTIAL, BETA, FLOW)),
    ],
    ids=str,
)
def test_models_are_told_whole_timesteps_where_the_levels_are_between(
    case: Case, lowest: float, highest: float
) -> None:
    pair = Pair(case)
    timesteps = pair.scheduler.timesteps
    assert not timesteps.is_floating_point()
    off = timesteps - pair.times * (1000 if case.is_flow else 1)
    assert lowest < float(off.min()) < float(off.max()) < highest
    assert float(off.abs().max()) > 0.3


@pytest.mark.parametrize(
    ("case", "solver"), [(Case("EulerDiscrete"), "euler"), (Case("HeunDiscrete"), "heun")], ids=str
)
@pytest.mark.usefixtures("double_precision")
def test_euler_and_heun_are_those_of_edm_on_x_over_alpha(case: Case, solver: str) -> None:
    pair = Pair(case)
    sigmas = pair.scheduler.sigmas.double().unique_consecutive()
    x = pair.x / pair.schedule.alpha(float(pair.grid[0]))
    close(pair.final, iia.sample(mixture().ode(iia.EDM()), x, sigmas, solver), atol=DOUBLE)
