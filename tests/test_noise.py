"""Samples with seeds of their own do not depend on batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import iia_ode as iia
from iia_ode.experiments import get_setting, setting_names
from iia_ode.noise import generator_of


@given(seed=st.integers(0, 2**64), n=st.integers(1, 12), cut=st.integers(0, 12))
def test_noise_of_a_sample_is_the_same_however_the_run_is_cut(seed, n, cut):
    whole = iia.noise.seeded_noise(iia.noise.sample_seeds(seed, range(n)), (2, 3))
    parts = [
        iia.noise.seeded_noise(iia.noise.sample_seeds(seed, part), (2, 3))
        for part in (range(min(cut, n)), range(min(cut, n), n))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (n, 2, 3) and whole.dtype == torch.float32


def test_numbers_may_be_numpys():
    assert iia.noise.sample_seeds(np.int64(3), np.arange(4)) == iia.noise.sample_seeds(3, range(4))
    assert torch.equal(iia.noise.seeded_noise([np.int64(7)], (np.int64(2),)), iia.noise.seeded_noise([7], (2,)))


def test_noise_is_standard_normal_and_that_of_other_samples_and_runs_is_other_noise():
    seeds = [s for seed in range(4) for s in iia.noise.sample_seeds(seed, range(500))]
    assert len(set(seeds)) == len(seeds)
    noise = iia.noise.seeded_noise(seeds, (40,), dtype=torch.float64)
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 / n**0.5
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    correlation = (noise[:-1] * noise[1:]).mean()  # seeds that follow each other
    assert abs(float(correlation)) < 5 / n**0.5


@pytest.mark.parametrize("name", setting_names())
def test_a_sample_of_a_setting_depends_on_its_own_seed_alone(name):
    setting = get_setting(name)
    ode, x = setting.draw_each([5, 6, 7])
    one, y = setting.draw_each([6])
    assert torch.equal(x[1:2], y)
    assert all(torch.equal(value[1:2], one.conditioning[key]) for key, value in ode.conditioning.items())
    root = float(x.double().square().mean().sqrt())
    assert 0.5 * setting.sigma_max < root < 1.5 * setting.sigma_max


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: iia.noise.sample_seeds(-1, range(3)),
        lambda: iia.noise.sample_seeds(0, [-1]),
        lambda: iia.noise.sample_seeds(0, [2**32]),
        lambda: iia.noise.seeded_noise([2**32], (3,)),
        lambda: generator_of(True),
        lambda: iia.noise.sample_seeds(0, 5),
        lambda: iia.noise.sample_seeds(0, [True]),
        lambda: iia.noise.seeded_noise([0], 3),
        lambda: iia.noise.seeded_noise([0], (3,), dtype=torch.int64),
        lambda: get_setting("gaussian").draw(2, 2**32),
        lambda: get_setting("gaussian").draw_each([]),
    ],
)
def test_seeds_that_would_be_cut_short_and_shapes_that_are_none_are_refused(wrong):
    with pytest.raises(iia.errors.InputError):
        wrong()
