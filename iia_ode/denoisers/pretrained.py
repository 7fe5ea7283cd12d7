"""Trained denoisers inside the package: scikit-learn's 8x8 handwritten digits, and 16x16 patches of its photographs."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import FileFormatError, MissingDependencyError
from ..files import read_tensors, write_tensors
from .training import TrainingOptions, TrainingResult, train_edm
from .unet import EDMDenoiser, UNet

__all__ = [
    "DIGITS_OPTIONS",
    "DIGITS_WEIGHTS",
    "PATCHES_OPTIONS",
    "PATCHES_WEIGHTS",
    "digits",
    "digits_data",
    "load_denoiser",
    "patches",
    "patches_data",
    "save_denoiser",
    "train_digits",
    "train_patches",
]

_WEIGHTS = Path(__file__).parent / "weights"

DIGITS_WEIGHTS = _WEIGHTS / "digits.safetensors"
DIGITS_SOURCE = "scikit-learn load_digits: 1797 images of 8x8, scaled to [-1, 1]; a seeded tenth held out"
DIGITS_OPTIONS = TrainingOptions()

PATCHES_WEIGHTS = _WEIGHTS / "patches.safetensors"
PATCHES_SOURCE = (
    "scikit-learn load_sample_images: 16x16 patches of china.jpg and flower.jpg at full and half size, flipped too, "
    "scaled to [-1, 1]; a tenth of the cells of 64x64 pixels held out"
)
# An image of more pixels can be told from its noise at higher levels, so training levels lie higher than for the digits.
PATCHES_OPTIONS = TrainingOptions(steps=2400, batch=64, log_sigma_mean=0.0, log_sigma_std=1.8, label_dropout=0.0)


def digits() -> EDMDenoiser:
    """Load the trained digits denoiser, a data-prediction model for the EDM schedule.

    Call the model as ``model(x, sigma, class_labels=labels)``: x is float32 [B, 1, 8, 8] with white = +1 and black = -1,
    sigma is [B], and labels are integers [B] from 0 to 9. Label 10 means "no class" and serves the unconditional half of
    classifier-free guidance. ``iia-ode train digits`` made the weights; the model card beside the weights states data,
    losses and seed. Loading needs neither scikit-learn nor a network connection.

    Returns
    -------
    An :class:`EDMDenoiser` in evaluation mode on the CPU, float32, with gradients of the weights switched off.

    Raises
    ------
    FileFormatError : the file of weights is missing or damaged.
    """
    return load_denoiser(DIGITS_WEIGHTS)


def patches() -> EDMDenoiser:
    """Load the trained denoiser of photograph patches, a data-prediction model for the EDM schedule.

    Call the model as ``model(x, sigma)``: x is float32 [B, 3, 16, 16] with channels red, green and blue from -1 to +1, and
    sigma is [B]. The model has no classes. ``iia-ode train patches`` made the weights; the model card beside the weights
    states data, losses and seed. Loading needs neither scikit-learn nor a network connection.

    Returns
    -------
    An :class:`EDMDenoiser` in evaluation mode on the CPU, float32, with gradients of the weights switched off.

    Raises
    ------
    FileFormatError : the file of weights is missing or damaged.
    """
    return load_denoiser(PATCHES_WEIGHTS)


def digits_data() -> tuple[Tensor, Tensor]:
    """Load the digits data set. Needs the extra ``train``.

    Returns
    -------
    Images, float32 [1797, 1, 8, 8] in [-1, 1], and their labels, int64 [1797].

    Raises
    ------
    MissingDependencyError : scikit-learn is not installed.
    """
    data = _from_sklearn("digits", "load_digits")
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # the raw values are 0 to 16
    return images, torch.from_numpy(data.target).long()


def patches_data() -> tuple[Tensor, Tensor]:
    """Cut the patches data set from scikit-learn's two sample photographs. Needs the extra ``train``.

    Patches are squares of 16x16 pixels, and squares of 32x32 pixels halved in size, at every eighth pixel of each
    photograph. Each patch is also mirrored, left to right. For the split, each photograph is divided into cells of 64x64
    pixels, and one cell of each row of ten is held out. A patch inside the held-out cells is held out. A patch partly
    inside is left out, so no pixel is in both parts.

    Returns
    -------
    Patches, float32 [N, 3, 16, 16] in [-1, 1], and a mask of the held-out patches, bool [N].

    Raises
    ------
    MissingDependencyError : scikit-learn is not installed, or Pillow is not (scikit-learn reads the photographs with it).
    """
    found, held_out = [], []
    for photograph in _from_sklearn("sample photographs", "load_sample_images").images:
        image = torch.tensor(photograph).float().permute(2, 0, 1) / 127.5 - 1
        row, column = (torch.arange(size) // 64 for size in image.shape[1:])
        unseen = (3 * row[:, None] + column) % 10 == 5
        marked = torch.cat([image, unseen[None].float()])
        for size in (1, 2):
            cut = F.unfold(F.avg_pool2d(marked, size)[None], 16, stride=8 // size)[0].T.reshape(-1, 4, 16, 16)
            share = cut[:, 3].mean(dim=(1, 2))
            cut, share = cut[(share == 0) | (share == 1)], share[(share == 0) | (share == 1)]
            found += [cut[:, :3], cut[:, :3].flip(-1)]
            held_out += [share == 1] * 2
    return torch.cat(found), torch.cat(held_out)


def _from_sklearn(what: str, function: str) -> Any:
    """Call a function of ``sklearn.datasets`` by name."""
    try:
        return getattr(importlib.import_module("sklearn.datasets"), function)()
    except ImportError as error:  # scikit-learn is missing, or Pillow, with which scikit-learn reads its photographs
        raise MissingDependencyError(f"the {what} come with scikit-learn: pip install 'iia-ode[train]'.") from error


def train_digits(
    options: TrainingOptions = DIGITS_OPTIONS, *, device: str = "cpu", progress: bool = True
) -> TrainingResult:
    """Train the digits denoiser from scratch. The same options on the same machine give the same weights.

    Parameters
    ----------
    options : length, learning rate, noise levels and seed of the training.
    device : device of the network, such as ``"cpu"`` or ``"cuda"``.
    progress : whether to show a progress bar.

    Returns
    -------
    A :class:`TrainingResult`: the denoiser, and its losses on training and held-out images.

    Raises
    ------
    MissingDependencyError : scikit-learn is not installed (extra ``train``).
    """
    images, labels = digits_data()
    network = {"channels": (48, 72), "embedding": 96}
    return _train(network, images, labels, options, device=device, progress=progress)


def train_patches(
    options: TrainingOptions = PATCHES_OPTIONS, *, device: str = "cpu", progress: bool = True
) -> TrainingResult:
    """Train the denoiser of photograph patches from scratch. The same options on the same machine give the same weights.

    Parameters
    ----------
    options : length, learning rate, noise levels and seed of the training.
    device : device of the network, such as ``"cpu"`` or ``"cuda"``.
    progress : whether to show a progress bar.

    Returns
    -------
    A :class:`TrainingResult`: the denoiser, and its losses on training and held-out patches.

    Raises
    ------
    MissingDependencyError : scikit-learn or Pillow is not installed (extra ``train``).
    """
    images, held_out = patches_data()
    network = {"channels": (32, 40, 48), "classes": 0, "embedding": 96, "dropout": 0.0}
    return _train(network, images, None, options, held_out=held_out, device=device, progress=progress)


def _train(
    network: dict[str, Any], images: Tensor, labels: Tensor | None, options: TrainingOptions, **how: Any
) -> TrainingResult:
    """Call :func:`train_edm` with a network of the images' shape and standard deviation."""
    sigma_data = round(float(images.std()), 3)
    channels, height, width = images.shape[1:]

    def build() -> EDMDenoiser:
        return EDMDenoiser(UNet(image_channels=channels, **network), sigma_data, (channels, height, width))

    return train_edm(build, images, labels, options, **how)


@dataclass(frozen=True)
class _Network:
    """The options of a :class:`~iia_ode.denoisers.UNet`."""

    image_channels: int
    channels: tuple[int, ...]
    blocks: int
    classes: int
    embedding: int
    dropout: float


@dataclass(frozen=True)
class _Config:
    """The configuration of an :class:`EDMDenoiser`."""

    network: _Network
    sigma_data: float
    state_shape: tuple[int, int, int]


@dataclass(frozen=True)
class _Header:
    """The header of a denoiser's file."""

    config: _Config
    about: dict[str, Any] = field(default_factory=dict)


def save_denoiser(path: str | os.PathLike[str], denoiser: EDMDenoiser, about: dict[str, Any]) -> Path:
    """Write a denoiser as one safetensors file, atomically.

    Parameters
    ----------
    path : file to write; an existing file is replaced.
    denoiser : denoiser to store, with the settings of its network.
    about : provenance of the weights, JSON-ready: data, options, losses.

    Returns
    -------
    The path of the file.

    Raises
    ------
    FileFormatError : `about` is not plain JSON.
    OSError : the file cannot be written.
    """
    header = {"config": denoiser.config, "about": about}
    return write_tensors(path, "denoiser", dict(denoiser.state_dict()), header)


def load_denoiser(path: str | os.PathLike[str]) -> EDMDenoiser:
    """Read a denoiser written by :func:`save_denoiser`.

    Parameters
    ----------
    path : safetensors file to read.

    Returns
    -------
    An :class:`EDMDenoiser` in evaluation mode on the CPU, with gradients of the weights switched off.

    Raises
    ------
    FileFormatError : the file is missing, was not written by :func:`save_denoiser`, or does not fit the network described
        in its header.
    """
    tensors, header = read_tensors(path, "denoiser", _Header)
    config, network = header.config, header.config.network
    try:
        if network.blocks * len(network.channels) > len(tensors):
            raise ValueError(f"more blocks than the {len(tensors)} tensors")
        with torch.device("meta"):  # no memory for weights: the file has them
            denoiser = EDMDenoiser(UNet(**vars(network)), config.sigma_data, config.state_shape)
        denoiser.load_state_dict(tensors, assign=True)
        if len({v.dtype for v in tensors.values()}) != 1 or not denoiser.network.head.weight.is_floating_point():
            raise ValueError("the weights have several dtypes, or are not floating-point numbers")
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{str(path)!r} does not hold the network that its header describes: {error}.") from error
    return denoiser.frozen()
