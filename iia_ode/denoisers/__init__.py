"""Denoisers: the trained networks of the package, their training, and thresholding of any model's data estimates."""

from .pretrained import (
    digits,
    digits_data,
    load_denoiser,
    patches,
    patches_data,
    save_denoiser,
    train_digits,
    train_patches,
)
from .thresholding import dynamic_thresholding, static_thresholding
from .training import TrainingOptions, TrainingResult
from .unet import EDMDenoiser, UNet

__all__ = [
    "EDMDenoiser",
    "TrainingOptions",
    "TrainingResult",
    "UNet",
    "digits",
    "digits_data",
    "dynamic_thresholding",
    "load_denoiser",
    "patches",
    "patches_data",
    "save_denoiser",
    "static_thresholding",
    "train_digits",
    "train_patches",
]
