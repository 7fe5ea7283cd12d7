"""The teacher: accurate trajectories, made once, used for every grid, saved and checked."""

from itertools import pairwise

import pytest
import torch
from support import mixture, normal

import iia_ode as iia
from iia_ode.iia import IIA
from iia_ode.teacher import Teacher, TeacherOptions

F64 = torch.float64
TIMES = [60.0, 10.0, 2.0, 0.5, 0.1, 0.01]


def states(n=6, seed=0, schedule=None):
    schedule = schedule or iia.EDM()
    return mixture().noisy(n, schedule, schedule.t_of_noise_to_signal(80.0), torch.Generator().manual_seed(seed))


def ode(schedule=None):
    return mixture().ode(schedule or iia.EDM())


@pytest.fixture(scope="module")
def fine():
    return Teacher.solve(ode(), states(), 80.0, 0.0, steps=600, sigma_min=0.002)


def test_with_many_steps_a_teacher_is_the_reference(fine):
    exact = iia.reference.solve(ode(), states(), 80.0, 0.0, sigma_min=0.002)
    assert float((fine.final - exact).abs().max()) < 1e-7
    for t in TIMES[::2]:
        there = iia.reference.solve(ode(), states(), 80.0, t)
        assert float((fine.at(t) - there).abs().max()) < 1e-7 * float(there.abs().max())


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.FlowMatching(), iia.Cosine()], ids=lambda s: type(s).__name__)
def test_sixty_steps_are_far_more_accurate_than_any_solver_with_few(schedule):
    x, start = states(schedule=schedule), schedule.t_of_noise_to_signal(80.0)
    teacher = Teacher.solve(ode(schedule), x, start, schedule.t_data, sigma_min=0.002)
    exact = iia.reference.solve(ode(schedule), x, start, schedule.t_data, sigma_min=0.002)
    student = iia.sample(ode(schedule), x, iia.grids.karras(10, schedule=schedule), "ipndm3")
    assert float((teacher.final - exact).norm()) < 0.02 * float((student - exact).norm())
    few = teacher.sample_evaluations - 61 * 6
    assert few == 2 * (teacher.evaluations - 61)  # the size of the data and the error take two samples


def test_sixty_steps_are_accurate_in_between_too(fine):
    teacher = Teacher.solve(ode(), states(), 80.0, 0.0, steps=60)
    for t in TIMES:
        size = float(fine.at(t).square().mean().sqrt())
        assert float((teacher.at(t) - fine.at(t)).square().mean().sqrt()) < 3e-3 * size


def test_a_teacher_may_start_at_pure_noise_and_run_towards_the_noise():
    flow = iia.FlowMatching()
    x = normal(6, 4)
    teacher = Teacher.solve(ode(flow), x, 1.0, 0.0)
    exact = iia.reference.solve(ode(flow), x, 1.0, 0.0, sigma_min=0.002)
    assert float((teacher.final - exact).norm() / exact.norm()) < 0.02
    back = Teacher.solve(ode(), iia.reference.solve(ode(), states(), 80.0, 0.01), 0.01, 80.0)
    assert float((back.final - states()).norm() / states().norm()) < 1e-3


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.VP(), iia.FlowMatching()], ids=lambda s: type(s).__name__)
def test_a_teacher_for_a_grid_covers_it_and_takes_a_low_last_level_for_the_data(schedule):
    for lowest, level in ((0.1, None), (1e-4, 1e-4)):
        grid = iia.grids.karras(4, lowest, 80.0, schedule=schedule)
        teacher = Teacher.for_grid(ode(schedule), states(schedule=schedule), grid, steps=10)
        assert (teacher.t_start, teacher.t_end) == (float(grid[0]), float(grid[-1]))
        assert teacher.sigma_min == pytest.approx(level or 0.004 * teacher.record.data_size, rel=1e-6)
        assert teacher.record.options.steps == 10
        teacher.at(float(grid[2]))


def test_a_teacher_is_the_same_in_chunks_and_gives_some_samples_when_asked(fine):
    whole, parts = (Teacher.solve(ode(), states(), 80.0, 0.0, steps=30, chunk_size=c) for c in (None, 5))
    assert torch.equal(whole.final, parts.final)
    assert parts.evaluations == whole.evaluations + 33  # the leap takes three
    assert parts.sample_evaluations == whole.sample_evaluations
    assert parts.record.error == whole.record.error
    for index in (slice(2, 5), torch.tensor([5, 0, 5])):
        assert torch.equal(whole.at(1.0, index), whole.at(1.0)[index])
        part = whole.subset(index)
        assert torch.equal(part.final, whole.final[index])
        assert torch.equal(part.at(1.0), whole.at(1.0)[index])
        part.check(ode(), states()[index])


def test_a_teacher_rests_on_the_host_in_the_dtype_of_the_states():
    teacher = Teacher.solve(ode(), states().float(), 80.0, 0.0, steps=20)
    for tensor in (teacher.initial, teacher.final, teacher.at(1.0), teacher.path.states, teacher.path.slopes):
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")


def test_one_teacher_serves_every_grid_and_costs_a_fit_nothing_more(fine):
    for n in (3, 6):
        grid = iia.grids.karras(n)
        fit = IIA("ddim", "window", "trajectory", guard=False).fit(ode(), states(), grid, teacher=fine)
        assert fit.record.evaluations == n
        assert fit.record.teacher == fine.record.options == TeacherOptions("expab4", 0.002, 600)
    own = IIA("ddim", "window", "trajectory", guard=False).fit(ode(), states(), iia.grids.karras(3))
    assert own.record.evaluations == 3 + Teacher.for_grid(ode(), states(), iia.grids.karras(3)).evaluations


def test_a_trajectory_target_aims_at_the_teachers_states(fine):
    fit = IIA("ddim", "window", "trajectory", guard=False).fit(ode(), states(), iia.grids.karras(4), teacher=fine)
    path = iia.odeint(ode(), states(), method=fit)
    for r in fit.reports:
        gap = fine.at(r.s) - path[r.index + 1]
        assert r.after == pytest.approx(float(gap.square().mean().sqrt()), rel=1e-6, abs=1e-10)


def test_a_trajectory_target_repairs_what_earlier_steps_did_wrong():
    x, unseen, grid = states(200), states(64, seed=1), iia.grids.karras(8)
    exact = iia.reference.solve(ode(), unseen, 80.0, 0.0)
    errors = {
        target: float(
            (iia.sample(ode(), unseen, solver=IIA("ddim", "window", target).fit(ode(), x, grid)) - exact).norm()
        )
        for target in ("local", "trajectory")
    }
    assert errors["trajectory"] < 0.7 * errors["local"]


def test_a_saved_teacher_comes_back_bit_equal(fine, tmp_path):
    again = iia.load(fine.save(tmp_path / "teacher.safetensors"))
    assert torch.equal(again.at(3.0), fine.at(3.0))
    assert torch.equal(again.final, fine.final)
    assert again.record == fine.record
    again.check(ode(), states())
    with pytest.raises(iia.errors.MismatchError, match="was made for schedule EDM"):
        iia.load(tmp_path / "teacher.safetensors", schedule=iia.VP())


def test_a_teacher_of_another_ode_or_other_states_is_refused(fine):
    method, grid = IIA("ddim", target="trajectory"), iia.grids.karras(3)
    with pytest.raises(iia.errors.MismatchError, match="starts from other states"):
        method.fit(ode(), states(seed=1), grid, teacher=fine)
    with pytest.raises(iia.errors.MismatchError, match="starts from other states"):
        method.fit(ode(), states(5), grid, teacher=fine)
    with pytest.raises(
        iia.errors.MismatchError, match=r"schedule .*Make one for this ODE, or use the ODE it was made for"
    ):
        fine.check(ode(iia.VP()), states())
    with pytest.raises(iia.errors.MismatchError, match=r"starts at t = 80 and the grid at 40"):
        method.fit(ode(), states(), iia.grids.karras(3, sigma_max=40.0), teacher=fine)
    higher = Teacher.solve(ode(), states(), 80.0, 0.5, steps=10)
    with pytest.raises(iia.errors.GridError, match="outside the trajectory"):
        method.fit(ode(), states(), grid, teacher=higher)
    other = iia.problems.Mixture(torch.ones(2, dtype=F64), normal(2, 4), torch.ones(2, 4, dtype=F64))
    with pytest.warns(iia.errors.FingerprintWarning, match="the teacher was made on a model"):
        fine.check(other.ode(iia.EDM()), states())


def test_a_teacher_under_other_conditions_or_another_guidance_scale_is_refused():
    def conditioned(c, scale=2.0):
        null = {"c": torch.zeros(1, dtype=F64)}
        model = lambda x, t, c: torch.tanh(x) + c[:, None]  # noqa: E731
        return iia.ProbabilityFlowODE(model, iia.EDM(), conditioning={"c": c}, unconditional=null, guidance_scale=scale)

    c, x = torch.arange(4.0, dtype=F64), 80 * normal(4, 3)
    teacher = Teacher.solve(conditioned(c), x, 80.0, 0.0, steps=10)
    teacher.check(conditioned(c), x)
    with pytest.raises(iia.errors.MismatchError, match="other conditions"):
        teacher.check(conditioned(c + 1), x)
    with pytest.raises(iia.errors.MismatchError, match="guidance_scale"):
        teacher.check(conditioned(c, 3.0), x)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"steps": 1}, iia.errors.InputError, "steps must be a whole number, at least 2"),
        ({"steps": 2.5}, iia.errors.InputError, "steps must be a whole number"),
        ({"chunk_size": 0}, iia.errors.InputError, "chunk_size"),
        ({"sigma_min": 90.0}, iia.errors.GridError, "sigma_min must lie between"),
    ],
)
def test_misuse_is_named(options, error, text):
    with pytest.raises(error, match=text):
        Teacher.solve(ode(), states(), 80.0, 0.0, **options)


def test_a_model_that_fails_is_named():
    broken = iia.ProbabilityFlowODE(lambda x, t: x * float("nan"), iia.EDM())
    with pytest.raises(iia.errors.NonFiniteError, match="NaN or infinity"):
        Teacher.solve(broken, states(), 80.0, 0.0)


# ---- order and error -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.FlowMatching()], ids=["EDM", "from alpha = 0"])
def test_a_teacher_converges_with_the_fourth_power_of_its_steps_and_knows_its_error(schedule):
    g = iia.problems.Gaussian(torch.tensor([0.1, -0.2, 0.3], dtype=F64), torch.tensor([0.25, 1.0, 4.0], dtype=F64))
    start = min(80.0, schedule.t_noise)
    model, x = g.ode(schedule), g.noisy(64, schedule, start, torch.Generator().manual_seed(0))
    low = schedule.t_of_noise_to_signal(0.002)
    exact = model.data(g.flow(x, schedule, start, low), low)
    errors = []
    for steps in (60, 240):
        made = Teacher.solve(model, x, start, schedule.t_data, steps=steps, sigma_min=0.002)
        errors.append(float((made.final - exact).square().mean().sqrt()))
        assert errors[-1] < made.record.error < 10 * errors[-1]
    assert errors[1] < errors[0] / 4**3.5


@pytest.mark.parametrize("schedule", [iia.EDM(), iia.FlowMatching()], ids=["EDM", "from alpha = 0"])
def test_a_teacher_of_few_steps_knows_its_error_and_leaps_no_farther_than_its_steps_are_accurate(schedule):
    g = iia.problems.Gaussian(torch.tensor([0.1, -0.2, 0.3], dtype=F64), torch.tensor([0.25, 1.0, 4.0], dtype=F64))
    start = min(1000.0, schedule.t_noise)
    model, x = g.ode(schedule), g.noisy(64, schedule, start, torch.Generator().manual_seed(0))
    low = schedule.t_of_noise_to_signal(0.002)
    exact = model.data(g.flow(x, schedule, start, low), low)
    errors = []
    for steps in (16, 24, 36, 54):
        made = Teacher.solve(model, x, start, schedule.t_data, steps=steps, sigma_min=0.002)
        errors.append(float((made.final - exact).square().mean().sqrt()))
        assert errors[-1] < made.record.error < 10 * errors[-1]
    assert all(b < 0.5 * a for a, b in pairwise(errors))  # the leap goes to higher levels the more steps there are


def test_no_reported_error_is_below_the_error_of_the_teacher():
    g = iia.problems.Gaussian(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64))  # a fit is exact
    x = 80 * normal(64, 3)
    teacher = Teacher.solve(g.ode(iia.EDM()), x, 80.0, 0.0, steps=30)
    fits = [
        IIA("ddim", "window", "trajectory").fit(g.ode(iia.EDM()), x, iia.grids.karras(3), teacher=teacher),
        iia.fit(
            g.ode(iia.EDM()),
            2,
            x=x,
            budget=iia.Budget(teacher_steps=30, trials=2),
            teacher=teacher,
        ),
    ]
    for fit in fits:
        end = fit.record.endpoint
        assert end.teacher_error == teacher.record.error
        assert min(end.fit, end.base) >= end.teacher_error > 0
        assert "known to about" in str(fit) + fit.explain()
    assert min(i.error for i in fits[1].record.search.ingredients) >= teacher.record.error
