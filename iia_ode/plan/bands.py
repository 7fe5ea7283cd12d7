"""Frequency bands and projections of channels: a decomposition of images and sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import InputError, unknown_name
from ..transforms import kept_property
from .projections import Part, Projections, is_orthonormal

__all__ = ["Bands"]

_F64 = torch.float64
_BLOCK = 2**16  # frequencies worked on at once


@dataclass(frozen=True, eq=False, repr=False)
class Bands(Projections):
    """Radial frequency bands, times projections of the channels.

    Frequencies are the frequencies of the orthonormal DCT-II [Ahmed et al. 1974], applied as a small matrix per axis: d
    components cost O(d (H + W)). Bands hold equal shares of the octaves between the lowest and the highest frequency; the
    mean is in the lowest band. Groups are ordered by channel, then by band from the lowest.

    Parameters
    ----------
    shape : shape of one sample, [C, H, W], [C, L] or [L].
    bands : number of bands, or ``"all"`` for a band per frequency.
    channels : None treats all channels alike. ``"luma-chroma"`` separates (1, 1, 1)/sqrt(3) from its complement, and equals
        None unless there are three channels. An orthogonal matrix [C, C] has a direction per row, with a set of groups for
        each direction.
    axes : number of transformed trailing axes; by default 2 for a shape with 3 axes, else 1.

    Raises
    ------
    InputError : the options do not fit the shape, or a band would be empty.
    """

    shape: tuple[int, ...]
    bands: int | str = 1
    channels: str | Tensor | None = None
    axes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.axes is None:
            object.__setattr__(self, "axes", 2 if len(self.shape) > 2 else 1)
        if self.axes not in (1, 2) or not self.axes <= len(self.shape) <= self.axes + 1 or min(self.shape) < 1:
            raise InputError(f"bands need samples [C, H, W], [C, L] or [L], got {list(self.shape)}, axes={self.axes}.")
        if self.bands != "all":
            check_whole("bands, where it is not 'all',", self.bands, least=1)
        count = self.shape[0] if len(self.shape) > self.axes else 1
        if isinstance(self.channels, Tensor):
            q = self.channels.detach().to("cpu", _F64, copy=True).contiguous()
            if q.shape != (count, count) or not is_orthonormal(q):
                raise InputError(f"channels must be an orthogonal matrix [{count}, {count}], a row per direction.")
            object.__setattr__(self, "channels", q if count > 1 else None)
        elif self.channels is not None:
            if self.channels != "luma-chroma":
                raise unknown_name("split of channels", self.channels, ["luma-chroma"])
            if count != 3:
                object.__setattr__(self, "channels", None)
        if self._has_empty_band():
            raise InputError(f"{self.bands} bands of samples {list(self.shape)} leave some of them empty: use fewer.")

    @property
    def _spatial(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - (self.axes or 1) :]

    @property
    def _band_count(self) -> int:
        return self.bands if isinstance(self.bands, int) else math.prod(self._spatial)

    @kept_property
    def _band(self) -> Tensor:
        """The band of each frequency, int64 over the transformed axes."""
        return self._rows(0, self._spatial[0])

    def _rows(self, first: int, last: int) -> Tensor:
        """The band of each frequency in the rows `first` to `last` of the first transformed axis, int64."""
        spatial = self._spatial
        if self.bands == "all":
            width = math.prod(spatial[1:])
            return torch.arange(first * width, last * width, device="cpu").reshape(-1, *spatial[1:])
        steps = [torch.arange(n, dtype=_F64, device="cpu") / n for n in spatial]
        steps[0] = steps[0][first:last]
        radius = torch.stack(torch.meshgrid(*steps, indexing="ij")).square().sum(0).sqrt()
        if int(self.bands) == 1 or math.prod(spatial) == 1:
            return torch.zeros(radius.shape, dtype=torch.int64, device="cpu")
        low = min(math.sqrt((1 / n) ** 2) for n in spatial if n > 1)
        high = math.sqrt(sum(((n - 1) / n) ** 2 for n in spatial))
        octaves = (radius.clamp(min=low) / low).log() / max(math.log(high / low), 1e-300)
        return (octaves * int(self.bands) + 1e-9).floor().long().clamp(0, int(self.bands) - 1)

    def _blocks(self) -> Iterator[Tensor]:
        """All rows in blocks of bounded memory, the last block first: the last rows hold the highest frequencies."""
        rows, step = self._spatial[0], max(1, _BLOCK // math.prod(self._spatial[1:]))
        starts = [(i, min(i + step, rows)) for i in range(0, rows, step)]
        return (self._rows(i, j) for i, j in (starts[-1], *starts[:-1]))

    def _has_empty_band(self) -> bool:
        if self.bands == "all":
            return False
        seen: set[int] = set()
        for block in self._blocks():
            seen.update(torch.unique(block).tolist())
            if len(seen) == self._band_count:
                return False
        return True

    @kept_property
    def _rotation(self) -> Tensor | None:
        if isinstance(self.channels, str):
            rows = [[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]
            q = torch.tensor(rows, dtype=_F64, device="cpu")
            unit: Tensor = q / torch.linalg.vector_norm(q, dim=1, keepdim=True)
            return unit
        return self.channels  # a matrix or None

    @property
    def _channel_sizes(self) -> tuple[int, ...]:
        """Number of rotated channels in each group of channels, in order."""
        count = self.shape[0] if len(self.shape) > (self.axes or 1) else 1
        if self.channels is None:
            return (count,)
        return (1, 2) if isinstance(self.channels, str) else (1,) * count

    @kept_property
    def _index(self) -> Tensor:
        """The group of each coordinate, int64 [*shape]."""
        rows = [self._band + g * self._band_count for g, n in enumerate(self._channel_sizes) for _ in range(n)]
        return torch.stack(rows).reshape(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """``band 2, luma``, counted from 1, the lowest frequencies."""
        bands = [f"band {b + 1}" for b in range(self._band_count)] if self._band_count > 1 else [""]
        kinds = [f"channel {c + 1}" for c in range(len(self._channel_sizes))]
        kinds = ["luma", "chroma"] if isinstance(self.channels, str) else kinds if self.channels is not None else [""]
        return tuple(", ".join(filter(None, (band, kind))) or "all" for kind in kinds for band in bands)

    @kept_property
    def sizes(self) -> Tensor:
        """Coefficients in each group."""
        bands = torch.zeros(self._band_count, dtype=torch.int64, device="cpu")
        for block in self._blocks():
            bands += torch.bincount(block.flatten(), minlength=self._band_count)
        return torch.cat([bands * n for n in self._channel_sizes]).double()

    @property
    def count(self) -> int:
        """Bands times groups of channels."""
        return self._band_count * len(self._channel_sizes)

    def prepare(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """The factor of each coordinate, [..., *shape]."""
        return (coefficients[..., self._index.to(coefficients.device)],)

    def _tables(self) -> tuple[Tensor, ...]:
        return self._transform

    @kept_property
    def _transform(self) -> tuple[Tensor, ...]:
        """The rotation of channels if any, then a DCT matrix per axis if there are several bands."""
        spatial = self._spatial if self._band_count > 1 else ()
        return (*(() if self._rotation is None else (self._rotation,)), *(_dct(n) for n in spatial))

    def _coordinates(self, x: Tensor, tables: tuple[Tensor, ...], back: bool = False) -> Tensor:
        """x [B, *shape] in the basis of channels and frequencies, or back from the basis."""
        turned = self._rotation is not None
        if turned:
            x = torch.einsum("ji,bj...->bi..." if back else "ij,bj...->bi...", tables[0], x)
        matrices = tables[1:] if turned else tables
        if matrices:
            x = x @ (matrices[-1] if back else matrices[-1].T)
        if len(matrices) == 2:
            x = (matrices[0].T if back else matrices[0]) @ x
        return x

    def _combined(self, parts: Sequence[Part], tables: tuple[Tensor, ...]) -> Tensor:
        (x, (factor,)), *others = parts
        total = self._coordinates(x, tables) * factor
        for x, (factor,) in others:
            total = total + self._coordinates(x, tables) * factor
        return self._coordinates(total, tables, back=True).contiguous()

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_b <P_g x_b, P_g y_b>, float64 [G]."""
        u, v = (self._coordinates(w.detach().cpu().double(), self._tables()) for w in (x, y))
        out = torch.zeros(self.count, dtype=_F64, device="cpu")
        return out.index_add_(0, self._index.flatten(), (u * v).sum(0).flatten())

    def config(self) -> dict[str, Any]:
        """The options."""
        channels = "matrix" if isinstance(self.channels, Tensor) else self.channels
        rest = {"bands": self.bands, "channels": channels, "axes": self.axes}
        return {"kind": "bands", "shape": list(self.shape), **rest}

    def tensors(self) -> dict[str, Tensor]:
        """The given matrix of channels, if any."""
        return {"channels": self.channels} if isinstance(self.channels, Tensor) else {}


def _dct(n: int) -> Tensor:
    """The orthonormal DCT-II of length n as a matrix [n, n], a row per frequency."""
    k = torch.arange(n, dtype=_F64, device="cpu")
    rows = torch.cos(math.pi / n * torch.outer(k, k + 0.5)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows
