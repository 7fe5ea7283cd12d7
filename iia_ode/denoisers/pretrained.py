"""Trained denoisers inside the package: handwritten digits of 8x8, photograph patches of 16x16, and clothing of 28x28."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_tensors, write_tensors
from .checkpoints import filled
from .datasets import FASHION_FOLDER, digits_data, fashion_data, patches_data
from .training import TrainingOptions, TrainingResult, train_edm
from .unet import EDMDenoiser, UNet

__all__ = [
    "DIGITS_OPTIONS",
    "DIGITS_WEIGHTS",
    "FASHION_HALFWAY",
    "FASHION_OPTIONS",
    "FASHION_WEIGHTS",
    "PATCHES_OPTIONS",
    "PATCHES_WEIGHTS",
    "digits",
    "fashion",
    "load_denoiser",
    "patches",
    "save_denoiser",
    "train_digits",
    "train_fashion",
    "train_patches",
]

_WEIGHTS = Path(__file__).parent / "weights"

DIGITS_WEIGHTS = _WEIGHTS / "digits.safetensors"
DIGITS_OPTIONS = TrainingOptions()

PATCHES_WEIGHTS = _WEIGHTS / "patches.safetensors"
# An image of more pixels can be told from its noise at higher levels, so training levels lie higher than for the digits.
PATCHES_OPTIONS = TrainingOptions(steps=2400, batch=64, log_sigma_mean=0.0, log_sigma_std=1.8, label_dropout=0.0)

FASHION_WEIGHTS = _WEIGHTS / "fashion.safetensors"
FASHION_HALFWAY = _WEIGHTS / "fashion-halfway.safetensors"
FASHION_OPTIONS = TrainingOptions(steps=2600, batch=64, log_sigma_mean=-0.3)


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


def fashion(*, halfway: bool = False) -> EDMDenoiser:
    """Load the trained denoiser of Fashion-MNIST, a data-prediction model for the EDM schedule.

    Call the model as ``model(x, sigma, class_labels=labels)``: x is float32 [B, 1, 28, 28] with white = +1 and black = -1,
    sigma is [B], and labels are integers [B] from 0 to 9, see :data:`~iia_ode.denoisers.FASHION_CLASSES`. Label 10 means
    "no class" and serves the unconditional half of classifier-free guidance. ``iia-ode train fashion`` made the weights; the
    model card beside the weights states data, losses and seed. Loading needs neither the data set nor a network connection.
    The weights are stored in float16.

    Parameters
    ----------
    halfway : whether to load the weights after half of the same training instead.

    Returns
    -------
    An :class:`EDMDenoiser` in evaluation mode on the CPU, float32, with gradients of the weights switched off.

    Raises
    ------
    FileFormatError : the file of weights is missing or damaged.
    """
    return load_denoiser(FASHION_HALFWAY if halfway else FASHION_WEIGHTS).float()


def train_digits(
    options: TrainingOptions = DIGITS_OPTIONS,
    *,
    device: str = "cpu",
    progress: bool = True,
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train the digits denoiser from scratch. The same options on the same machine give the same weights.

    Parameters
    ----------
    options : length, learning rate, noise levels and seed of the training.
    device : device of the network, such as ``"cpu"`` or ``"cuda"``.
    progress : whether to show a progress bar.
    checkpoint : file for the state of the training, written every two minutes. If the file exists, the training continues
        from it.

    Returns
    -------
    A :class:`TrainingResult`: the denoiser, and its losses on training and held-out images.

    Raises
    ------
    MissingDependencyError : scikit-learn is not installed (extra ``train``).
    """
    images, labels = digits_data()
    network = {"channels": (48, 72), "embedding": 96}
    return _train(network, images, labels, options, device=device, progress=progress, checkpoint=checkpoint)


def train_patches(
    options: TrainingOptions = PATCHES_OPTIONS,
    *,
    device: str = "cpu",
    progress: bool = True,
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train the denoiser of photograph patches from scratch. The same options on the same machine give the same weights.

    Parameters
    ----------
    options : length, learning rate, noise levels and seed of the training.
    device : device of the network, such as ``"cpu"`` or ``"cuda"``.
    progress : whether to show a progress bar.
    checkpoint : file for the state of the training, written every two minutes. If the file exists, the training continues
        from it.

    Returns
    -------
    A :class:`TrainingResult`: the denoiser, and its losses on training and held-out patches.

    Raises
    ------
    MissingDependencyError : scikit-learn or Pillow is not installed (extra ``train``).
    """
    images, held_out = patches_data()
    network = {"channels": (32, 40, 48), "classes": 0, "embedding": 96, "dropout": 0.0}
    return _train(
        network, images, None, options, held_out=held_out, device=device, progress=progress, checkpoint=checkpoint
    )


def train_fashion(
    options: TrainingOptions = FASHION_OPTIONS,
    *,
    folder: str | os.PathLike[str] = FASHION_FOLDER,
    device: str = "cpu",
    progress: bool = True,
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train the denoiser of Fashion-MNIST from scratch. The same options on the same machine give the same weights.

    Parameters
    ----------
    options : length, learning rate, noise levels and seed of the training.
    folder : folder of the data, see :func:`fashion_data`.
    device : device of the network, such as ``"cpu"`` or ``"cuda"``.
    progress : whether to show a progress bar.
    checkpoint : file for the state of the training, written every two minutes. If the file exists, the training continues
        from it.

    Returns
    -------
    A :class:`TrainingResult`: the denoiser, and its losses on training and test images.

    Raises
    ------
    MissingDependencyError : the folder does not have the data.
    FileFormatError : a file of the data is damaged.
    """
    images, labels, test = fashion_data(folder)
    network = {"channels": (32, 64), "dropout": 0.0, "patch": 2}
    how = {"device": device, "progress": progress, "checkpoint": checkpoint}
    return _train(network, images, labels, options, held_out=test, **how)


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
    patch: int = 1


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
    return filled(
        path,
        tensors,
        lambda: EDMDenoiser(UNet(**vars(network)), config.sigma_data, config.state_shape),
        network.blocks * len(network.channels),
    )
