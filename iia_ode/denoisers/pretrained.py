"""Trained networks inside the package: the digits denoiser, on scikit-learn's 8x8 handwritten digits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError, MissingDependencyError
from ..files import read_tensors, write_tensors
from .training import TrainingOptions, TrainingResult, train_edm
from .unet import EDMDenoiser, UNet

__all__ = ["DIGITS_WEIGHTS", "digits", "digits_data", "load_denoiser", "save_denoiser", "train_digits"]

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits.safetensors"
DIGITS_SOURCE = "scikit-learn load_digits: 1797 images of 8x8, scaled to [-1, 1]; a seeded tenth held out"


def digits() -> EDMDenoiser:
    """The trained digits denoiser, in evaluation mode on the CPU: a data-prediction model for the EDM schedule.

    Called as ``model(x, sigma, class_labels=labels)`` with x [B, 1, 8, 8] in float32, white = +1 and black = -1; labels
    0 to 9, and 10 for "no class" (the unconditional half of classifier-free guidance). Made by ``iia-ode train digits``;
    data, losses and seed are on the model card beside the weights. Needs neither scikit-learn nor a network connection.
    """
    return load_denoiser(DIGITS_WEIGHTS)


def digits_data() -> tuple[Tensor, Tensor]:
    """The 1797 images [1797, 1, 8, 8] float32 in [-1, 1] and their labels [1797] int64 (needs the extra ``train``)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the digits come with scikit-learn: pip install 'iia-ode[train]'.") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # the raw values are 0 to 16
    return images, torch.from_numpy(data.target).long()


def train_digits(options: TrainingOptions, *, device: str = "cpu", progress: bool = True) -> TrainingResult:
    """Train the digits denoiser from scratch; the same options and machine give the same weights."""
    images, labels = digits_data()
    sigma_data = round(float(images.std()), 3)

    def build() -> EDMDenoiser:
        return EDMDenoiser(UNet(channels=(48, 72), embedding=96), sigma_data, (1, 8, 8))

    return train_edm(build, images, labels, options, device=device, progress=progress)


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
    return denoiser.eval().requires_grad_(False)
