"""The directions of a window: over any base, exact on isotropic Gaussian data, with and without a constant."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import mixture, normal

import iia_ode as iia
from iia_ode.iia import IIA, Target
from iia_ode.teacher import Teacher

F64 = torch.float64
BASES = ["ddim", "heun", "ipndm3", "dpmpp_2m"]
SCHEDULES = [iia.EDM(), iia.VP(), iia.FlowMatching(), iia.Cosine()]


def isotropic(mean, variance, dimension=5):
    return iia.problems.Gaussian(
        torch.full((dimension,), mean, dtype=F64), torch.full((dimension,), variance, dtype=F64)
    )


@dataclass(frozen=True)
class ExactFlow(Target):
    """A target of the user's own: the flow of Gaussian data in closed form."""

    problem: iia.problems.Gaussian
    name = "exact flow"

    def aim(self, tracer, base, step):
        schedule = tracer.schedule
        return lambda samples, x: self.problem.flow(x, schedule, step.t, step.s)

    def options(self):
        return {"name": self.name}


def error(problem, schedule, grid, fit, x):
    exact = problem.flow(x, schedule, float(grid[0]), float(grid[-1]))
    return float((iia.sample(problem.ode(schedule), x, solver=fit) - exact).norm() / exact.norm())


@settings(max_examples=30)
@given(
    st.sampled_from(BASES),
    st.integers(1, 10),
    st.sampled_from(SCHEDULES),
    st.floats(-2.0, 2.0),
    st.floats(0.05, 4.0),
    st.integers(0, 2),
    st.booleans(),
)
def test_on_isotropic_gaussian_data_a_window_is_exact_at_any_number_of_steps(
    base, n, schedule, mean, variance, history, intercept
):
    problem, grid = isotropic(mean, variance), iia.grids.karras(n, schedule=schedule)
    x = problem.noisy(12, schedule, float(grid[0]), torch.Generator().manual_seed(0))
    unseen = problem.noisy(12, schedule, float(grid[0]), torch.Generator().manual_seed(1))
    method = IIA(base, "window", ExactFlow(problem), history=history, intercept=intercept, guard=False)
    fit = method.fit(problem.ode(schedule), x, grid)
    assert len(fit.reports) == n  # the step that lands on the data is fitted too
    assert error(problem, schedule, grid, fit, unseen) < 1e-9


@pytest.mark.parametrize(("base", "target"), [("ddim", "local"), ("heun", "trajectory")])
def test_a_window_is_exact_on_the_targets_of_the_library_as_far_as_those_are(base, target):
    problem, schedule, grid = isotropic(0.7, 0.4), iia.EDM(), iia.grids.karras(4)
    x = problem.noisy(12, schedule, 80.0, torch.Generator().manual_seed(0))
    ode = problem.ode(schedule)
    teacher = Teacher.solve(ode, x, 80.0, 0.0, steps=600, sigma_min=1e-5)
    options = {"target": target} if target == "trajectory" else {"target": iia.iia.Local(rtol=1e-12)}
    fit = IIA(base, "window", **options).fit(ode, x, grid, teacher=teacher)
    assert error(problem, schedule, grid, fit, x) < (1e-6 if target == "trajectory" else 1e-9)
    assert not fit.record.endpoint.fell_back


def test_a_window_leaves_no_direction_twice():
    """Heun's second stage is no grid point, but DDIM's evaluations are seen as its own and as an earlier step's start."""
    x = mixture().noisy(24, iia.EDM(), 80.0, torch.Generator().manual_seed(0))
    symbols = {
        base: [r.symbols for r in IIA(base, "window", guard=False).fit(mixture().ode(iia.EDM()), x, GRID).reports]
        for base in ("ddim", "heun")
    }
    assert symbols["ddim"] == [("z[i]", "D[i]"), *[("z[i]", "z[i-1]", "D[i]", "D[i-1]")] * 4]
    assert symbols["heun"][0] == ("z[i]", "D[i]", "D[i].1")
    assert symbols["heun"][1] == ("z[i]", "z[i-1]", "D[i]", "D[i].1", "D[i-1]", "D[i-1].1")


GRID = iia.grids.karras(5)


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.FlowMatching()], ids=lambda s: type(s).__name__)
def test_every_registered_solver_can_be_a_base_and_costs_the_same_fitted(schedule):
    grid = iia.grids.karras(3, schedule=schedule)
    x = mixture().noisy(16, schedule, float(grid[0]), torch.Generator().manual_seed(0))
    for base in iia.solver_names()[isinstance(schedule, iia.EDM) :: 2]:
        method = IIA(base, "window", guard=False, substeps=2)
        fit = method.fit(mixture().ode(schedule), x, grid)
        assert fit.nfe == method.base_solver.plan(schedule, grid).nfe, base
        assert all(r.after <= r.before and math.isfinite(sum(r.values)) for r in fit.reports), base
        assert bool(torch.isfinite(iia.sample(mixture().ode(schedule), x, solver=fit)).all()), base


def test_the_windows_zero_correction_is_the_base():
    x = mixture().noisy(24, iia.EDM(), 80.0, torch.Generator().manual_seed(0))
    method = IIA("unipc", "window", ridge=1e300, intercept=True, guard=False)
    fit = method.fit(mixture().ode(iia.EDM()), x, GRID)
    assert fit.plan.difference(method.base_solver.plan(iia.EDM(), GRID)) < 1e-13


# ---- the intercept ---------------------------------------------------------------------------------------------------


def intercepted(ode, x, **options):
    return IIA("ddim", "window", intercept=True, guard=False).fit(ode, x, GRID, **options)


def test_an_intercept_is_the_mean_residual_per_component_and_part_of_the_plan():
    x = mixture().noisy(24, iia.EDM(), 80.0, torch.Generator().manual_seed(0))
    ode = mixture().ode(iia.EDM())
    fit = intercepted(ode, x)
    constants = [ins.constant for ins in fit.plan.code if getattr(ins, "step", None) is not None]
    assert [c.shape for c in constants] == [(4,)] * 5
    path, base = iia.odeint(ode, x, method=fit), fit.plan.grid
    for k, (t, s) in enumerate(zip(base[:-1], base[1:], strict=True)):
        target = iia.sample(ode, path[k], torch.linspace(t, s, 4, dtype=F64), "ddim")
        assert float((target - path[k + 1]).mean(0).abs().max()) < 1e-12 * float(path[k].abs().max())


def test_an_intercept_does_not_depend_on_the_chunk_size_and_is_saved(tmp_path):
    x = mixture().noisy(23, iia.EDM(), 80.0, torch.Generator().manual_seed(0))
    ode = mixture().ode(iia.EDM())
    whole, parts = intercepted(ode, x), intercepted(ode, x, chunk_size=5)
    again = iia.load(parts.save(tmp_path / "fit.safetensors"))
    results = [iia.sample(ode, x, solver=fit) for fit in (whole, parts, again)]
    assert float((results[0] - results[1]).abs().max()) < 1e-9
    assert torch.equal(results[1], results[2])
    assert [r.corrections for r in again.reports] == [r.corrections for r in parts.reports]


def test_an_intercept_reaches_what_one_weight_for_all_components_cannot():
    """On VP the exact step moves the mean and the deviation from it by different factors."""
    mean = torch.tensor([3.0, -5.0, 0.5], dtype=F64)
    problem, schedule = iia.problems.Gaussian(mean, torch.full((3,), 0.5, dtype=F64)), iia.VP()
    grid = iia.grids.karras(5, schedule=schedule, to_data=False)
    x, unseen = (problem.noisy(16, schedule, float(grid[0]), torch.Generator().manual_seed(k)) for k in (0, 1))
    errors = []
    for intercept in (False, True):
        method = IIA("ddim", "biia-edm", ExactFlow(problem), history=0, intercept=intercept, guard=False)
        errors.append(error(problem, schedule, grid, method.fit(problem.ode(schedule), x, grid), unseen))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-11


def test_images_get_an_intercept_of_their_shape():
    ode = iia.ProbabilityFlowODE(lambda x, t: torch.tanh(x) + 0.1, iia.EDM(), state_shape=(2, 3))
    fit = intercepted(ode, 80 * normal(8, 2, 3))
    assert fit.plan.code[-1].constant.shape == (2, 3)


@pytest.mark.parametrize("base", BASES)
def test_float32_states_are_fitted_as_exactly_as_they_can_hold(base):
    problem, grid = isotropic(0.7, 0.4), iia.grids.karras(6)
    x = problem.noisy(32, iia.EDM(), 80.0, torch.Generator().manual_seed(0)).float()
    fit = IIA(base, "window", ExactFlow(problem), history=2, guard=False).fit(problem.ode(iia.EDM()), x, grid)
    assert error(problem, iia.EDM(), grid, fit, x) < 1e-4
