"""Trained networks inside the package: of scikit-learn's 8x8 handwritten digits, and of 16x16 patches of its photographs."""

from __future__ import annotations

import importlib
import os
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
# More pixels tell an image from its noise at higher levels: the levels lie higher than those of the digits.
PATCHES_OPTIONS = TrainingOptions(steps=2400, batch=64, log_sigma_mean=0.0, log_sigma_std=1.8, label_dropout=0.0)


def digits() -> EDMDenoiser:
    """The trained digits denoiser, in evaluation mode on the CPU: a data-prediction model for the EDM schedule.

    Called as ``model(x, sigma, class_labels=labels)`` with x [B, 1, 8, 8] in float32, white = +1 and black = -1; labels
    0 to 9, and 10 for "no class" (the unconditional half of classifier-free guidance). Made by ``iia-ode train digits``;
    data, losses and seed are on the model card beside the weights. Needs neither scikit-learn nor a network connection.
    """
    return load_denoiser(DIGITS_WEIGHTS)


def patches() -> EDMDenoiser:
    """The trained denoiser of photograph patches, in evaluation mode on the CPU: data prediction for the EDM schedule.

    Called as ``model(x, sigma)`` with x [B, 3, 16, 16] in float32, channels red, green, blue from -1 to +1; it has no
    classes. Made by ``iia-ode train patches``; data, losses and seed are on the model card beside the weights. Needs
    neither scikit-learn nor a network connection.
    """
    return load_denoiser(PATCHES_WEIGHTS)


def digits_data() -> tuple[Tensor, Tensor]:
    """The 1797 images [1797, 1, 8, 8] float32 in [-1, 1] and their labels [1797] int64 (needs the extra ``train``)."""
    data = _from_sklearn("digits", "load_digits")
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # the raw values are 0 to 16
    return images, torch.from_numpy(data.target).long()


def patches_data() -> tuple[Tensor, Tensor]:
    """The patches [N, 3, 16, 16] float32 in [-1, 1], and which of them are held out [N] bool (needs the extra ``train``).

    Squares of 16x16 pixels, and of 32x32 pixels halved in size, at every eighth pixel of both sample photographs; each
    also mirrored, left to right. Each photograph is divided into cells of 64x64 pixels, and one cell of each row of ten is
    held out. A patch inside the held-out cells is held out, and one that only touches them is left out: no pixel is in
    both parts.
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
    """What a function of ``sklearn.datasets`` returns."""
    try:
        return getattr(importlib.import_module("sklearn.datasets"), function)()
    except ImportError as error:  # of scikit-learn, or of Pillow, which reads its photographs
        raise MissingDependencyError(f"the {what} come with scikit-learn: pip install 'iia-ode[train]'.") from error


def train_digits(
    options: TrainingOptions = DIGITS_OPTIONS, *, device: str = "cpu", progress: bool = True
) -> TrainingResult:
    """Train the digits denoiser from scratch; the same options and machine give the same weights."""
    images, labels = digits_data()
    network = {"channels": (48, 72), "embedding": 96}
    return _train(network, images, labels, options, device=device, progress=progress)


def train_patches(
    options: TrainingOptions = PATCHES_OPTIONS, *, device: str = "cpu", progress: bool = True
) -> TrainingResult:
    """Train the denoiser of photograph patches from scratch; the same options and machine give the same weights."""
    images, held_out = patches_data()
    network = {"channels": (32, 40, 48), "classes": 0, "embedding": 96, "dropout": 0.0}
    return _train(network, images, None, options, held_out=held_out, device=device, progress=progress)


def _train(
    network: dict[str, Any], images: Tensor, labels: Tensor | None, options: TrainingOptions, **how: Any
) -> TrainingResult:
    """:func:`train_edm` on the network that fits the images, with their standard deviation."""
    sigma_data = round(float(images.std()), 3)
    channels, height, width = images.shape[1:]

    def build() -> EDMDenoiser:
        return EDMDenoiser(UNet(image_channels=channels, **network), sigma_data, (channels, height, width))

    return train_edm(build, images, labels, options, **how)


def save_denoiser(path: str | os.PathLike[str], denoiser: EDMDenoiser, about: dict[str, Any]) -> Path:
    """Write a denoiser as one safetensors file; `about` (JSON-ready) says where it comes from."""
    header = {"config": denoiser.config, "about": about}
    return write_tensors(path, "denoiser", dict(denoiser.state_dict()), header)


def load_denoiser(path: str | os.PathLike[str]) -> EDMDenoiser:
    """Read a denoiser written by :func:`save_denoiser`, in evaluation mode on the CPU.

    Raises
    ------
    FileFormatError : the file is missing, foreign, or does not fit the network that its header describes.
    """
    tensors, header = read_tensors(path, "denoiser")
    try:
        config = header["config"]
        with torch.device("cpu"):  # whatever the default device is
            network = UNet(**{**config["network"], "channels": tuple(config["network"]["channels"])})
            denoiser = EDMDenoiser(network, config["sigma_data"], tuple(config["state_shape"]))
        denoiser.load_state_dict(tensors)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{str(path)!r} does not hold the network that its header describes: {error}.") from error
    return denoiser.frozen()
