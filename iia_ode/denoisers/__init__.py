"""Denoisers and classifiers: the trained networks of the package, their data and training; thresholding of data estimates."""

from .classifier import (
    ClassifierOptions,
    ClassifierResult,
    ImageClassifier,
    digits_classifier,
    fashion_classifier,
    load_classifier,
    save_classifier,
    train_digits_classifier,
    train_fashion_classifier,
)
from .datasets import FASHION_CLASSES, FASHION_FOLDER, digits_data, fashion_data, patches_data
from .pretrained import (
    digits,
    fashion,
    load_denoiser,
    patches,
    save_denoiser,
    train_digits,
    train_fashion,
    train_patches,
)
from .thresholding import dynamic_thresholding, static_thresholding
from .training import TrainingOptions, TrainingResult
from .unet import EDMDenoiser, UNet

__all__ = [
    "FASHION_CLASSES",
    "FASHION_FOLDER",
    "ClassifierOptions",
    "ClassifierResult",
    "EDMDenoiser",
    "ImageClassifier",
    "TrainingOptions",
    "TrainingResult",
    "UNet",
    "digits",
    "digits_classifier",
    "digits_data",
    "dynamic_thresholding",
    "fashion",
    "fashion_classifier",
    "fashion_data",
    "load_classifier",
    "load_denoiser",
    "patches",
    "patches_data",
    "save_classifier",
    "save_denoiser",
    "static_thresholding",
    "train_digits",
    "train_digits_classifier",
    "train_fashion",
    "train_fashion_classifier",
    "train_patches",
]
