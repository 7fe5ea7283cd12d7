"""Metrics: errors of final states against a reference, and distances between sets of samples."""

from .endpoint import flat, paired_ratio, psnr, psnr_with_error, rmse, rmse_with_error
from .frechet import (
    FeatureStatistics,
    FrechetEstimate,
    frechet_classifier_distance,
    frechet_distance,
    frechet_estimate,
    frechet_inception_distance,
    image_features,
)
from .sliced import sliced_wasserstein

__all__ = [
    "FeatureStatistics",
    "FrechetEstimate",
    "flat",
    "frechet_classifier_distance",
    "frechet_distance",
    "frechet_estimate",
    "frechet_inception_distance",
    "image_features",
    "paired_ratio",
    "psnr",
    "psnr_with_error",
    "rmse",
    "rmse_with_error",
    "sliced_wasserstein",
]
