"""Published grids: the tables of Align Your Steps, as noise levels and as timesteps of the models they are for."""

import math

import numpy as np
import pytest
import torch
from support import ALPHAS_CUMPROD, F64, close, every_schedule

import iia_ode as iia
from iia_ode import grids

# Stable Diffusion's own timesteps, SDXL's too: betas linear in their square root.
STABLE_DIFFUSION = iia.Discrete((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2).cumprod(0))
OTHER = iia.Discrete(ALPHAS_CUMPROD)

# Sabour et al. [2024, table 3], and the timesteps of the authors' quickstart guide.
AYS_LEVELS = {
    "sd15": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    "deepfloyd": [160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006],
    "svd": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}
AYS_TIMESTEPS = {
    "sd15": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0],
    "sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0],
    "deepfloyd": [995, 920, 811, 686, 555, 418, 315, 174, 109, 12, 0],
}


def squared_cosine() -> iia.Discrete:
    """DeepFloyd IF's schedule: 1000 betas of Nichol & Dhariwal [2021]."""
    alpha_bar = torch.cos((torch.arange(1001, dtype=F64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    return iia.Discrete((1 - (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)).cumprod(0))


AYS_SCHEDULES = {"sd15": STABLE_DIFFUSION, "sdxl": STABLE_DIFFUSION, "deepfloyd": squared_cosine()}


@pytest.mark.parametrize("model", AYS_LEVELS)
def test_ten_steps_of_align_your_steps_are_the_published_levels(model):
    assert grids.align_your_steps(model=model).tolist() == [*AYS_LEVELS[model][:-1], 0.0]
    assert grids.align_your_steps(10, model, to_data=False).tolist() == AYS_LEVELS[model]
    assert list(grids.ALIGN_YOUR_STEPS[model].levels) == AYS_LEVELS[model]


@pytest.mark.parametrize("model", AYS_TIMESTEPS)
def test_ten_steps_of_align_your_steps_are_the_published_timesteps_on_the_models_schedule(model):
    schedule = AYS_SCHEDULES[model]
    assert grids.align_your_steps(10, model, schedule=schedule).tolist() == [*AYS_TIMESTEPS[model][:-1], -1.0]
    assert grids.align_your_steps(10, model, schedule=schedule, to_data=False).tolist() == AYS_TIMESTEPS[model]


@pytest.mark.parametrize("model", AYS_TIMESTEPS)
def test_published_levels_and_published_timesteps_say_the_same(model):
    levels = AYS_SCHEDULES[model].noise_to_signal(torch.tensor(AYS_TIMESTEPS[model], dtype=F64))
    close(levels[:-1], torch.tensor(AYS_LEVELS[model][:-1], dtype=F64), rtol=0.015)
    close(levels[-1], torch.tensor(AYS_LEVELS[model][-1], dtype=F64), atol=0.0005)  # the table's last digit


@pytest.mark.parametrize("model", AYS_LEVELS)
@pytest.mark.parametrize("n", [1, 2, 5, 7, 10, 20, 33])
def test_other_counts_interpolate_the_logarithm_of_the_levels_as_the_authors_do(model, n):
    table = np.log(AYS_LEVELS[model][::-1])
    expected = np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, 11), table))[::-1].copy()
    close(grids.align_your_steps(n, model, to_data=False), torch.from_numpy(expected), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 8, 10, 25])
def test_other_counts_on_timesteps_interpolate_the_levels_of_the_published_ones(n):
    grid = grids.align_your_steps(n, "sdxl", schedule=STABLE_DIFFUSION, to_data=False)
    levels = STABLE_DIFFUSION.noise_to_signal(torch.tensor(AYS_TIMESTEPS["sdxl"], dtype=F64)).log().numpy()
    expected = np.interp(np.linspace(0, 10, n + 1), np.arange(11), levels)
    close(STABLE_DIFFUSION.noise_to_signal(grid).log(), torch.from_numpy(expected), atol=1e-9)
    assert (grid[0], grid[-1]) == (999.0, 0.0)


@every_schedule
def test_align_your_steps_visits_its_levels_on_schedules_without_timesteps(schedule):
    if not isinstance(schedule, iia.Discrete):
        levels = schedule.noise_to_signal(grids.align_your_steps(6, "sdxl", schedule=schedule))
        close(levels, grids.align_your_steps(6, "sdxl"), rtol=1e-12)


def test_align_your_steps_for_another_model_is_an_error_that_lists_the_published_ones():
    with pytest.raises(iia.errors.UnknownNameError, match=r"'sd3'.*deepfloyd.*do not carry over.*karras"):
        grids.align_your_steps(10, "sd3")


@pytest.mark.parametrize(
    "schedule", [OTHER, iia.Discrete(OTHER.alphas_cumprod[:100])], ids=["linear betas", "100 timesteps"]
)
def test_published_timesteps_on_another_models_schedule_are_a_grid_error(schedule):
    with pytest.raises(iia.errors.GridError, match="alphas_cumprod"):
        grids.align_your_steps(10, "sd15", schedule=schedule)
