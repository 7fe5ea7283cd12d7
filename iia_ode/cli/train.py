"""``iia-ode train``: train the package's networks from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path

import click

from ..denoisers import TrainingOptions, TrainingResult, save_denoiser, train_digits, train_patches
from ..denoisers.pretrained import (
    DIGITS_OPTIONS,
    DIGITS_SOURCE,
    DIGITS_WEIGHTS,
    PATCHES_OPTIONS,
    PATCHES_SOURCE,
    PATCHES_WEIGHTS,
)
from ..files import check_writable
from .options import COUNT, SEED, interactive, usable_device

__all__ = ["train_group"]


@click.group("train", invoke_without_command=True)
@click.pass_context
def train_group(ctx: click.Context) -> None:
    """Train the package's networks from scratch."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _trains(weights: Path, source: str, defaults: TrainingOptions) -> Callable[..., Callable[..., None]]:
    """Add training options to a command.

    The command receives them as `TrainingOptions`, and its result is written to --out.
    """

    def decorate(command: Callable[[TrainingOptions, str], TrainingResult]) -> Callable[..., None]:
        @click.option("--steps", type=COUNT, default=defaults.steps, show_default=True, help="Optimizer steps.")
        @click.option("--batch", type=COUNT, default=defaults.batch, show_default=True, help="Images per step.")
        @click.option("--seed", type=SEED, default=defaults.seed, show_default=True)
        @click.option("--device", default="cpu", show_default=True, callback=usable_device)
        @click.option(
            "--out",
            type=click.Path(dir_okay=False, path_type=Path),
            default=weights.name,
            show_default=True,
            help="File to write.",
        )
        @wraps(command)
        def run(device: str, out: Path, **chosen: int) -> None:
            options = replace(defaults, **chosen)
            check_writable(out)
            result = command(options, device)
            about = {
                "data": source,
                "options": options.to_dict(),
                "train_loss": result.train_loss,
                "held_out_loss": result.held_out_loss,
            }
            save_denoiser(out, result.denoiser, about)
            click.echo(f"loss {result.train_loss:.4f}, held out {result.held_out_loss:.4f}; written: {out}")

        return run

    return decorate


@train_group.command("digits")
@_trains(DIGITS_WEIGHTS, DIGITS_SOURCE, DIGITS_OPTIONS)
def train_digits_command(options: TrainingOptions, device: str) -> TrainingResult:
    """Train the digits denoiser from scratch (about a quarter of an hour on two cores)."""
    return train_digits(options, device=device, progress=interactive())


@train_group.command("patches")
@_trains(PATCHES_WEIGHTS, PATCHES_SOURCE, PATCHES_OPTIONS)
def train_patches_command(options: TrainingOptions, device: str) -> TrainingResult:
    """Train the denoiser of photograph patches from scratch (about a quarter of an hour on two cores)."""
    return train_patches(options, device=device, progress=interactive())
