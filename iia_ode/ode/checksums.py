"""Checksums of a model's weights: the same on every device, and with a single transfer from the device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..bounded import Bounded

__all__ = ["dense", "marks", "sums"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a float
_BLOCK = 2**16  # values under a single sum


def dense(value: Tensor) -> Tensor:
    """A tensor as real numbers in strides."""
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


@torch.no_grad()
def sums(values: list[Tensor], parts: list[str]) -> list[bytes]:
    """The weighted sums of all values in each precision, as bytes; one transfer from the device."""
    found: list[list[Tensor]] = [[] for _ in parts]
    for vector in chain.from_iterable(map(_pieces, _vectors(values))):
        narrow = vector.float() if vector.dtype == torch.float64 else vector
        for own, key in zip(found, parts, strict=True):
            own.append(_sum(_bits(vector, narrow, key)))
    if not any(found):
        return [b""] * len(parts)
    device = found[0][0].device
    rows = [torch.cat([s.to(device) for s in own]) for own in found]
    return [row.tobytes() for row in torch.stack(rows).cpu().numpy()]


def _bits(vector: Tensor, narrow: Tensor, key: str) -> Tensor:
    """The bits of a vector in a precision, as integers."""
    if not vector.is_floating_point():
        return vector
    match key:
        case "d":
            return vector.view(torch.int64)
        case "b":
            return narrow.bfloat16().view(torch.int16)
        case "h":
            return narrow.half().view(torch.int16)
    return narrow.view(torch.int32)


def _vectors(values: list[Tensor]) -> Iterator[Tensor]:
    """The values as vectors, small tensors together: floats in float32, or in float64 if any is, then integers in int64."""
    floats = [v for v in values if v.is_floating_point()]
    wide = torch.float64 if any(v.dtype == torch.float64 for v in floats) else torch.float32
    for own, dtype in ((floats, wide), ([v for v in values if not v.is_floating_point()], torch.int64)):
        small: list[Tensor] = []
        for value in own:
            vector = value.reshape(-1).to(dtype)
            if vector.numel() >= _BLOCK:
                yield vector
                continue
            if small and (sum(map(len, small)) + len(vector) > _BLOCK or vector.device != small[0].device):
                yield torch.cat(small)
                small = []
            small.append(vector)
        if small:
            yield torch.cat(small)


def _pieces(vector: Tensor) -> tuple[Tensor, ...]:
    """A vector in whole blocks and a rest: few blocks at a time on the host, many on a device."""
    return torch.split(vector, _BLOCK if vector.is_cpu else 64 * _BLOCK)


def _sum(bits: Tensor) -> Tensor:
    """Sums of at most 2**16 integers times odd weights, modulo 2**64: any change of a single value changes its sum."""
    weights = _weights(bits.device)
    whole = len(bits) // _BLOCK * _BLOCK
    sums = [(bits[:whole].view(-1, _BLOCK) * weights).sum(1)] if whole else []
    if whole < len(bits):
        sums.append((bits[whole:] * weights[: len(bits) - whole]).sum().reshape(1))
    return torch.cat(sums) if sums else weights[:0]


# ---- unchanged weights -------------------------------------------------------------------------------------------------


def marks(vector: Tensor) -> Tensor:
    """The sum of the bits, which any change of a single value changes, and a weighted sum, which tells the order; int64."""
    if not vector.is_floating_point():
        return torch.cat([_sum(part.long()) for part in _pieces(vector)])
    if vector.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        vector = vector.float()
    size = vector.element_size()
    even = 0 if vector.storage_offset() * size % 8 else len(vector) * size // 8 * 8 // size
    bits = vector[:even].view(torch.int64).sum() + vector[even:].view(_INTEGERS[size]).sum()
    probe, whole = _probe(vector.device, vector.dtype), len(vector) // _BLOCK * _BLOCK
    weighted = (vector[whole:] @ probe[: len(vector) - whole]).float()
    if whole:
        blocks = (vector[:whole].view(-1, _BLOCK) @ probe).float()
        weighted = weighted + blocks @ probe[: len(blocks)].float()
    return torch.stack([bits, weighted.reshape(1).view(torch.int32)[0].long()])


_PROBES: Bounded[tuple[torch.device, torch.dtype], Tensor] = Bounded(16)


def _probe(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights between -1 and 1, [2**16]."""
    known = _PROBES.get((device, dtype))
    if known is None:
        with torch.inference_mode(False):
            known = ((_weights(torch.device("cpu")) >> 40).float() / 2**23).to(dtype).to(device)
        _PROBES.put((device, dtype), known)
    return known


# ---- weights of sums -------------------------------------------------------------------------------------------------

_PLACED: Bounded[torch.device, Tensor] = Bounded(16)


def _weights(device: torch.device) -> Tensor:
    """Odd 64-bit weights by SplitMix64 [Steele et al. 2014], int64 [2**16]."""
    known = _PLACED.get(device)
    if known is None:
        z = np.arange(1, _BLOCK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        odd = ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)
        with torch.inference_mode(False):
            known = torch.from_numpy(odd).to(device)
        _PLACED.put(device, known)
    return known
