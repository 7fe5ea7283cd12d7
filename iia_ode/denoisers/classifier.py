"""Small classifiers of the package's images. Their features serve Frechet distances between sets of images."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..checks import check_whole
from ..errors import InputError
from ..files import read_tensors, write_tensors
from .checkpoints import filled
from .datasets import FASHION_FOLDER, digits_data, fashion_data

__all__ = [
    "ClassifierOptions",
    "ClassifierResult",
    "ImageClassifier",
    "digits_classifier",
    "fashion_classifier",
    "load_classifier",
    "save_classifier",
    "train_digits_classifier",
    "train_fashion_classifier",
]

logger = logging.getLogger(__name__)

_WEIGHTS = Path(__file__).parent / "weights"

DIGITS_CLASSIFIER = _WEIGHTS / "digits-classifier.safetensors"
DIGITS_CLASSIFIER_SOURCE = "scikit-learn load_digits: 1797 images of 8x8, scaled to [-1, 1]; every fifth image held out"
FASHION_CLASSIFIER = _WEIGHTS / "fashion-classifier.safetensors"


class ImageClassifier(nn.Module):
    """A convolutional classifier of square images.

    Each level has a 3x3 convolution, a SiLU and a maximum over squares of 2x2 pixels. A linear layer and a SiLU make the
    features, and a second linear layer the logits.

    Parameters
    ----------
    shape : shape (C, H, W) of an image.
    channels : width of each level, finest first.
    features : number of features.
    classes : number of classes.

    Attributes
    ----------
    mean, covariance : mean [features] and covariance [features, features] of the features of the training images, float64.
        They are zeros before the training.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        channels: tuple[int, ...] = (16, 32, 64),
        features: int = 64,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.config = {"shape": list(shape), "channels": list(channels), "features": features, "classes": classes}
        self.shape = tuple(shape)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, padding=1) for c_in, c_out in zip((shape[0], *channels), channels, strict=False)
        )
        height, width = (size >> len(channels) for size in shape[1:])
        self.linear = nn.Linear(channels[-1] * height * width, features)
        self.head = nn.Linear(features, classes)
        self.mean: Tensor
        self.covariance: Tensor
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("covariance", torch.zeros(features, features, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of images.

        Parameters
        ----------
        x : images [B, C, H, W] in [-1, 1]. Values beyond are clipped, as a screen clips them.

        Returns
        -------
        Features [B, features] in the dtype of x.

        Raises
        ------
        InputError : the images have another shape than the training images.
        """
        if x.shape[1:] != self.shape:
            raise InputError(
                f"this classifier takes images [B, {', '.join(map(str, self.shape))}], got {list(x.shape)}."
            )
        h = x.clamp(-1, 1)
        for convolution in self.convolutions:
            h = F.max_pool2d(F.silu(convolution(h)), 2)
        return F.silu(self.linear(h.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [B, classes] of images [B, C, H, W] in [-1, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits


@dataclass(frozen=True)
class ClassifierOptions:
    """Options of a classifier's training.

    Parameters
    ----------
    epochs : passes over the training images, at least 1.
    batch : images per step, at least 1.
    lr : peak learning rate of Adam. The rate warms up linearly over a tenth of the training and decays to zero along a cosine.
    shift : largest random shift of an image in pixels, along both axes.
    seed : seed of initialization, order and shifts.

    Raises
    ------
    InputError : `epochs` or `batch` is below 1, or `shift` is below 0.
    """

    epochs: int = 5
    batch: int = 128
    lr: float = 4e-3
    shift: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("shift", 0)):
            check_whole(f"{name} of the training", getattr(self, name), least=least)

    def to_dict(self) -> dict[str, Any]:
        """Return all options by name, as JSON-ready values."""
        return asdict(self)


FASHION_CLASSIFIER_OPTIONS = ClassifierOptions()
DIGITS_CLASSIFIER_OPTIONS = ClassifierOptions(epochs=60, batch=64)


@dataclass(frozen=True)
class ClassifierResult:
    """Result of a classifier's training.

    Attributes
    ----------
    classifier : trained classifier, in evaluation mode, with gradients of the weights switched off.
    train_accuracy : share of training images with the right class, from 0 to 1.
    test_accuracy : share of test images with the right class, from 0 to 1.
    """

    classifier: ImageClassifier
    train_accuracy: float
    test_accuracy: float


def train_fashion_classifier(
    options: ClassifierOptions = FASHION_CLASSIFIER_OPTIONS,
    *,
    folder: str | os.PathLike[str] = FASHION_FOLDER,
    progress: bool = True,
) -> ClassifierResult:
    """Train the classifier of Fashion-MNIST from scratch, on the CPU. The same options give the same weights.

    Parameters
    ----------
    options : length, learning rate and seed of the training.
    folder : folder of the data, see :func:`fashion_data`.
    progress : whether to show a progress bar.

    Returns
    -------
    A :class:`ClassifierResult`. The test images are those of the data set.

    Raises
    ------
    MissingDependencyError : the folder does not have the data.
    FileFormatError : a file of the data is damaged.
    """
    images, labels, test = fashion_data(folder)
    return _train((16, 32, 64), images, labels, test, options, progress)


def train_digits_classifier(
    options: ClassifierOptions = DIGITS_CLASSIFIER_OPTIONS, *, progress: bool = True
) -> ClassifierResult:
    """Train the classifier of 8x8 digits from scratch, on the CPU. The same options give the same weights.

    Parameters
    ----------
    options : length, learning rate and seed of the training.
    progress : whether to show a progress bar.

    Returns
    -------
    A :class:`ClassifierResult`. Every fifth image is a test image.

    Raises
    ------
    MissingDependencyError : scikit-learn is not installed (extra ``train``).
    """
    images, labels = digits_data()
    return _train((32, 64), images, labels, torch.arange(len(images)) % 5 == 4, options, progress)


def _train(
    channels: tuple[int, ...], images: Tensor, labels: Tensor, test: Tensor, options: ClassifierOptions, progress: bool
) -> ClassifierResult:
    """Train a classifier on the images that are not marked, with the cross-entropy."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(options.seed)
        classifier = ImageClassifier(shape, channels, classes=int(labels.max()) + 1)
        classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPUs
        optimizer = torch.optim.Adam(classifier.parameters(), lr=options.lr)
        seen, targets = images[~test], labels[~test]
        per_epoch = -(-len(seen) // options.batch)
        total, step = options.epochs * per_epoch, 0
        bar = tqdm(total=total, desc="train", disable=not progress, mininterval=1.0)
        for _ in range(options.epochs):
            for pick in torch.split(torch.randperm(len(seen)), options.batch):
                for group in optimizer.param_groups:
                    warm = min(1.0, (step + 1) / (0.1 * total))
                    group["lr"] = options.lr * warm * 0.5 * (1 + math.cos(math.pi * step / total))
                loss = F.cross_entropy(classifier(_shifted(seen[pick], options.shift)), targets[pick])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                step += 1
                bar.update()
        bar.close()
    classifier.eval().requires_grad_(False)
    features = torch.cat([classifier.features(x) for x in torch.split(seen, 512)]).double()
    classifier.mean.copy_(features.mean(0))
    classifier.covariance.copy_(features.T.cov())
    accuracy = [_accuracy(classifier, images[part], labels[part]) for part in (~test, test)]
    logger.info("trained: accuracy %.4f, on test images %.4f", *accuracy)
    return ClassifierResult(classifier, *accuracy)


def _shifted(x: Tensor, most: int) -> Tensor:
    """Shift a batch of images by one random number of pixels along each axis; the border repeats."""
    if not most:
        return x
    row, column = torch.randint(2 * most + 1, (2,)).tolist()
    padded = F.pad(x, (most,) * 4, mode="replicate")
    return padded[..., row : row + x.shape[2], column : column + x.shape[3]]


def _accuracy(classifier: ImageClassifier, images: Tensor, labels: Tensor) -> float:
    found = torch.cat([classifier(x).argmax(1) for x in torch.split(images, 512)])
    return float((found == labels).double().mean())


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """The options of an :class:`ImageClassifier`."""

    shape: tuple[int, int, int]
    channels: tuple[int, ...]
    features: int
    classes: int


@dataclass(frozen=True)
class _Header:
    """The header of a classifier's file."""

    config: _Config
    about: dict[str, Any] = field(default_factory=dict)


def save_classifier(path: str | os.PathLike[str], classifier: ImageClassifier, about: dict[str, Any]) -> Path:
    """Write a classifier as one safetensors file, atomically.

    Parameters
    ----------
    path : file to write; an existing file is replaced.
    classifier : classifier to store, with the statistics of its features.
    about : provenance of the weights, JSON-ready: data, options, accuracies.

    Returns
    -------
    The path of the file.

    Raises
    ------
    FileFormatError : `about` is not plain JSON.
    OSError : the file cannot be written.
    """
    header = {"config": classifier.config, "about": about}
    return write_tensors(path, "classifier", dict(classifier.state_dict()), header)


def load_classifier(path: str | os.PathLike[str]) -> ImageClassifier:
    """Read a classifier written by :func:`save_classifier`.

    Parameters
    ----------
    path : safetensors file to read.

    Returns
    -------
    An :class:`ImageClassifier` in evaluation mode on the CPU, with gradients of the weights switched off.

    Raises
    ------
    FileFormatError : the file is missing, was not written by :func:`save_classifier`, or does not fit the network described
        in its header.
    """
    tensors, header = read_tensors(path, "classifier", _Header)
    options = header.config
    return filled(path, tensors, lambda: ImageClassifier(**vars(options)), len(options.channels))


def digits_classifier() -> ImageClassifier:
    """Load the classifier of 8x8 digits. Loading needs no data set; the model card states accuracy and seed.

    Returns
    -------
    An :class:`ImageClassifier` of images [B, 1, 8, 8], float32, in evaluation mode on the CPU.

    Raises
    ------
    FileFormatError : the file of weights is missing or damaged.
    """
    return load_classifier(DIGITS_CLASSIFIER)


def fashion_classifier() -> ImageClassifier:
    """Load the classifier of Fashion-MNIST. Loading needs no data set; the model card states accuracy and seed.

    Returns
    -------
    An :class:`ImageClassifier` of images [B, 1, 28, 28], float32, in evaluation mode on the CPU.

    Raises
    ------
    FileFormatError : the file of weights is missing or damaged.
    """
    return load_classifier(FASHION_CLASSIFIER)
