"""Frechet distances between sets of images, on the features of any network, and their bias for finite sets.

The Frechet distance of two sets of features is the squared 2-Wasserstein distance between the Gaussians of the same means and
covariances: |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) [Dowson & Landau 1982; Heusel et al. 2017, equation 6].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_whole
from ..errors import InputError, MissingDependencyError
from ..noise import generator_of

__all__ = [
    "FeatureStatistics",
    "FrechetEstimate",
    "frechet_classifier_distance",
    "frechet_distance",
    "frechet_estimate",
    "frechet_inception_distance",
    "image_features",
]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features.

    Parameters
    ----------
    mean : mean of each feature [D], any floating-point dtype.
    covariance : covariance [D, D], divided by N - 1 for N samples.

    Raises
    ------
    InputError : the shapes do not fit, or a value is not finite.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        mean, covariance = (torch.as_tensor(v).detach().cpu().double() for v in (self.mean, self.covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                f"statistics have a mean [D] and a covariance [D, D], got {list(mean.shape)} and {list(covariance.shape)}."
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise InputError("statistics of features are finite numbers, got infinite or NaN ones: look at the images.")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Compute the statistics of features, in float64.

        Parameters
        ----------
        features : features [N, D] of at least two images.

        Returns
        -------
        The :class:`FeatureStatistics`.

        Raises
        ------
        InputError : there are fewer than two images, or the features have another shape or are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise InputError(f"features have shape [N, D] with N at least 2, got {list(features.shape)}.")
        features = features.detach().cpu().double()
        return cls(features.mean(0), features.T.cov().reshape(features.shape[1], -1))


@dataclass(frozen=True)
class FrechetEstimate:
    """Frechet distances at several numbers of images, and their limit for infinitely many.

    Attributes
    ----------
    sizes : numbers of images N, largest first.
    distances : distance at each number: a mean over disjoint subsets, except for the whole set.
    errors : standard error of each distance.
    limit : distance extrapolated to infinitely many images, linear in 1/N. It may be slightly negative near zero.
    limit_error : standard error of the limit.
    """

    sizes: tuple[int, ...]
    distances: tuple[float, ...]
    errors: tuple[float, ...]
    limit: float
    limit_error: float


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Compute the Frechet distance between two Gaussians, with torchmetrics in float64. Needs the extra ``metrics``.

    Parameters
    ----------
    first, second : statistics of the same D features.

    Returns
    -------
    The distance, in squared units of the features. It is 0 for equal statistics, up to rounding.

    Raises
    ------
    InputError : the statistics have different numbers of features.
    MissingDependencyError : torchmetrics is not installed.
    """
    if len(first.mean) != len(second.mean):
        raise InputError(f"cannot compare statistics of {len(first.mean)} and of {len(second.mean)} features.")
    identity = nn.Identity()
    identity.num_features = len(first.mean)  # type: ignore[assignment]  # torchmetrics asks for it
    metric = _torchmetrics().FrechetInceptionDistance(feature=identity)
    # The distance does not change if both means are shifted. With one mean at zero, sums of squares lose no digits.
    metric.update(_representatives(first.covariance), real=True)
    metric.update(second.mean - first.mean + _representatives(second.covariance), real=False)
    return float(metric.compute())


def _representatives(covariance: Tensor) -> Tensor:
    """Build 2 D features [2 D, D] with mean zero and the given covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    half = (vectors * ((len(values) - 0.5) * values.clamp_min(0)).sqrt()).T
    return torch.cat([half, -half])


def _torchmetrics() -> Any:
    try:
        return importlib.import_module("torchmetrics.image.fid")
    except ImportError as error:
        raise MissingDependencyError("Frechet distances need torchmetrics: pip install 'iia-ode[metrics]'.") from error


def image_features(images: Tensor, features: Callable[[Tensor], Tensor], *, batch: int = 500) -> Tensor:
    """Compute the features of images in batches, without gradients.

    Parameters
    ----------
    images : images [N, ...].
    features : network from images [B, ...] to features [B, D], such as the method ``features`` of an
        :class:`~iia_ode.denoisers.ImageClassifier`.
    batch : images per call.

    Returns
    -------
    Features [N, D], float64 on the CPU.

    Raises
    ------
    InputError : there are no images, or the network returns another shape.
    """
    check_whole("batch", batch, least=1)
    if len(images) == 0:
        raise InputError("features need images: got none.")
    found = []
    with torch.no_grad():
        for part in torch.split(images, batch):
            value = features(part)
            if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != len(part):
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"a network of features returns a tensor [{len(part)}, D], got {got}.")
            found.append(value.cpu().double())
    return torch.cat(found)


def frechet_classifier_distance(
    images: Tensor, classifier: Any, reference: Tensor | FeatureStatistics | None = None
) -> float:
    """Compute the Frechet distance on the features of a classifier of the data. This is not FID, which needs Inception.

    Distances are comparable only under the same classifier and number of images: the distance of N images is larger than
    that of infinitely many by an amount proportional to 1/N. :func:`frechet_estimate` removes this bias.

    Parameters
    ----------
    images : images [N, C, H, W] in [-1, 1], at least two.
    classifier : network with a method ``features``, such as :func:`iia_ode.denoisers.fashion_classifier`.
    reference : images [M, C, H, W], or statistics of their features. The default is the classifier's training images, whose
        statistics are part of an :class:`~iia_ode.denoisers.ImageClassifier`.

    Returns
    -------
    The distance, in squared units of the features.

    Raises
    ------
    InputError : there are fewer than two images, or they do not fit the classifier.
    MissingDependencyError : torchmetrics is not installed (extra ``metrics``).
    """
    if reference is None:
        reference = FeatureStatistics(classifier.mean, classifier.covariance)
    elif isinstance(reference, Tensor):
        reference = FeatureStatistics.of(image_features(reference, classifier.features))
    return frechet_distance(FeatureStatistics.of(image_features(images, classifier.features)), reference)


def frechet_inception_distance(
    images: Tensor, inception: Callable[[Tensor], Tensor], reference: FeatureStatistics, *, batch: int = 50
) -> float:
    """Compute FID [Heusel et al. 2017] with an Inception network and statistics that the caller brings.

    The package has no Inception weights. The result is FID as others report it only if network, resizing, reference
    statistics and number of images (usually 50,000) are theirs.

    Parameters
    ----------
    images : images [N, C, H, W] in [-1, 1], with one channel (repeated thrice) or three.
    inception : network from uint8 images [B, 3, H, W] in 0 to 255 to features [B, 2048]. The network does its own resizing.
    reference : mean and covariance of the features of the data, such as the arrays ``mu`` and ``sigma`` of a published file.
    batch : images per call.

    Returns
    -------
    The distance.

    Raises
    ------
    InputError : the images do not have one or three channels, or the network or statistics do not fit.
    MissingDependencyError : torchmetrics is not installed (extra ``metrics``).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"Inception takes images [N, 3, H, W], or [N, 1, H, W] in gray, got {list(images.shape)}.")

    def features(x: Tensor) -> Tensor:
        return inception((x * 127.5 + 128).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1))

    return frechet_distance(FeatureStatistics.of(image_features(images, features, batch=batch)), reference)


def frechet_estimate(
    features: Tensor,
    reference: FeatureStatistics,
    *,
    parts: Sequence[int] = (1, 2, 4, 8),
    blocks: int = 10,
    seed: int = 0,
) -> FrechetEstimate:
    """Compute the Frechet distance at several numbers of images, and extrapolate to infinitely many.

    The expected distance of N images is d + c / N + O(1/N^2), where d is the limit, and c depends on the model. A comparison
    at a finite N can therefore favor the wrong model [Chong & Forsyth 2020]. This function cuts the images into 1, 2, 4 and 8
    disjoint parts, averages the distance over the parts of each size, and fits a line in 1/N by least squares.

    Parts and blocks are random, so images may be in any order, such as by class. Standard errors are from the jackknife over
    blocks of images. The reference counts as exact.

    Parameters
    ----------
    features : features [N, D] of the images, see :func:`image_features`.
    reference : statistics of the data.
    parts : numbers of parts, at least two different ones. The smallest part must have more than D images.
    blocks : blocks of the jackknife, at least 2. The cost is sum(parts) (blocks + 1) distances.
    seed : seed of the division into parts and blocks.

    Returns
    -------
    A :class:`FrechetEstimate`.

    Raises
    ------
    InputError : a part would have too few images, or an option is out of range.
    MissingDependencyError : torchmetrics is not installed (extra ``metrics``).
    """
    check_whole("blocks", blocks, least=2)
    for cut in parts:
        check_whole("numbers of parts", cut, least=1)
    cuts = sorted(set(parts))
    if len(cuts) < 2:
        raise InputError(f"a line in 1/N needs two different numbers of parts, got {list(parts)}.")
    count, dimension = features.shape
    if (count - -(-count // blocks)) // cuts[-1] <= dimension:
        raise InputError(
            f"{count} images in {cuts[-1]} parts, less one block of {blocks}, leave too few for {dimension} features: "
            f"the distance follows d + c/N only above {dimension} images per part. Draw more images or give smaller parts."
        )
    features = features[torch.randperm(count, generator=generator_of(seed), device="cpu")]
    sizes = torch.tensor([count / cut for cut in cuts], dtype=torch.float64)
    whole = _by_size(features, reference, cuts)
    index = torch.arange(count) % blocks
    order = [_by_size(features[index != k], reference, cuts) for k in range(blocks)]
    left_out = torch.stack([torch.cat([row, _limit(row, sizes)[None]]) for row in order])
    errors = ((blocks - 1) * left_out.var(dim=0, correction=0)).sqrt().tolist()
    return FrechetEstimate(
        tuple(count // cut for cut in cuts),
        tuple(whole.tolist()),
        tuple(errors[:-1]),
        float(_limit(whole, sizes)),
        errors[-1],
    )


def _by_size(features: Tensor, reference: FeatureStatistics, cuts: Sequence[int]) -> Tensor:
    """Mean distance of the parts, for each number of parts."""
    means = []
    for cut in cuts:
        distances = [frechet_distance(FeatureStatistics.of(features[k::cut]), reference) for k in range(cut)]
        means.append(sum(distances) / cut)
    return torch.tensor(means, dtype=torch.float64)


def _limit(distances: Tensor, sizes: Tensor) -> Tensor:
    """Intercept of the least-squares line in 1/N."""
    design = torch.stack([torch.ones_like(sizes), 1 / sizes], dim=1)
    intercept: Tensor = torch.linalg.lstsq(design, distances[:, None]).solution[0, 0]
    return intercept
