"""Training of the small networks that ship with the package [Karras et al. 2022, section 5]."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import check_whole
from ..errors import InputError
from .unet import EDMDenoiser

__all__ = ["TrainingOptions", "TrainingResult", "edm_loss", "train_edm"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """How a denoiser is trained.

    Parameters
    ----------
    steps, batch : optimiser steps and images a step.
    lr : peak learning rate of Adam; linear warm-up over 200 steps, then cosine decay to zero.
    log_sigma_mean, log_sigma_std : training noise levels are log-normal. Wider than EDM's (-1.2, 1.2), so that levels
        up to 80 and down to 0.002 are within three and a half standard deviations: a solver visits them all.
    label_dropout : share of labels replaced by the null label, so that guidance works [Ho & Salimans 2022].
    ema : decay of the weight average, ramped up from zero over the first steps.
    seed : of initialisation, batches, noise and dropout.
    """

    steps: int = 4000
    batch: int = 96
    lr: float = 1.5e-3
    log_sigma_mean: float = -0.5
    log_sigma_std: float = 1.7
    label_dropout: float = 0.15
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            check_whole(f"{name} of the training", getattr(self, name), least=1)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingResult:
    """The averaged denoiser with its weighted losses on training and held-out images (1 = predicting nothing)."""

    denoiser: EDMDenoiser
    train_loss: float
    held_out_loss: float


def edm_loss(denoiser: EDMDenoiser, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean weighted denoising loss, lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, a 0-dim tensor.

    Shapes: images and noise [B, C, H, W]; labels and sigma [B].
    """
    d = denoiser.sigma_data
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    error = denoiser(images + sigma[:, None, None, None] * noise, sigma, labels) - images
    loss: Tensor = (weight * error.square().mean(dim=(1, 2, 3))).mean()
    return loss


def train_edm(
    build: Any,
    images: Tensor,
    labels: Tensor | None,
    options: TrainingOptions,
    *,
    held_out: float | Tensor = 0.1,
    device: str = "cpu",
    progress: bool = True,
) -> TrainingResult:
    """Train a denoiser and return the average of its weights.

    Parameters
    ----------
    build : function without arguments that makes the :class:`EDMDenoiser`; called after the seed is set.
    images, labels : all data, [N, C, H, W] float32 and [N] int64; None for images without labels.
    held_out : what is kept for the report: a share, drawn with the seed, or which images [N] bool.

    Raises
    ------
    InputError : nothing is held out, or everything.
    """
    # All numbers are drawn on the CPU: the same ones wherever the network is trained.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(options.seed)
        denoiser: EDMDenoiser = build().to(device).train()
        null = denoiser.network.classes
        if labels is None:
            labels = torch.full((len(images),), null)
        seen, unseen = _split(len(images), held_out)
        train, test = ((images[part].to(device), labels[part].to(device)) for part in (seen, unseen))
        average = copy.deepcopy(denoiser).frozen()
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=options.lr, betas=(0.9, 0.99))
        bar = tqdm(range(options.steps), desc="train", disable=not progress, mininterval=1.0)
        for step in bar:
            pick = torch.randint(len(train[0]), (options.batch,))
            x, y = train[0][pick], train[1][pick]
            y = torch.where(torch.rand(options.batch) < options.label_dropout, torch.full_like(y, null), y)
            sigma = _noise_levels(options, options.batch).to(device)
            loss = edm_loss(denoiser, x, y, sigma, torch.randn(x.shape).to(device))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * _rate(step, options.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            decay = min(options.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for a, p in zip(average.parameters(), denoiser.parameters(), strict=True):
                    a.lerp_(p, 1 - decay)
            if step % 100 == 0:
                bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
        report = [_evaluate(average, _some(x), _some(y), options) for x, y in (train, test)]
    logger.info("trained: loss %.4f, held-out loss %.4f", *report)
    return TrainingResult(average.cpu(), *report)


def _split(count: int, held_out: float | Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on, and of those held out."""
    if isinstance(held_out, Tensor):
        seen, unseen = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    else:
        order, kept = torch.randperm(count), int(held_out * count)
        seen, unseen = order[kept:], order[:kept]
    if not len(seen) or not len(unseen):
        raise InputError(f"of {count} images, {len(unseen)} would be held out: some must be, and not all.")
    return seen, unseen


def _noise_levels(options: TrainingOptions, count: int) -> Tensor:
    return (options.log_sigma_mean + options.log_sigma_std * torch.randn(count)).exp()


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _some(items: Tensor) -> Tensor:
    """Evenly spaced items, at most 2048: as many as the report needs."""
    return items[:: -(-len(items) // 2048)]


@torch.no_grad()
def _evaluate(denoiser: EDMDenoiser, images: Tensor, labels: Tensor, options: TrainingOptions) -> float:
    """Loss with true labels, every image at four noise levels drawn with a fixed seed."""
    torch.manual_seed(options.seed + 1)
    total, count = 0.0, 0
    for _ in range(4):
        for x, y in zip(torch.split(images, 256), torch.split(labels, 256), strict=True):
            sigma = _noise_levels(options, len(x)).to(x.device)
            total += float(edm_loss(denoiser, x, y, sigma, torch.randn(x.shape).to(x.device))) * len(x)
            count += len(x)
    return total / count
