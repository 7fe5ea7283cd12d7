"""Conditions of a model: trees of tensors, split, paired, moved and hashed leaf by leaf.

A tree is a value that ``torch.utils._pytree`` takes apart: nested dicts, lists, tuples, named tuples, and classes registered
there. A tensor leaf has leading dimension B, or 1 to serve every sample; a list of numbers or strings has B entries, or 1
to serve every sample, and so has a tuple of strings. A tuple of numbers is a single value, such as a size. A :class:`Shared`
leaf and every other leaf go to the model as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..files import bytes_of

__all__ = [
    "Shared",
    "batched",
    "check_entries",
    "check_tree",
    "digest_of",
    "held_by",
    "kinds",
    "named",
    "paired",
    "picked",
    "pieces",
    "places_of",
]

_APART = object()  # in place of a pair that is no single condition


@dataclass(frozen=True, eq=False)
class Shared:
    """A condition without batch axis, such as the position ids [L, 3] of a transformer: all samples share the value.

    The model receives the value itself, on the device of the states. Subsets of a batch keep the value, and the doubled batch
    of guidance receives the value once. Where the two branches of guidance have different shared values, guidance makes two
    calls.

    >>> ode = iia.ProbabilityFlowODE(model, schedule, conditioning={"ctx": ctx, "img_ids": iia.ode.Shared(img_ids)})

    Parameters
    ----------
    value : a tensor, a tree of tensors, or any other object.
    """

    value: Any


def _is_leaf(value: object) -> bool:
    return isinstance(value, Shared) or _is_list(value)


def _is_list(value: object) -> bool:
    """Whether a value is a list of numbers or strings, or a tuple of strings."""
    if not isinstance(value, list | tuple) or type(value) not in (list, tuple) or not value:
        return False
    return all(isinstance(v, str) for v in value) or (
        isinstance(value, list) and all(isinstance(v, Number) for v in value)
    )


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    return change(tree) if isinstance(tree, Tensor) else pytree.tree_map(change, tree, is_leaf=_is_leaf)


# ---- names and checks ------------------------------------------------------------------------------------------------


def named(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The leaves of conditions with their names, such as ``"added_cond_kwargs.text_embeds"``, in the order of the tree."""
    found = []
    for key, value in values.items():
        if isinstance(value, Tensor):
            found.append((str(key), value))
        else:
            leaves, _ = pytree.tree_flatten_with_path(value, is_leaf=_is_leaf)
            found += [(".".join([str(key), *map(_part, path)]), leaf) for path, leaf in leaves]
    return found


def _part(key: Any) -> str:
    """A step of a path: the key of a mapping, the index in a sequence, or the name of an attribute."""
    return str(next((getattr(key, n) for n in ("key", "idx", "name") if hasattr(key, n)), key))


def check_tree(values: Mapping[str, Any]) -> None:
    """Raise InputError if a leaf is a NumPy array, or an object with tensors that pytree does not take apart."""
    for name, leaf in named(values):
        if type(leaf).__module__ == "numpy" and hasattr(leaf, "shape") and leaf.shape:
            raise InputError(f"conditioning {name!r} is a NumPy array: give a tensor, torch.from_numpy(...).")
        held = leaf.values() if isinstance(leaf, Mapping) else vars(leaf).values() if _is_record(leaf) else ()
        if not isinstance(leaf, Shared) and any(isinstance(v, Tensor) for v in held):
            kind = type(leaf).__name__
            raise InputError(
                f"conditioning {name!r} is a {kind} with tensors, which cannot be split with the samples: give a dict, "
                "register the class with torch.utils._pytree, or give iia_ode.ode.Shared(...) if all samples share it."
            )


def _is_record(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")


def check_entries(values: Mapping[str, Any], batch: int) -> None:
    """Raise InputError unless every tensor and every list has an entry for each of `batch` samples, or a single entry."""
    for name, leaf in named(values):
        if _is_list(leaf) and len(leaf) not in (1, batch):
            raise InputError(
                f"conditioning {name!r} is a {type(leaf).__name__} of {len(leaf)} entries for a batch of {batch}: give one "
                "per sample, or one for all; a value that all samples share goes in as iia_ode.ode.Shared(value)."
            )
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) not in (1, batch):
            raise InputError(
                f"conditioning {name!r} has {len(leaf)} entries for a batch of {batch}: give one per sample, or one for all; "
                "a tensor without batch axis goes in as iia_ode.ode.Shared(tensor)."
            )


def kinds(values: Mapping[str, Any]) -> dict[str, tuple[int, ...] | str]:
    """The shape of each tensor leaf for one sample; ``"shared"`` or the name of the type of every other leaf."""

    def kind(leaf: Any) -> tuple[int, ...] | str:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape[1:])
        return "shared" if isinstance(leaf, Shared) else type(leaf).__name__

    return {name: kind(leaf) for name, leaf in named(values)}


# ---- batches ---------------------------------------------------------------------------------------------------------


def picked(values: Mapping[str, Any], index: slice | Tensor, batch: int) -> dict[str, Any]:
    """The conditions of some samples of a batch: leaves with `batch` entries are indexed, other leaves stay."""

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index] if leaf.ndim and len(leaf) == batch else leaf
        if _is_list(leaf) and len(leaf) == batch:
            return type(leaf)(leaf[i] for i in places_of(index, batch))
        return leaf

    return {k: _mapped(pick, v) for k, v in values.items()}


def places_of(index: slice | Tensor, batch: int) -> list[int]:
    """The places of some samples in a batch: of a slice, or of an integer or boolean tensor [n]."""
    places: list[int] = torch.arange(batch, device="cpu")[index.cpu() if isinstance(index, Tensor) else index].tolist()
    return places


def batched(values: Mapping[str, Any], batch: int, device: torch.device) -> dict[str, Any]:
    """The keywords of the model: tensors with an entry per sample, and shared values, on the device of the states."""

    def place(leaf: Any) -> Any:
        return _moved(leaf.value, device) if isinstance(leaf, Shared) else _rows(leaf, batch, device)

    return {k: _mapped(place, v) for k, v in values.items()}


def _rows(leaf: Any, batch: int, device: torch.device) -> Any:
    if _is_list(leaf):
        return leaf * batch if len(leaf) == 1 else leaf
    if not isinstance(leaf, Tensor):
        return leaf
    # A copy, which the model may write to.
    leaf = leaf.to(device, non_blocking=True)
    return leaf.expand(batch, *leaf.shape[1:]).clone()


def _moved(tree: Any, device: torch.device) -> Any:
    return _mapped(lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v, tree)


def paired(
    condition: Mapping[str, Any], null: Mapping[str, Any], batch: int, device: torch.device
) -> dict[str, Any] | None:
    """The keywords of the model for a doubled batch, first under the condition, then under the null condition.

    None where the two conditions do not fit one batch: trees, shapes per sample, dtypes or other values differ.
    """
    ours, tree = pytree.tree_flatten(dict(condition), is_leaf=_is_leaf)
    theirs, other = pytree.tree_flatten(_in_order(dict(condition), dict(null)), is_leaf=_is_leaf)
    if tree != other:
        return None
    pairs = []
    for a, b in zip(ours, theirs, strict=True):
        pair = _pair(a, b, batch, device)
        if pair is _APART:
            return None
        pairs.append(pair)
    found: dict[str, Any] = pytree.tree_unflatten(pairs, tree)
    return found


def _in_order(like: Any, values: Any) -> Any:
    """`values` with the keys of its dicts in the order of the dicts of `like`; pytree compares the order too."""
    if type(like) is dict and type(values) is dict and like.keys() == values.keys():
        return {k: _in_order(v, values[k]) for k, v in like.items()}
    return values


def _pair(a: Any, b: Any, batch: int, device: torch.device) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or (a.dtype, a.shape[1:]) != (b.dtype, b.shape[1:]):
            return _APART
        return torch.cat([_rows(a, batch, device), _rows(b, batch, device)])
    if isinstance(a, Shared) and isinstance(b, Shared):
        return _moved(a.value, device) if _same(a.value, b.value) else _APART
    if _is_list(a) and _is_list(b):
        return _rows(a, batch, device) + _rows(b, batch, device) if type(a) is type(b) else _APART
    return a if _same(a, b) else _APART


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal; tensors on a device are not read, and only equal to themselves."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.is_cpu and b.is_cpu and a.dtype == b.dtype and torch.equal(a, b)
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # of any kind: the classes are the caller's
        return False


# ---- hashes ----------------------------------------------------------------------------------------------------------


def pieces(values: Mapping[str, Any], opaque: Callable[[Any], object] | None = None) -> Iterator[bytes | memoryview]:
    """The content of conditions as bytes, for a hash: equal for equal conditions, whatever the order of the keys.

    `opaque` makes a printable value of a leaf that is no tensor. The default is the content of images and arrays, and the
    ``repr`` of other values, without addresses in memory.
    """
    for name, leaf in sorted(named(values), key=lambda item: item[0]):
        yield f"\n{name} ".encode()
        if isinstance(leaf, Shared):
            yield b"shared"
            yield from pieces({"": leaf.value}, opaque)
        elif isinstance(leaf, Tensor):
            yield f"{leaf.dtype} {list(leaf.shape)} ".encode()
            yield bytes_of(leaf)
        else:
            yield _content(leaf) if opaque is None else f"{opaque(leaf)!r}".encode()


def _content(leaf: Any) -> bytes:
    """A leaf as bytes: images, arrays and tensors by their content, others by ``repr`` without addresses in memory."""
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {list(leaf.shape)} ".encode() + bytes(bytes_of(leaf))
    if isinstance(leaf, list) and not _is_list(leaf):
        return b", ".join(_content(v) for v in leaf)
    shown = re.sub(" at 0x[0-9a-fA-F]+", "", repr(leaf))
    return f"{shown!r}".encode() + (leaf.tobytes() if hasattr(leaf, "tobytes") else b"")


def held_by(model: object) -> Mapping[str, Any]:
    """Conditions that a model holds itself, in its attribute ``held_conditions``, such as the prompt of a pipeline's call."""
    found = getattr(model, "held_conditions", None)
    return found if isinstance(found, Mapping) else {}


def digest_of(*trees: Mapping[str, Any]) -> str:
    """A hash of the values of conditions."""
    digest = hashlib.sha256()
    for values in trees:
        digest.update(b"\n;")
        for piece in pieces(values):
            digest.update(piece)
    return digest.hexdigest()[:16]
