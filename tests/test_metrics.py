"""Metrics of sets of samples: PSNR, Frechet distances with their bias, and the sliced Wasserstein distance."""

import math
import sys

import pytest
import torch
from torch import nn

from iia_ode.errors import InputError, MissingDependencyError
from iia_ode.metrics import (
    FeatureStatistics,
    frechet_classifier_distance,
    frechet_distance,
    frechet_estimate,
    frechet_inception_distance,
    image_features,
    psnr,
    psnr_with_error,
    rmse,
    rmse_with_error,
    sliced_wasserstein,
)

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Pixels(nn.Module):
    """A "classifier" whose features are the pixels; its training images have given statistics."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean, self.covariance = mean, covariance

    def features(self, x):
        return x.flatten(1)


# ---- PSNR ------------------------------------------------------------------------------------------------------------


def test_psnr_of_images_is_20_decibels_for_an_error_of_a_tenth_of_the_range():
    x = normal(5, 1, 4, 4).clamp(-1, 1)
    assert psnr(x + 0.2, x) == pytest.approx(20)
    assert psnr(x + 0.2, x, peak=20) == pytest.approx(40)
    assert psnr_with_error(x, x) == (math.inf, 0.0)


def test_the_standard_error_of_psnr_is_that_of_the_rmse_in_decibels():
    x, y = normal(400, 3), normal(400, 3, seed=1)
    value, error = rmse_with_error(x, y)
    found = psnr_with_error(x, y)
    assert found[0] == pytest.approx(20 * math.log10(2 / value))
    assert found[1] == pytest.approx(20 * math.log10((value + error) / value), rel=0.02)


@pytest.mark.parametrize("peak", [0, -1.0, math.nan, math.inf])
def test_a_peak_that_is_not_positive_is_refused(peak):
    with pytest.raises(InputError, match="a positive number, 2 for images"):
        psnr(torch.ones(2, 3), torch.zeros(2, 3), peak)


# ---- Frechet distances -----------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_gaussians_with_diagonal_covariances_is_the_closed_form():
    means, stds = normal(2, 5), normal(2, 5, seed=1).abs()
    found = frechet_distance(*(FeatureStatistics(m, s.square().diag()) for m, s in zip(means, stds, strict=True)))
    assert found == pytest.approx(
        float((means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()), rel=1e-9
    )


def test_the_frechet_distance_is_symmetric_and_does_not_change_under_rotations_and_shifts():
    a, b = normal(50, 4) @ normal(4, 4, seed=1), normal(60, 4, seed=2) + 1
    turn = torch.linalg.qr(normal(4, 4, seed=3)).Q
    expected = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    for x, y in ((b, a), (a @ turn + 1e4, b @ turn + 1e4)):
        assert frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)) == pytest.approx(expected, rel=1e-6)


def test_equal_statistics_have_distance_zero_even_if_a_feature_is_constant():
    features = normal(20, 6)
    features[:, 2] = 3.0
    found = FeatureStatistics.of(features)
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-6)


def test_the_classifier_distance_is_the_distance_of_its_features_whatever_the_order_and_the_batches():
    images, others = normal(700, 1, 2, 2).float(), normal(30, 1, 2, 2, seed=1).float() + 0.5
    reference = FeatureStatistics.of(others.flatten(1))
    classifier = Pixels(reference.mean, reference.covariance)
    expected = frechet_distance(FeatureStatistics.of(images.flatten(1)), reference)
    for found in (
        frechet_classifier_distance(images, classifier),
        frechet_classifier_distance(images.flip(0), classifier, others),
        frechet_classifier_distance(images, classifier, reference),
    ):
        assert found == pytest.approx(expected, rel=1e-6)
    features = image_features(images, classifier.features, batch=64)
    assert torch.equal(features, image_features(images, classifier.features))
    assert features.dtype == F64


def test_a_true_fid_is_computed_with_the_network_and_statistics_that_a_user_brings():
    """The "Inception" here averages each channel of the uint8 images that it is given."""
    seen = []

    def inception(x):
        seen.append(x)
        return x.float().mean(dim=(2, 3))

    images = torch.cat([torch.full((2, 1, 4, 4), v) for v in (-1.5, -1.0, 0.0, 1.0)])
    reference = FeatureStatistics(torch.zeros(3), torch.zeros(3, 3))
    found = frechet_inception_distance(images, inception, reference, batch=3)
    gray = torch.tensor([0, 0, 0, 0, 128, 128, 255, 255], dtype=F64)
    assert found == pytest.approx(3 * float(gray.mean() ** 2 + gray.var()), rel=1e-6)
    assert {x.dtype for x in seen} == {torch.uint8}
    assert [tuple(x.shape) for x in seen] == [(3, 3, 4, 4), (3, 3, 4, 4), (2, 3, 4, 4)]
    with pytest.raises(InputError, match=r"Inception takes images \[N, 3, H, W\]"):
        frechet_inception_distance(torch.zeros(4, 2, 8, 8), inception, reference)


def test_the_distance_of_few_images_is_too_large_by_a_term_in_1_over_n_which_the_limit_removes():
    """Features and data have the same distribution: the true distance is 0."""
    dimension, reference = 8, FeatureStatistics(torch.zeros(8), torch.eye(8))
    for seed in range(2):
        found = frechet_estimate(normal(2000, dimension, seed=seed), reference, blocks=5)
        assert found.sizes == (2000, 1000, 500, 250)
        assert list(found.distances) == sorted(found.distances)
        # To first order, D/N from the mean and D (D + 1) / (4 N) from the covariance.
        expected = [(dimension + dimension * (dimension + 1) / 4) / n for n in found.sizes]
        assert found.distances == pytest.approx(expected, rel=0.35)
        assert abs(found.limit) < 0.15 * found.distances[-1]
        assert abs(found.limit) < 4 * found.limit_error


def test_the_limit_meets_the_true_distance_within_its_standard_error():
    mean = torch.tensor([0.5, 0, 0, 0, 0], dtype=F64)
    std = torch.tensor([1, 1, 1.5, 1, 1], dtype=F64)
    reference, truth = FeatureStatistics(torch.zeros(5), torch.eye(5)), 0.5
    found = [
        frechet_estimate(mean + std * normal(400, 5, seed=s), reference, parts=(1, 2), blocks=5) for s in range(12)
    ]
    scores = torch.tensor([(f.limit - truth) / f.limit_error for f in found])
    assert 0.5 < float(scores.square().mean().sqrt()) < 1.6
    assert abs(sum(f.limit for f in found) / 12 - truth) < abs(sum(f.distances[-1] for f in found) / 12 - truth)


def test_images_in_order_of_their_classes_have_the_same_estimate_as_mixed_ones():
    classes = (torch.arange(1200) % 10).double()
    features = normal(1200, 3) + 5 * classes[:, None]
    reference = FeatureStatistics.of(features)
    for images in (features, features[classes.argsort()]):
        found = frechet_estimate(images, reference, parts=(1, 2), blocks=5)
        assert found.distances[0] == pytest.approx(0, abs=1e-6)
        assert found.distances[1] < 8  # for the even classes alone, 3 * 2.5**2 = 18.75 from the means


def test_too_few_images_for_their_features_are_refused_with_the_number_that_is_needed():
    reference = FeatureStatistics(torch.zeros(8), torch.eye(8))
    with pytest.raises(InputError, match="leave too few for 8 features"):
        frechet_estimate(normal(70, 8), reference)
    with pytest.raises(InputError, match="two different numbers of parts"):
        frechet_estimate(normal(700, 8), reference, parts=(2, 2))


def test_bad_features_and_statistics_are_refused_by_what_is_wrong_with_them():
    good = FeatureStatistics(torch.zeros(3), torch.eye(3))
    with pytest.raises(InputError, match="N at least 2"):
        FeatureStatistics.of(torch.zeros(1, 3))
    with pytest.raises(InputError, match=r"a mean \[D\] and a covariance"):
        FeatureStatistics(torch.zeros(3), torch.eye(2))
    with pytest.raises(InputError, match="infinite or NaN"):
        FeatureStatistics.of(torch.full((4, 3), math.nan))
    with pytest.raises(InputError, match="of 3 and of 2 features"):
        frechet_distance(good, FeatureStatistics(torch.zeros(2), torch.eye(2)))
    with pytest.raises(InputError, match="features need images"):
        image_features(torch.zeros(0, 3), lambda x: x)
    with pytest.raises(InputError, match=r"returns a tensor \[4, D\]"):
        image_features(torch.zeros(4, 3), lambda x: x[0])


def test_without_torchmetrics_a_distance_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    good = FeatureStatistics(torch.zeros(3), torch.eye(3))
    with pytest.raises(MissingDependencyError, match=r"pip install 'iia-ode\[metrics\]'"):
        frechet_distance(good, good)


# ---- sliced Wasserstein ----------------------------------------------------------------------------------------------


def test_the_sliced_distance_to_a_shifted_set_is_the_shift_per_component_like_the_rmse():
    x, shift = normal(40, 2, 3), normal(2, 3, seed=1)
    expected = float(shift.square().mean().sqrt())
    assert rmse(x, x + shift) == pytest.approx(expected)
    assert sliced_wasserstein(x, x + shift, projections=12) == pytest.approx(expected)
    assert sliced_wasserstein(x, x + shift, projections=2000) == pytest.approx(expected, rel=0.01)


def test_the_sliced_distance_does_not_depend_on_order_or_repetition_and_is_zero_for_equal_sets():
    x, y = normal(30, 5), normal(20, 5, seed=1)
    found = sliced_wasserstein(x, y)
    assert sliced_wasserstein(y.flip(0), x[torch.randperm(30)]) == pytest.approx(found)
    assert sliced_wasserstein(x.repeat(2, 1), y.repeat(3, 1)) == pytest.approx(found)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-14)
    assert 0 < found < float(torch.cdist(x, y).max())


def test_the_sliced_distance_of_numbers_is_the_exact_distance_of_their_quantile_functions():
    x, y = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0, 3.0])
    # Quantiles: [0, 1/2) -> 0, [1/2, 1] -> 1; and [0, 2/3) -> 0, [2/3, 1] -> 3.
    expected = math.sqrt((2 / 3 - 1 / 2) * 1 + (1 / 3) * 4)
    assert sliced_wasserstein(x, y, projections=3) == pytest.approx(expected)


def test_the_sliced_distance_of_large_sets_is_that_of_their_distributions():
    """Two isotropic Gaussians of one mean differ by their standard deviations in every direction."""
    x, y = normal(4000, 3), 1.5 * normal(4000, 3, seed=1)
    assert sliced_wasserstein(x, y, projections=12) == pytest.approx(0.5, rel=0.05)
    small, large = (sliced_wasserstein(normal(n, 3), normal(n, 3, seed=3), projections=12) for n in (50, 5000))
    assert small > 5 * large


def test_the_sliced_distance_is_at_most_the_rmse_of_a_pairing():
    x = normal(50, 6)
    y = x + 0.3 * normal(50, 6, seed=1)
    assert 0 < sliced_wasserstein(x, y, projections=60) <= rmse(x, y)


def test_sets_that_cannot_be_compared_are_refused():
    x = torch.zeros(3, 2)
    for other, text in (
        (torch.zeros(3, 4), r"shapes \[2\] and \[4\]"),
        (torch.zeros(0, 2), r"need shape \[N, \.\.\.\]"),
        (torch.zeros(3, 2, dtype=torch.complex64), "real torch.Tensors"),
        ([[0.0, 0.0]], "real torch.Tensors"),
    ):
        with pytest.raises(InputError, match=text):
            sliced_wasserstein(x, other)
    with pytest.raises(InputError, match="projections"):
        sliced_wasserstein(x, x, projections=0)
