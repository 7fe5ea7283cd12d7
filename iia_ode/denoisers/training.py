"""Training of the small networks inside the package [Karras et al. 2022, section 5]."""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import check_whole
from ..errors import InputError
from .checkpoints import load_training, save_training
from .unet import EDMDenoiser

__all__ = ["TrainingOptions", "TrainingResult", "edm_loss", "train_edm"]

logger = logging.getLogger(__name__)

_SECONDS = 120.0  # between two writings of a training's state


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a denoiser's training.

    Parameters
    ----------
    steps : number of optimizer steps, at least 1.
    batch : images per step, at least 1.
    lr : peak learning rate of Adam. The rate warms up linearly over 200 steps and decays to zero along a cosine.
    log_sigma_mean, log_sigma_std : mean and standard deviation of log(sigma) in training, where sigma is log-normal. The
        defaults are wider than EDM's (-1.2, 1.2), because a solver visits all levels from 0.002 to 80. With the defaults,
        all of these levels lie within three and a half standard deviations of the mean.
    label_dropout : share of labels replaced by the null label, for classifier-free guidance [Ho & Salimans 2022].
    ema : decay per step of the exponential moving average of the weights. In the first steps the decay is smaller.
    seed : seed of initialization, batches, noise and dropout.

    Raises
    ------
    InputError : `steps` or `batch` is below 1.
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
        """Return all options by name, as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training.

    The losses are means of :func:`edm_loss` over at most 2048 images each, at four noise levels per image. A network that
    predicts nothing has loss 1.

    Attributes
    ----------
    denoiser : denoiser with averaged weights, in evaluation mode on the CPU.
    train_loss : loss on training images.
    held_out_loss : loss on held-out images.
    halfway : denoiser with the averaged weights after half of the steps, rounded up: a second, less trained model of the
        same data. In evaluation mode on the CPU.
    """

    denoiser: EDMDenoiser
    train_loss: float
    held_out_loss: float
    halfway: EDMDenoiser


def edm_loss(denoiser: EDMDenoiser, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Compute the mean denoising loss with weight lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    Parameters
    ----------
    denoiser : denoiser to judge; its `sigma_data` enters the weight.
    images : clean images [B, C, H, W].
    labels : integer class labels [B].
    sigma : noise levels [B].
    noise : standard normal noise [B, C, H, W]. The denoiser sees ``images + sigma * noise``.

    Returns
    -------
    The loss, a differentiable 0-dim tensor.
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
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train a denoiser and return it with averaged weights.

    Parameters
    ----------
    build : function without arguments that makes the :class:`EDMDenoiser`. The function is called after the seed is set.
    images : all images, training and held-out, float32 [N, C, H, W].
    labels : class labels of all images, int64 [N]; None for images without labels.
    options : length, learning rate, noise levels and seed of the training.
    held_out : images kept for the held-out loss. A number is the share of images to draw with the seed; a bool tensor [N]
        marks the images.
    device : device of the network. Random numbers are drawn on the CPU and do not depend on the device.
    progress : whether to show a progress bar.
    checkpoint : file for the state of the training, written every two minutes. If the file exists, the training continues
        from it. On the CPU, the result is that of an uninterrupted training.

    Returns
    -------
    A :class:`TrainingResult`: the denoiser, and its losses on training and held-out images.

    Raises
    ------
    InputError : no image is held out, or every image is.
    FileFormatError : the checkpoint is damaged or belongs to another network.
    MismatchError : the checkpoint belongs to a training with other options.
    """
    # Random numbers are drawn on the CPU, so every device trains on the same noise.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(options.seed)
        denoiser: EDMDenoiser = build().to(device).train()
        null = denoiser.network.classes
        if labels is None:
            labels = torch.full((len(images),), null)
        seen, unseen = _split(len(images), held_out)
        train, test = ((images[part].to(device), labels[part].to(device)) for part in (seen, unseen))
        average = copy.deepcopy(denoiser).frozen()
        halfway = copy.deepcopy(average)
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=options.lr, betas=(0.9, 0.99))
        modules = {"denoiser": denoiser, "average": average, "halfway": halfway}
        state = options.to_dict(), modules, optimizer
        begin = load_training(checkpoint, *state) if checkpoint is not None and checkpoint.exists() else 0
        written = time.monotonic()
        bar = tqdm(
            range(begin, options.steps), "train", options.steps, initial=begin, disable=not progress, mininterval=1.0
        )
        for step in bar:
            loss = _step(denoiser, optimizer, train, options, step, device)
            decay = min(options.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for a, p in zip(average.parameters(), denoiser.parameters(), strict=True):
                    a.lerp_(p, 1 - decay)
            if step + 1 == (options.steps + 1) // 2:
                halfway.load_state_dict(average.state_dict())
            if step % 100 == 0:
                bar.set_postfix(loss=f"{float(loss):.4f}")
            if checkpoint is not None and time.monotonic() > written + _SECONDS:
                save_training(checkpoint, step + 1, *state)
                written = time.monotonic()
        report = [_evaluate(average, _some(x), _some(y), options) for x, y in (train, test)]
    logger.info("trained: loss %.4f, held-out loss %.4f", *report)
    return TrainingResult(average.cpu(), report[0], report[1], halfway.cpu())


def _step(
    denoiser: EDMDenoiser,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    options: TrainingOptions,
    step: int,
    device: str,
) -> Tensor:
    """Make one step of the optimizer on a random batch, and return the loss before the step."""
    pick = torch.randint(len(data[0]), (options.batch,))
    x, y = data[0][pick], data[1][pick]
    null = torch.full_like(y, denoiser.network.classes)
    y = torch.where(torch.rand(options.batch) < options.label_dropout, null, y)
    sigma = _noise_levels(options, options.batch).to(device)
    loss = edm_loss(denoiser, x, y, sigma, torch.randn(x.shape).to(device))
    for group in optimizer.param_groups:
        group["lr"] = options.lr * _rate(step, options.steps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def _split(count: int, held_out: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the training images and of the held-out images."""
    if isinstance(held_out, Tensor):
        seen, unseen = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    else:
        order, kept = torch.randperm(count), int(held_out * count)
        seen, unseen = order[kept:], order[:kept]
    if not len(seen) or not len(unseen):
        raise InputError(
            f"of {count} images, {len(unseen)} would be held out: hold out at least one image, and not all."
        )
    return seen, unseen


def _noise_levels(options: TrainingOptions, count: int) -> Tensor:
    return (options.log_sigma_mean + options.log_sigma_std * torch.randn(count)).exp()


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _some(items: Tensor) -> Tensor:
    """Select evenly spaced items, at most 2048: enough for the report."""
    return items[:: -(-len(items) // 2048)]


@torch.no_grad()
def _evaluate(denoiser: EDMDenoiser, images: Tensor, labels: Tensor, options: TrainingOptions) -> float:
    """Compute the loss with true labels, every image at four noise levels drawn with a fixed seed."""
    torch.manual_seed(options.seed + 1)
    total, count = 0.0, 0
    for _ in range(4):
        for x, y in zip(torch.split(images, 256), torch.split(labels, 256), strict=True):
            sigma = _noise_levels(options, len(x)).to(x.device)
            total += float(edm_loss(denoiser, x, y, sigma, torch.randn(x.shape).to(x.device))) * len(x)
            count += len(x)
    return total / count
