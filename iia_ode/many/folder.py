"""A folder of samples: its manifest, its files, and reading the samples back."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..__about__ import __version__
from ..errors import FileFormatError, InputError, MismatchError, MissingDependencyError
from ..files import as_path, read_tensors, write_bytes, write_tensors
from ..ode import Fingerprint

__all__ = ["KIND", "Folder", "check_manifest", "load_pillow", "read_samples"]

KIND = "samples"
_MANIFEST = "manifest.json"
_FORMAT = 1
_LEFT = re.compile(r"\.[0-9a-f]{16}\.tmp")


# ---- the manifest ----------------------------------------------------------------------------------------------------


def check_manifest(folder: Path, run: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write the manifest of a run, or compare the run with the manifest of the folder.

    Parameters
    ----------
    folder : the folder.
    run : everything that determines the samples, JSON-ready.
    names : names of the run's files.

    Raises
    ------
    MismatchError : the folder has the samples of another run, or samples without a manifest.
    FileFormatError : the manifest is damaged.
    """
    path = folder / _MANIFEST
    if not path.exists():
        if found := [name for name in names if (folder / name).exists()]:
            raise MismatchError(
                f"{str(folder)!r} has {found[0]} and no {_MANIFEST}, so the run of its samples is unknown: use another folder."
            )
        body = {"format": _FORMAT, "kind": KIND, "library": __version__, "run": run}
        write_bytes(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
        return
    theirs, ours = _manifest(folder), json.loads(json.dumps(run))
    differ = [key for key in {**theirs, **ours} if not _same(key, theirs.get(key), ours.get(key))]
    if differ:
        # Hashes come last: a name says more.
        differ = [key for key in differ if key not in ("id", "weights")] or differ[:1]
        shown = ", ".join(f"{key} {_brief(theirs.get(key))} (this run: {_brief(ours.get(key))})" for key in differ)
        raise MismatchError(
            f"{str(folder)!r} has the samples of another run, made with {shown}: use another folder, or the arguments of that "
            "run."
        )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        body = json.loads(path.read_text("utf-8"))
        if body["kind"] != KIND or body["format"] > _FORMAT:
            raise ValueError(f"kind {body['kind']!r}, format {body['format']!r}")
        return dict(body["run"])
    except FileNotFoundError:
        raise FileFormatError(f"{str(folder)!r} has no {_MANIFEST}: it is no folder of iia_ode.sample_many.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{str(path)!r} is damaged, or from a later version of iia_ode: {error}.") from error


def _same(key: str, theirs: object, ours: object) -> bool:
    """Whether two values of a field agree; an unknown model agrees with every model."""
    if key == "model" and isinstance(theirs, str) and isinstance(ours, str):
        a, b = Fingerprint(theirs), Fingerprint(ours)
        return not (a.known and b.known) or a == b
    return theirs == ours


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The files of a run: a safetensors file per batch, or a PNG file per sample.

    Attributes
    ----------
    path : the folder.
    seeds : seed of each sample.
    batch : samples of a batch.
    png : whether samples are PNG files.
    """

    path: Path
    seeds: Sequence[int]
    batch: int
    png: bool
    _seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._seen.update(os.listdir(self.path))

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.seeds) // self.batch)

    def rows(self, k: int) -> slice:
        """Positions of the samples of batch k."""
        return slice(k * self.batch, min((k + 1) * self.batch, len(self.seeds)))

    def names(self, k: int) -> list[str]:
        """Names of the files of batch k."""
        if self.png:
            return [f"{seed:010d}.png" for seed in self.seeds[self.rows(k)]]
        return [_shard(k)]

    def missing(self, k: int) -> list[str]:
        """Names of the files of batch k that do not exist."""
        absent = [name for name in self.names(k) if name not in self._seen]
        if absent:
            self._seen.update(name for name in absent if (self.path / name).exists())
        return [name for name in absent if name not in self._seen]

    def write(self, k: int, samples: Tensor, run: str) -> None:
        """Write the samples of batch k, except files that exist; each file is written atomically."""
        if not self.png:
            seeds = torch.tensor(self.seeds[self.rows(k)], dtype=torch.int64, device="cpu")
            header = {"run": run, "batch": k}
            write_tensors(self.path / _shard(k), KIND, {"samples": samples, "seeds": seeds}, header)
        else:
            missing = set(self.missing(k))
            for name, image in zip(self.names(k), _pixels(samples), strict=True):
                if name in missing:
                    write_bytes(self.path / name, _png(image))
        self._seen.update(self.names(k))

    def tidy(self) -> None:
        """Remove the temporary files of killed processes; only for a finished run, which nobody writes to."""
        for name in os.listdir(self.path):
            if _LEFT.fullmatch(name):
                (self.path / name).unlink(missing_ok=True)


def _shard(k: int) -> str:
    return f"samples-{k:06d}.safetensors"


def load_pillow() -> Any:
    """The module ``PIL.Image``.

    Raises
    ------
    MissingDependencyError : Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "PNG files need Pillow: pip install 'iia-ode[png]', or write format='safetensors'."
        ) from error
    return Image


def _pixels(samples: Tensor) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] as bytes [B, H, W, C]."""
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise InputError(
            "PNG files need images [B, 1, H, W] or [B, 3, H, W] with values in [-1, 1], got samples "
            f"{list(samples.shape)}: give decode=, a function from samples to images, or format='safetensors'."
        )
    return ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _png(pixels: Tensor) -> bytes:
    stream = io.BytesIO()
    array = pixels.numpy()
    load_pillow().fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(stream, "png")
    return stream.getvalue()


def read_samples(folder: str | os.PathLike[str]) -> Iterator[tuple[list[int], Tensor]]:
    """Read the samples of a finished run of :func:`iia_ode.sample_many`, a batch at a time.

    Parameters
    ----------
    folder : folder of safetensors files.

    Yields
    ------
    The seeds of a batch, and its samples [b, ...] on the CPU, in the order of the seeds.

    Raises
    ------
    FileFormatError : the folder has no manifest, has PNG files, or a file is missing or damaged.
    MismatchError : a file is from another run.
    """
    place = as_path(folder)
    run = _manifest(place)
    if run["format"] != "safetensors":
        raise FileFormatError(f"{str(place)!r} has PNG files, one per seed: read the files with Pillow.")
    for k in range(-(-run["seeds"]["count"] // run["batch"])):
        tensors, header = read_tensors(place / _shard(k), KIND)
        if header.get("run") != run["id"]:
            raise MismatchError(f"{str(place / _shard(k))!r} is from another run than the manifest of its folder.")
        yield tensors["seeds"].tolist(), tensors["samples"]
