"""Evaluations at the ends of time: a model is evaluated at the data wherever its output determines the needed form there."""

import pytest
import torch
from support import F64, close, every_solver, normal
from torch import Tensor

import iia_ode as iia
from iia_ode.errors import GridError, ScheduleError

FLOW = iia.FlowMatching()
DATA = iia.problems.Gaussian(torch.full((4,), 0.7, dtype=F64), torch.tensor([0.3, 0.5, 1.0, 2.0], dtype=F64))
BETAS = torch.linspace(1e-4, 0.02, 100, dtype=F64)
WITHOUT_START_AT_THE_DATA = {"analytic_first_step"}


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity for data N(0.7, 0.3); at t = 0 it is -x."""
    a, s = 1 - t[:, None], t[:, None]
    return (s - a * 0.3) / (a * a * 0.3 + s * s) * (x - a * 0.7) - 0.7


class Exact(torch.nn.Module):
    """The exact model for DATA in a form, from the data and noise estimates, without a conversion."""

    def __init__(self, schedule: iia.Schedule, prediction: str) -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.scale = torch.nn.Parameter(torch.ones((), dtype=F64), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        noise = s * (x - a * DATA.mean) / (a * a * DATA.variance + s * s)
        data = DATA.denoise(x, a, s)
        v, slope = a * noise - s * data, self.schedule.alpha_prime(t) * data + self.schedule.sigma_prime(t) * noise
        return {"noise": noise, "v": v, "velocity": slope}[self.prediction]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_a_flow_model_is_evaluated_at_the_data() -> None:
    ode, x = iia.ProbabilityFlowODE(velocity, FLOW, "velocity"), normal(64, 4)
    close(ode(0.0, x), -x, atol=1e-14)
    close(ode.evaluate(x, 0.0).data, x)


@every_solver
def test_encoding_starts_at_the_data_and_converges_to_the_exact_flow(name: str) -> None:
    ode, x = DATA.ode(FLOW, "velocity"), DATA.sample(32, torch.Generator().manual_seed(0))
    if name in WITHOUT_START_AT_THE_DATA:
        with pytest.raises(GridError, match=r"starts at the data \(t = 0\): use 'heun' itself"):
            iia.sample(ode, x, iia.grids.uniform(8, 0.0, 1.0), name)
        return
    exact = DATA.flow(x, FLOW, 0.0, 1.0)
    coarse, fine = (rms(iia.sample(ode, x, iia.grids.uniform(n, 0.0, 1.0), name) - exact) for n in (16, 48))
    assert fine < 0.5 * coarse
    assert fine < 0.2


@pytest.mark.parametrize("name", ["heun", "rk4", "ddim", "dpmpp_2m", "unipc", "lms", "dopri5", "torchdiffeq:rk4"])
def test_encoding_and_decoding_on_fine_grids_return_the_data(name: str) -> None:
    ode, x = iia.ProbabilityFlowODE(velocity, FLOW, "velocity"), 0.7 + 0.3**0.5 * normal(16, 4)
    n = 4 if name == "dopri5" else 200
    noise = iia.sample(ode, x, iia.grids.uniform(n, 0.0, 1.0), name)
    assert rms(iia.sample(ode, noise, iia.grids.uniform(n, 1.0, 0.0), name) - x) < (0.03 if name == "ddim" else 2e-3)


@pytest.mark.parametrize("prediction", ["velocity", "v", "noise"])
@pytest.mark.parametrize("schedule", [FLOW, iia.EDM(), iia.Cosine()], ids=lambda s: type(s).__name__)
def test_every_output_that_determines_the_velocity_at_the_data_gives_one_result(
    schedule: iia.Schedule, prediction: str
) -> None:
    x, grid = DATA.sample(8, torch.Generator().manual_seed(0)), iia.grids.uniform(40, 0.0, 0.8)
    ends = grid[[0, -1]]
    exact, ode = (
        DATA.flow(x, schedule, 0.0, 0.8),
        iia.ProbabilityFlowODE(Exact(schedule, prediction), schedule, prediction),
    )
    for name in ("heun", "ddim", "torchdiffeq:rk4", "dopri5"):
        error = rms(iia.sample(ode, x, ends if name == "dopri5" else grid, name) - exact)
        assert error < (0.1 if name == "ddim" else 2e-3), name
    decoded = iia.sample(ode, exact, ends.flip(0), "dopri5")
    assert rms(decoded - x) < 1e-6


@pytest.mark.parametrize("schedule", [iia.VP(), iia.VE()], ids=lambda s: type(s).__name__)
def test_a_noise_model_is_encoded_from_the_data_by_solvers_on_the_noise(schedule: iia.Schedule) -> None:
    x, grid = DATA.sample(8, torch.Generator().manual_seed(0)), iia.grids.quadratic(60, 0.0, 0.5)
    ode = DATA.ode(schedule, "noise")
    for name in ("lms", "ddim", "dpmpp_2m"):
        assert rms(iia.sample(ode, x, grid, name) - DATA.flow(x, schedule, 0.0, 0.5)) < 0.1
    for name in ("heun", "dopri5"):  # dx/dt has an infinite factor there
        with pytest.raises(GridError, match=r"at the data \(t = 0, sigma = 0\), where noise prediction does not"):
            iia.sample(ode, x, grid, name)


@pytest.mark.parametrize("prediction", ["data", "score"])
@pytest.mark.parametrize("name", ["heun", "ddim", "dpmpp_2m", "unipc", "lms", "spndm", "dpm_solver_v3", "dopri5"])
def test_a_model_whose_output_leaves_the_velocity_open_at_the_data_is_refused_there(name: str, prediction: str) -> None:
    for schedule in (FLOW, iia.EDM()):
        ode, grid = iia.ProbabilityFlowODE(lambda x, t: x, schedule, prediction), iia.grids.uniform(4, 0.0, 0.5)
        with pytest.raises(
            GridError, match=rf"at the data \(t = 0, sigma = 0\), where {prediction} prediction does not"
        ):
            iia.sample(ode, normal(3, 4), grid, name)
    with pytest.raises(ScheduleError, match=r"at t = 0|at the data, t = 0"):
        iia.ProbabilityFlowODE(lambda x, t: x, FLOW, prediction)(0.0, normal(3, 4))


def test_the_data_is_no_timestep_of_a_discrete_model() -> None:
    schedule = iia.Discrete((1 - BETAS).cumprod(0))
    asked = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return 0.1 * x

    ode = iia.ProbabilityFlowODE(net, schedule, "velocity")
    with pytest.raises(GridError, match=r"t = -1.*no timestep.*start at timestep 0"):
        iia.sample(ode, normal(3, 4), torch.tensor([-1.0, 20.0, 40.0]), "ddim")
    with pytest.raises(GridError, match=r"no timestep"):
        iia.sample(ode, normal(3, 4), torch.tensor([40.0, 20.0, -1.0]), "dopri5")
    assert not asked
    iia.sample(ode, normal(3, 4), torch.tensor([0.0, 20.0, 40.0]), "ddim")
    assert asked == [0.0, 20.0]


def test_a_noise_model_is_not_evaluated_where_there_is_no_data() -> None:
    ode = iia.ProbabilityFlowODE(lambda x, t: x, FLOW, "noise")
    for name in ("heun", "ddim"):
        with pytest.raises(ScheduleError, match=r"noise does not determine .* at t = 1, where alpha = 0"):
            iia.sample(ode, normal(3, 4), iia.grids.uniform(4, 1.0, 0.0), name)


class Naive(iia.Solver):
    """Heun's method, which evaluates the end of every step."""

    order = 2

    def step(self, ode, x, t, s, past):
        first = ode.velocity(x, t)
        return x + (s - t) / 2 * (first + ode.velocity(x + (s - t) * first, s))


class DividesBySigma(iia.Solver):
    """Euler's method, written in a way that has no step from the data."""

    order = 1

    def step(self, ode, x, t, s, past):
        ratio = ode.schedule.sigma(s) / ode.schedule.sigma(t)
        return ratio * x + (ode.schedule.alpha(s) - ode.schedule.alpha(t) * ratio) * ode.data(x, t)


def test_a_solver_of_ones_own_may_evaluate_a_flow_model_at_the_data() -> None:
    x, grid = DATA.sample(8, torch.Generator().manual_seed(0)), iia.grids.uniform(40, 0.0, 1.0)
    noise = iia.sample(DATA.ode(FLOW, "velocity"), x, grid, Naive())
    assert rms(noise - DATA.flow(x, FLOW, 0.0, 1.0)) < 2e-3
    assert rms(iia.sample(DATA.ode(FLOW, "velocity"), noise, grid.flip(0), Naive()) - x) < 2e-3
    with pytest.raises(GridError, match=r"ode\.is_data\(s\)"):
        iia.sample(DATA.ode(FLOW), noise, grid.flip(0), Naive())


def test_a_solver_without_a_step_from_the_data_says_so() -> None:
    with pytest.raises(GridError, match=r"DividesBySigma has no step from the data \(t = 0, sigma = 0\).*small sigma"):
        DividesBySigma().plan(FLOW, iia.grids.uniform(4, 0.0, 1.0))


def test_a_plan_from_the_data_is_kept_in_its_file(tmp_path) -> None:
    plan = iia.get_solver("dpmpp_2m").plan(FLOW, iia.grids.uniform(6, 0.0, 1.0))
    read = iia.load(plan.save(tmp_path / "plan.safetensors"))
    assert read == plan
    assert read.equivalent(plan)
    x = DATA.sample(8, torch.Generator().manual_seed(0))
    close(read.run(DATA.ode(FLOW, "velocity"), x), plan.run(DATA.ode(FLOW, "velocity"), x))


@pytest.mark.parametrize("name", ["heun", "ddim", "dpmpp_2m"])
def test_the_exact_response_of_a_plan_from_the_data_is_that_of_its_run(name: str) -> None:
    plan = iia.get_solver(name).plan(FLOW, iia.grids.uniform(6, 0.0, 0.9))
    x = DATA.sample(8, torch.Generator().manual_seed(0))
    answer = plan.on_gaussian(DATA.mean, DATA.variance)
    close(answer(x), plan.run(DATA.ode(FLOW, "velocity"), x), atol=1e-12)
    close(answer.exact_gain * x + answer.exact_offset, DATA.flow(x, FLOW, 0.0, 0.9), atol=1e-12)


def test_references_teachers_and_fits_start_at_the_data() -> None:
    ode, x = DATA.ode(FLOW, "velocity"), DATA.sample(32, torch.Generator().manual_seed(0))
    exact, between = DATA.flow(x, FLOW, 0.0, 0.8), DATA.flow(x, FLOW, 0.0, 0.3)
    assert rms(iia.reference.solve(ode, x, 0.0, 0.8) - exact) < 1e-9
    path = iia.reference.trajectory(ode, x, 0.0, 0.8)
    assert rms(path.final - exact) < 1e-9
    teacher = iia.Teacher.solve(ode, x, 0.0, 0.8)
    for found, error in ((path, 1e-5), (teacher.at, 1e-4)):
        assert rms(found(0.0) - x) < 1e-12
        assert rms(found(1e-4) - DATA.flow(x, FLOW, 0.0, 1e-4)) < 1e-6
        assert rms(found(0.3) - between) < error
    assert rms(teacher.final - exact) < 1e-4
    grid = iia.grids.uniform(5, 0.0, 0.8)
    for method in (iia.IIA("heun", terms="window", target="trajectory"), iia.preset("iia-edm")):
        fit = method.fit(ode, x, grid)
        assert rms(iia.sample(ode, x, solver=fit) - exact) < 0.3 * rms(iia.sample(ode, x, grid, "heun") - exact)
    with pytest.raises(GridError, match="where data prediction does not determine the noise"):
        iia.Teacher.solve(DATA.ode(FLOW), x, 0.0, 0.8)
