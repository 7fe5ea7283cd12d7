"""Trained networks that ship with the package, and how they were trained."""

from .pretrained import digits, digits_data, load_denoiser, save_denoiser, train_digits
from .training import TrainingOptions, TrainingResult
from .unet import EDMDenoiser, UNet

__all__ = [
    "EDMDenoiser",
    "TrainingOptions",
    "TrainingResult",
    "UNet",
    "digits",
    "digits_data",
    "load_denoiser",
    "save_denoiser",
    "train_digits",
]
