"""Fits for models in use: of any resolution, from images with noise, at a known cost and in a bounded memory."""

from dataclasses import replace

import pytest
import torch
from support import F64, generator, mixture

import iia_ode as iia
from iia_ode.autofit import Budget
from iia_ode.errors import InputError

SMALL = Budget(teacher_steps=12, trials=2)
EDM = iia.EDM()
DATA = mixture()
SIZE = DATA.shape[0]


def _ode(schedule: iia.Schedule = EDM) -> iia.ProbabilityFlowODE:
    return DATA.ode(schedule)


class Blurred(torch.nn.Module):
    """A denoiser of images of any size: each pixel moves toward the mean of its image."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        share = (1 / (1 + sigma**2)).reshape(-1, 1, 1, 1)
        return share * x + (1 - share) * torch.tanh(x.mean((2, 3), keepdim=True))


# ---- scalars ---------------------------------------------------------------------------------------------------------


def test_a_fit_of_scalars_serves_images_of_another_resolution(tmp_path):
    ode = iia.ProbabilityFlowODE(Blurred(), EDM, "data", tag="blurred")
    fit = iia.fit(ode, 3, shape=(1, 8, 8), samples=24, budget=SMALL, weights="scalars")
    larger = 80 * torch.randn(4, 1, 16, 12, generator=generator(1))
    fit = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert iia.sample(ode, larger, solver=fit).shape == larger.shape
    names = [i.name for i in fit.record.search.ingredients]
    assert not any("bands" in name or "intercept" in name or "warm" in name for name in names), names


def test_an_unknown_kind_of_weights_is_refused():
    with pytest.raises(InputError, match="weights"):
        iia.fit(_ode(), 3, shape=(SIZE,), weights="matrices")  # type: ignore[arg-type]


# ---- images with noise -----------------------------------------------------------------------------------------------


def test_a_fit_from_images_with_noise_is_the_fit_from_these_states():
    flow = iia.FlowMatching()
    ode, images = _ode(flow), DATA.sample(24, generator=generator(2))
    level = flow.noise_to_signal(0.6)
    found = iia.fit(ode, 3, images=images, sigma_max=level, budget=SMALL, seed=5)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=images.dtype)
    states = 0.4 * images + 0.6 * noise
    assert found.grid[0] == pytest.approx(0.6, abs=1e-12)
    same = iia.fit(ode, 3, x=states, sigma_max=level, budget=SMALL, seed=5)
    assert found.plan.difference(same.plan) < 1e-12


def test_draws_that_a_budget_adds_to_images_are_the_same_images_with_new_noise():
    flow = iia.FlowMatching()
    ode, images = _ode(flow), 50 + DATA.sample(12, generator=generator(2))  # data far from zero
    more = Budget(teacher_steps=12, trials=2, draws=24, finals=0.5)
    fit = iia.fit(ode, 2, images=images, sigma_max=0.5, budget=more)
    # Draws of pure noise at this level would lie 33 away, and no fit could reach an error below 1.
    assert fit.record.endpoint.fit < 1


def test_a_budget_that_adds_noise_to_states_with_data_is_refused():
    flow = iia.FlowMatching()
    states = 0.6 * DATA.sample(12, generator=generator(2)) + 0.4 * torch.randn(
        12, SIZE, dtype=F64, generator=generator(3)
    )
    with pytest.raises(InputError, match="images="):
        iia.fit(_ode(flow), 2, x=states, sigma_max=0.4 / 0.6, budget=Budget(draws=24))


def test_images_need_the_level_of_their_noise():
    with pytest.raises(InputError, match="sigma_max="):
        iia.fit(_ode(), 3, images=DATA.sample(12, generator=generator(2)))
    with pytest.raises(InputError, match="exactly one"):
        iia.fit(_ode(), 3, images=DATA.sample(12, generator=generator(2)), shape=(SIZE,), sigma_max=1.0)


# ---- cost and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [2, 4])
def test_the_cost_of_a_fit_is_known_within_a_fifth_before_the_model_is_called(nfe):
    ode = _ode()
    cost = iia.fit_cost(ode, nfe, "closed-form", samples=32)
    assert ode.nfe == 0
    fit = iia.fit(ode, nfe, shape=(SIZE,), samples=32, budget="closed-form")
    assert cost.sample_evaluations == pytest.approx(fit.record.sample_evaluations, rel=0.2)
    assert str(cost.sample_evaluations) in str(cost)
    assert cost.seconds(0.05) == pytest.approx(0.05 * cost.sample_evaluations)


def test_the_memory_of_a_fit_is_that_of_the_teachers_file():
    ode, x = _ode(), 80 * torch.randn(16, SIZE, generator=generator(0))
    for limit, knots, dtype in ((0, 17, torch.float16), (None, None, None)):
        budget = Budget(teacher_steps=30, teacher_memory=limit)
        assert budget.storage(4, x.numel()) == (knots, dtype)
        teacher = iia.Teacher.solve(ode, x, 80.0, 0.0, steps=30, knots=knots, dtype=dtype)
        kept = teacher.path.states.nbytes + teacher.path.slopes.nbytes
        assert iia.fit_cost(ode, 4, budget, samples=16, shape=(SIZE,)).memory == kept


def test_the_trajectories_of_sixty_four_large_latents_take_less_than_300_megabytes():
    cost = iia.fit_cost(_ode(), 5, "closed-form", samples=64, shape=(4, 128, 128))
    assert cost.memory < 300e6 < 64 * 4 * 128 * 128 * 25 * 2 * 4


def test_a_fit_beyond_the_limit_of_memory_stores_fewer_and_shorter_states_and_says_so(tmp_path):
    ode, x = _ode(), 80 * torch.randn(24, SIZE, generator=generator(0))
    whole, short = (iia.fit(ode, 3, x=x, budget=replace(SMALL, teacher_memory=m)) for m in (None, 1000))
    assert "13 knots in float16" in str(short) and "knots" not in str(whole)
    assert iia.load(whole.save(tmp_path / "whole.safetensors")).record == whole.record
    assert short.record.endpoint.fit == pytest.approx(whole.record.endpoint.fit, rel=0.05)


@pytest.fixture(scope="module")
def in_full():
    """Draws, their teacher with every step in their dtype, its fit, and unseen draws with their accurate final states."""
    ode, x = _ode(), 80 * torch.randn(48, SIZE, generator=generator(0))
    whole = iia.Teacher.solve(ode, x, 80.0, 0.0)
    unseen = 80 * torch.randn(64, SIZE, generator=generator(9))
    exact = iia.Teacher.solve(ode, unseen, 80.0, 0.0).final
    return x, whole, iia.fit(ode, 3, x=x, teacher=whole, budget=SMALL), unseen, exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_with_short_states_and_few_knots_gives_nearly_the_same_fit(tmp_path, dtype, in_full):
    ode, (x, whole, fit, unseen, exact) = _ode(), in_full
    short = iia.Teacher.solve(ode, x, 80.0, 0.0, knots=16, dtype=dtype)
    assert short.final.dtype == x.dtype
    assert torch.equal(short.final, whole.final)  # the ends at the data are whole
    saved = iia.load(short.save(tmp_path / "teacher.safetensors"))
    assert torch.equal(saved.at(1.0), short.at(1.0))
    assert saved.at(1.0).dtype == x.dtype
    shorter = iia.fit(ode, 3, x=x, teacher=short, budget=SMALL)
    errors = [float((iia.sample(ode, unseen, solver=f) - exact).square().mean().sqrt()) for f in (fit, shorter)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert "16 knots" in str(short.record.options)


@pytest.mark.parametrize("wrong", [{"knots": 3}, {"dtype": torch.int8}])
def test_an_unusable_storage_of_a_teacher_is_refused(wrong):
    with pytest.raises(InputError):
        iia.Teacher.solve(_ode(), 80 * torch.randn(4, SIZE, generator=generator(0)), 80.0, 0.0, steps=8, **wrong)


@pytest.mark.parametrize("nfe", [3, 5, 8])
def test_a_quick_fit_takes_at_most_1500_sample_evaluations(nfe):
    assert iia.fit_cost(_ode(), nfe, "quick", shape=(3, 16, 16)).sample_evaluations <= 1500
    fit = iia.fit(iia.ProbabilityFlowODE(Blurred(), EDM, "data"), nfe, shape=(3, 16, 16), budget="quick")
    assert fit.record.sample_evaluations <= 1500


def test_the_cost_of_a_fit_with_scalar_weights_is_known_too():
    ode = iia.ProbabilityFlowODE(Blurred(), EDM, "data")
    cost = iia.fit_cost(ode, 5, "closed-form", shape=(3, 8, 8), weights="scalars").sample_evaluations
    assert cost < iia.fit_cost(ode, 5, "closed-form", shape=(3, 8, 8)).sample_evaluations
    fit = iia.fit(ode, 5, shape=(3, 8, 8), budget="closed-form", weights="scalars")
    assert cost == pytest.approx(fit.record.sample_evaluations, rel=0.2)
