"""Samples of the fashion denoiser: a picture by class, and their distances from the data with the bias of finite samples.

    python benchmarks/fashion.py [--data FOLDER] [--images 600]

Writes docs/images/fashion.png and docs/results/fashion.md. Needs Fashion-MNIST (Debian's package dataset-fashion-mnist) and
the extras `metrics` and `plot`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import PAGES, ROOT, say
from torch import Tensor

import iia_ode as iia
from iia_ode.denoisers import FASHION_CLASSES, FASHION_FOLDER, EDMDenoiser, ImageClassifier
from iia_ode.files import write_bytes
from iia_ode.metrics import FeatureStatistics, frechet_estimate, image_features, sliced_wasserstein
from iia_ode.plots import image_grid

NFE = 18


def draw(model: EDMDenoiser, labels: Tensor, solver: str, steps: int, seed: int, scale: float = 1.0) -> Tensor:
    """Draw one image per label."""
    x = 80 * torch.randn((len(labels), 1, 28, 28), generator=torch.Generator().manual_seed(seed))
    found = []
    for y, part in zip(labels.split(100), x.split(100), strict=True):
        ode = iia.ProbabilityFlowODE(
            model,
            iia.EDM(),
            conditioning={"class_labels": y},
            unconditional={"class_labels": torch.tensor([10])},
            guidance_scale=scale,
        )
        found.append(iia.sample(ode, part, iia.grids.karras(steps), solver))
    return torch.cat(found)


def picture(model: EDMDenoiser) -> None:
    """A row per class, eight samples each, by 18 steps of Heun's method."""
    images = draw(model, torch.arange(10).repeat_interleave(8), "heun", 18, seed=0)
    figure, ax = plt.subplots(figsize=(4.4, 5.0), layout="constrained")
    image_grid(images, ax)
    ax.set_yticks([29 * row + 14 for row in range(10)], FASHION_CLASSES, fontsize=8)
    ax.tick_params(length=0)
    figure.savefig(ROOT / "docs" / "images" / "fashion.png", dpi=110)


def row(name: str, images: Tensor, labels: Tensor, classifier: ImageClassifier, reference: Tensor) -> str:
    """A line of the table."""
    features = image_features(images, classifier.features)
    found = frechet_estimate(features, FeatureStatistics(classifier.mean, classifier.covariance), parts=(1, 2, 3))
    sliced = sliced_wasserstein(images.clamp(-1, 1), reference, projections=784)
    right = float((classifier(images).argmax(1) == labels).double().mean())
    distances = " | ".join(f"{d:.3f} ± {e:.3f}" for d, e in zip(found.distances, found.errors, strict=True))
    say(f"{name}: {distances}, limit {found.limit:.3f}")
    return f"| {name} | {distances} | {found.limit:.3f} ± {found.limit_error:.3f} | {sliced:.4f} | {right:.1%} |"


def main() -> None:
    """Write the picture and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FASHION_FOLDER)
    parser.add_argument("--images", type=int, default=600)
    options = parser.parse_args()
    n = options.images
    picture(iia.denoisers.fashion())
    images, labels, test = iia.denoisers.fashion_data(options.data)
    images, labels = images[test], labels[test]
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, rest = mixed[:n], mixed[n:]
    classifier, classes = iia.denoisers.fashion_classifier(), torch.arange(n) % 10
    sets = {
        "test images": (images[first], labels[first]),
        "samples": (draw(iia.denoisers.fashion(), classes, "dpmpp_2m", NFE, 1), classes),
        "samples, halfway": (draw(iia.denoisers.fashion(halfway=True), classes, "dpmpp_2m", NFE, 1), classes),
    }
    lines = [row(name, *pair, classifier, images[rest]) for name, pair in sets.items()]
    head = f"| set | {n} images | {n // 2} | {n // 3} | limit | sliced Wasserstein | class recognized |"
    text = "\n".join([head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |", *lines, ""])
    write_bytes(PAGES / "fashion.md", text.encode())


if __name__ == "__main__":
    main()
