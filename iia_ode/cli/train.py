"""``iia-ode train``: train the package's networks from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import click

from ..denoisers import (
    FASHION_FOLDER,
    ClassifierOptions,
    ClassifierResult,
    TrainingOptions,
    TrainingResult,
    save_classifier,
    save_denoiser,
    train_digits,
    train_digits_classifier,
    train_fashion,
    train_fashion_classifier,
    train_patches,
)
from ..denoisers.classifier import (
    DIGITS_CLASSIFIER,
    DIGITS_CLASSIFIER_OPTIONS,
    DIGITS_CLASSIFIER_SOURCE,
    FASHION_CLASSIFIER,
    FASHION_CLASSIFIER_OPTIONS,
)
from ..denoisers.datasets import DIGITS_SOURCE, FASHION_SOURCE, PATCHES_SOURCE
from ..denoisers.pretrained import (
    DIGITS_OPTIONS,
    DIGITS_WEIGHTS,
    FASHION_HALFWAY,
    FASHION_OPTIONS,
    FASHION_WEIGHTS,
    PATCHES_OPTIONS,
    PATCHES_WEIGHTS,
)
from ..files import check_writable
from .options import COUNT, SEED, interactive, usable_device

__all__ = ["train_group"]

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("train", invoke_without_command=True)
@click.pass_context
def train_group(ctx: click.Context) -> None:
    """Train the package's networks from scratch."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _out(default: Path) -> Callable[..., Callable[..., None]]:
    return click.option("--out", type=_FILE, default=default.name, show_default=True, help="File to write.")


def _data() -> Callable[..., Callable[..., None]]:
    text = "Folder of the four gzipped files of Fashion-MNIST."
    folder = click.Path(file_okay=False, path_type=Path)
    return click.option("--data", type=folder, default=FASHION_FOLDER, show_default=True, help=text)


def _trains(
    weights: Path, source: str, defaults: TrainingOptions, *, halfway: Path | None = None, half_precision: bool = False
) -> Callable[..., Callable[..., None]]:
    """Add training options to a command.

    The command receives them as `TrainingOptions`, and its result is written to --out and --halfway.
    """

    def decorate(command: Callable[..., TrainingResult]) -> Callable[..., None]:
        @click.option("--steps", type=COUNT, default=defaults.steps, show_default=True, help="Optimizer steps.")
        @click.option("--batch", type=COUNT, default=defaults.batch, show_default=True, help="Images per step.")
        @click.option("--seed", type=SEED, default=defaults.seed, show_default=True)
        @click.option("--device", default="cpu", show_default=True, callback=usable_device)
        @_out(weights)
        @click.option(
            "--halfway",
            type=_FILE,
            default=halfway and halfway.name,
            show_default=True,
            help="File to write with the weights after half of the steps.",
        )
        @click.option(
            "--checkpoint",
            type=_FILE,
            help="File of the training's state. If the file exists, the training continues from it.",
        )
        @wraps(command)
        def run(
            device: str,
            out: Path,
            halfway: Path | None,
            checkpoint: Path | None,
            steps: int,
            batch: int,
            seed: int,
            **own: Any,
        ) -> None:
            options = replace(defaults, steps=steps, batch=batch, seed=seed)
            for file in (out, halfway, checkpoint):
                if file is not None:
                    check_writable(file)
            result = command(options, device=device, progress=interactive(), checkpoint=checkpoint, **own)
            about = {"data": source, "options": options.to_dict()}
            losses = {"train_loss": result.train_loss, "held_out_loss": result.held_out_loss}
            if half_precision:
                for denoiser in (result.denoiser, result.halfway):
                    denoiser.half()
            save_denoiser(out, result.denoiser, about | losses)
            if halfway is not None:
                save_denoiser(halfway, result.halfway, about | {"made_steps": (steps + 1) // 2})
            click.echo(f"loss {result.train_loss:.4f}, held out {result.held_out_loss:.4f}; written: {out}")

        return run

    return decorate


@train_group.command("digits")
@_trains(DIGITS_WEIGHTS, DIGITS_SOURCE, DIGITS_OPTIONS)
def train_digits_command(options: TrainingOptions, **how: Any) -> TrainingResult:
    """Train the digits denoiser from scratch (about a quarter of an hour on two cores)."""
    return train_digits(options, **how)


@train_group.command("fashion")
@_data()
@click.option(
    "--classifier",
    type=_FILE,
    default=FASHION_CLASSIFIER.name,
    show_default=True,
    help="File of the classifier of the same images. Where the file is missing, the classifier is trained first.",
)
@_trains(FASHION_WEIGHTS, FASHION_SOURCE, FASHION_OPTIONS, halfway=FASHION_HALFWAY, half_precision=True)
def train_fashion_command(options: TrainingOptions, data: Path, classifier: Path, **how: Any) -> TrainingResult:
    """Train the denoiser and the classifier of Fashion-MNIST from scratch (about 38 minutes on one core)."""
    if not classifier.exists():
        check_writable(classifier)
        found = train_fashion_classifier(FASHION_CLASSIFIER_OPTIONS, folder=data, progress=how["progress"])
        _write_classifier(found, FASHION_CLASSIFIER_OPTIONS, FASHION_SOURCE, classifier)
    return train_fashion(options, folder=data, **how)


@train_group.command("patches")
@_trains(PATCHES_WEIGHTS, PATCHES_SOURCE, PATCHES_OPTIONS)
def train_patches_command(options: TrainingOptions, **how: Any) -> TrainingResult:
    """Train the denoiser of photograph patches from scratch (about a quarter of an hour on two cores)."""
    return train_patches(options, **how)


def _write_classifier(result: ClassifierResult, options: ClassifierOptions, source: str, out: Path) -> None:
    """Write a classifier with its provenance, and print its accuracies."""
    accuracies = {"train_accuracy": result.train_accuracy, "test_accuracy": result.test_accuracy}
    save_classifier(out, result.classifier, {"data": source, "options": options.to_dict(), **accuracies})
    click.echo(f"accuracy {result.train_accuracy:.2%}, on test images {result.test_accuracy:.2%}; written: {out}")


def _trains_classifier(weights: Path, source: str, defaults: ClassifierOptions) -> Callable[..., Callable[..., None]]:
    """Add training options to a command, which receives them as `ClassifierOptions`; its result is written to --out."""

    def decorate(command: Callable[..., ClassifierResult]) -> Callable[..., None]:
        @click.option(
            "--epochs", type=COUNT, default=defaults.epochs, show_default=True, help="Passes over the images."
        )
        @click.option("--batch", type=COUNT, default=defaults.batch, show_default=True, help="Images per step.")
        @click.option("--seed", type=SEED, default=defaults.seed, show_default=True)
        @_out(weights)
        @wraps(command)
        def run(out: Path, epochs: int, batch: int, seed: int, **own: Any) -> None:
            options = replace(defaults, epochs=epochs, batch=batch, seed=seed)
            check_writable(out)
            _write_classifier(command(options, progress=interactive(), **own), options, source, out)

        return run

    return decorate


@train_group.command("digits-classifier")
@_trains_classifier(DIGITS_CLASSIFIER, DIGITS_CLASSIFIER_SOURCE, DIGITS_CLASSIFIER_OPTIONS)
def train_digits_classifier_command(options: ClassifierOptions, **how: Any) -> ClassifierResult:
    """Train the classifier of digits from scratch (less than a minute)."""
    return train_digits_classifier(options, **how)


@train_group.command("fashion-classifier")
@_data()
@_trains_classifier(FASHION_CLASSIFIER, FASHION_SOURCE, FASHION_CLASSIFIER_OPTIONS)
def train_fashion_classifier_command(options: ClassifierOptions, data: Path, **how: Any) -> ClassifierResult:
    """Train the classifier of Fashion-MNIST from scratch (about three minutes on one core)."""
    return train_fashion_classifier(options, folder=data, **how)
