"""Encodings of prompts and images by a pipeline, memoized over the evaluations of an ODE."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bounded import Bounded
from ..files import bytes_of

__all__ = ["Encodings"]

_ENCODERS = ("text_encoder", "image_encoder")
_DECODERS = ("vae", "movq", "vqgan", "vqvae")
_NETWORKS = ("forward", "encode")  # whose work is worth a hash of tensors
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_ENTRIES = 128  # encodings in memory
_MOST = 2**29  # bytes of encodings in memory
_DEPTH = 4  # levels of nested outputs whose tensors are counted


class Encodings:
    """Memory of the encodings of a pipeline.

    Texts and images are encoded once: by ``encode_prompt`` and the networks behind it, by image encoders and the ``encode`` of
    a VAE, and by image processors. An entry belongs to the content of the arguments, and to the versions of the parameters of
    all encoders. The memory holds at most 128 entries and 512 MiB.
    """

    def __init__(self) -> None:
        self._known: Bounded[Any, Any] = Bounded(_ENTRIES, _size, _MOST)
        self._parameters: list[Tensor] = []
        self._level: float | None = None

    @contextmanager
    def used(self, pipe: Any, level: float) -> Iterator[None]:
        """A block in which a pipeline takes known encodings.

        Parameters
        ----------
        pipe : the pipeline.
        level : level of the evaluation. A level that is not below the last one begins a run. The parameters of the encoders
            are listed at the beginning of a run, and compared by their versions at each evaluation.
        """
        if self._level is None or level >= self._level:
            parts = (v for k, v in pipe.components.items() if k.startswith((*_ENCODERS, *_DECODERS)))
            self._parameters = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
        self._level = level
        about = tuple((id(p), None if p.is_inference() else p._version) for p in self._parameters)
        replaced = list(_functions(pipe))
        kept = [vars(owner).get(name) for owner, name in replaced]
        for owner, name in replaced:
            vars(owner)[name] = partial(self._called, getattr(owner, name), (id(owner), name, about))
        try:
            yield
        finally:
            for (owner, name), own in zip(replaced, kept, strict=True):
                del vars(owner)[name]
                if own is not None:
                    vars(owner)[name] = own

    def _called(self, function: Callable[..., Any], about: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a function, or its memoized result; arguments without a known content are not memoized."""
        try:
            key = (about, _content((args, kwargs), tensors=about[1] in _NETWORKS))
        except TypeError:
            return function(*args, **kwargs)
        found = self._known.get(key)
        if found is None:
            found = self._known.put(key, function(*args, **kwargs))
        return found.clone() if isinstance(found, Tensor) else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Encodings:
        return Encodings()

    def __len__(self) -> int:
        return len(self._known)


def _functions(pipe: Any) -> Iterator[tuple[Any, str]]:
    """The functions of a pipeline that encode, as their owners and names."""
    if hasattr(type(pipe), "encode_prompt"):
        yield pipe, "encode_prompt"
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and not hasattr(part, "_orig_mod"):
            if name.startswith(_ENCODERS):
                yield part, "forward"
            elif name.startswith(_DECODERS) and hasattr(part, "encode"):
                yield part, "encode"
    seen = set()
    for name, part in vars(pipe).items():  # such as image_processor, which is no component
        if name.endswith("_processor") and hasattr(part, "preprocess") and id(part) not in seen:
            seen.add(id(part))
            yield part, "preprocess"


def _content(value: Any, tensors: bool) -> Any:
    """A hashable value for the content of an argument; TypeError for an object of another kind."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(_content(v, tensors) for v in value)
    if isinstance(value, Mapping):
        return dict, tuple((k, _content(v, tensors)) for k, v in value.items())
    if isinstance(value, Tensor) and tensors:
        return str(value.dtype), str(value.device), tuple(value.shape), hashlib.sha256(bytes_of(value)).digest()
    if type(value).__module__.partition(".")[0] in ("numpy", "PIL") and hasattr(value, "tobytes"):
        about = (getattr(value, name, None) for name in ("dtype", "shape", "mode", "size"))
        return tuple(map(str, about)), hashlib.sha256(value.tobytes()).digest()
    raise TypeError(type(value).__name__)


def _size(value: Any, depth: int = _DEPTH) -> int:
    """Bytes of the tensors in an encoding."""
    if isinstance(value, Tensor):
        return value.nbytes
    if depth == 0:
        return 0
    if isinstance(value, list | tuple):
        return sum(_size(v, depth - 1) for v in value)
    inner = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return sum(_size(v, depth - 1) for v in inner.values())
