"""Data sets of the package's networks: scikit-learn's digits and photograph patches, and Fashion-MNIST."""

from __future__ import annotations

import gzip
import importlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import FileFormatError, MissingDependencyError

__all__ = ["FASHION_CLASSES", "FASHION_FOLDER", "digits_data", "fashion_data", "patches_data"]

DIGITS_SOURCE = "scikit-learn load_digits: 1797 images of 8x8, scaled to [-1, 1]; a seeded tenth held out"
FASHION_SOURCE = "Fashion-MNIST: 70000 images of 28x28, scaled to [-1, 1]; the 10000 test images held out"
PATCHES_SOURCE = (
    "scikit-learn load_sample_images: 16x16 patches of china.jpg and flower.jpg at full and half size, flipped too, "
    "scaled to [-1, 1]; a tenth of the cells of 64x64 pixels held out"
)

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder where Debian's package ``dataset-fashion-mnist`` puts the images."""

FASHION_CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Names of the ten classes of Fashion-MNIST, by label."""


def digits_data(size: int = 8) -> tuple[Tensor, Tensor]:
    """Load the digits data set. Needs the extra ``train``.

    Parameters
    ----------
    size : side of the images in pixels. Digits of another size than 8 are resized by bicubic interpolation and clipped to
        [-1, 1]. A size of 28 is the size of :func:`fashion_data`.

    Returns
    -------
    Images, float32 [1797, 1, size, size] in [-1, 1], and their labels, int64 [1797].

    Raises
    ------
    MissingDependencyError : scikit-learn is not installed.
    """
    data = _from_sklearn("digits", "load_digits")
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # the raw values are 0 to 16
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    return images, torch.from_numpy(data.target).long()


def patches_data() -> tuple[Tensor, Tensor]:
    """Cut the patches data set from scikit-learn's two sample photographs. Needs the extra ``train``.

    Patches are squares of 16x16 pixels, and squares of 32x32 pixels halved in size, at every eighth pixel of each
    photograph. Each patch is also mirrored, left to right. For the split, each photograph is divided into cells of 64x64
    pixels, and one cell of each row of ten is held out. A patch inside the held-out cells is held out. A patch partly
    inside is left out, so no pixel is in both parts.

    Returns
    -------
    Patches, float32 [N, 3, 16, 16] in [-1, 1], and a mask of the held-out patches, bool [N].

    Raises
    ------
    MissingDependencyError : scikit-learn is not installed, or Pillow is not (scikit-learn reads the photographs with it).
    """
    found, held_out = [], []
    for photograph in _from_sklearn("sample photographs", "load_sample_images").images:
        image = torch.tensor(photograph).float().permute(2, 0, 1) / 127.5 - 1
        row, column = (torch.arange(size) // 64 for size in image.shape[1:])
        unseen = (3 * row[:, None] + column) % 10 == 5
        marked = torch.cat([image, unseen[None].float()])
        for size in (1, 2):
            cut = F.unfold(F.avg_pool2d(marked, size)[None], 16, stride=8 // size)[0].T.reshape(-1, 4, 16, 16)
            share = cut[:, 3].mean(dim=(1, 2))
            cut, share = cut[(share == 0) | (share == 1)], share[(share == 0) | (share == 1)]
            found += [cut[:, :3], cut[:, :3].flip(-1)]
            held_out += [share == 1] * 2
    return torch.cat(found), torch.cat(held_out)


def _from_sklearn(what: str, function: str) -> Any:
    """Call a function of ``sklearn.datasets`` by name."""
    try:
        return getattr(importlib.import_module("sklearn.datasets"), function)()
    except ImportError as error:  # scikit-learn is missing, or Pillow, with which scikit-learn reads its photographs
        raise MissingDependencyError(f"the {what} come with scikit-learn: pip install 'iia-ode[train]'.") from error


def fashion_data(folder: str | os.PathLike[str] = FASHION_FOLDER) -> tuple[Tensor, Tensor, Tensor]:
    """Load Fashion-MNIST, 70,000 gray images of clothing [Xiao et al. 2017].

    Parameters
    ----------
    folder : folder with the four files ``train-images-idx3-ubyte.gz``, ``train-labels-idx1-ubyte.gz``,
        ``t10k-images-idx3-ubyte.gz`` and ``t10k-labels-idx1-ubyte.gz``. The default is the folder of Debian's package
        ``dataset-fashion-mnist``.

    Returns
    -------
    Images, float32 [70000, 1, 28, 28] with black = -1 and white = +1; their labels, int64 [70000], see
    :data:`FASHION_CLASSES`; and a mask of the 10,000 test images, bool [70000].

    Raises
    ------
    MissingDependencyError : the folder has no such files.
    FileFormatError : a file is damaged, or images and labels differ in number.
    """
    found = []
    for part in ("train", "t10k"):
        images = _read_idx(Path(folder) / f"{part}-images-idx3-ubyte.gz", dimensions=3)
        labels = _read_idx(Path(folder) / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
        if len(images) != len(labels):
            raise FileFormatError(
                f"{str(folder)!r} has {len(images)} images and {len(labels)} labels of part {part!r}."
            )
        found.append((images[:, None].float() / 127.5 - 1, labels.long(), torch.full((len(images),), part == "t10k")))
    images, labels, test = (torch.cat(parts) for parts in zip(*found, strict=True))
    return images, labels, test


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a gzipped file of bytes in the IDX format: two zero bytes, type 8, number of dimensions, sizes, values."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingDependencyError(
            f"{str(path)!r} does not exist. Debian's package dataset-fashion-mnist brings Fashion-MNIST: "
            f"apt-get install dataset-fashion-mnist, or give the folder of the four *-ubyte.gz files."
        ) from error
    except (EOFError, OSError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} cannot be read: {error}.") from error
    start = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < start:
        raise FileFormatError(f"{str(path)!r} is no IDX file of bytes in {dimensions} dimensions.")
    sizes = struct.unpack(f">{dimensions}I", raw[4:start])
    values = np.frombuffer(raw, np.uint8, offset=start)
    if values.size != np.prod(sizes, dtype=np.int64):
        raise FileFormatError(f"{str(path)!r} should have values of shape {list(sizes)}, and has {values.size} values.")
    return torch.from_numpy(values.reshape(sizes).copy())
