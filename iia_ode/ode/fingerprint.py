"""The identity of a model: a hash of its weights, which wrappers, compilation and casts do not change."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache, partial
from numbers import Number
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..transforms import bare, outside
from .changes import changed_names, globals_of
from .checksums import dense, marks, sums
from .networks import ByLevel

__all__ = ["Fingerprint", "Parts", "checked_tag", "fingerprint_of"]

_WEIGHTS = re.compile(r"[0-9a-f]{8}(-[dfbhx][0-9a-f]{12})+")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTERS = [["num_batches_tracked"], ["n_averaged"]]  # buffers that count calls, and do not change outputs
# Attributes of every ODE and wrapper, beside those of a subclass.
OF_ODE = {"model", "inner", "schedule", "prediction", "conditioning", "unconditional", "guidance_scale"} | {
    "guidance_rescale",
    "batched_guidance",
    "time",
    "time_rounding",
    "model_dtype",
    "state_shape",
    "ledger",
    "tag",
    "training",
}
# Plain values that count. Devices, ranks and tensors outside of modules do not, because they differ between processes, or are
# memory for results.
_PLAIN = (Number, str, bytes, torch.dtype, Enum, range)
_RANKS = {"rank", "local_rank", "world_size", "device", "device_id", "gpu"}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hip|meta)(:\d+)?")
_WIDE = {torch.float32, torch.float64}
# The dtypes from which a cast to the dtype of a part is a plain rounding.
_CASTS = {"d": {torch.float64}, "f": set(), "b": {torch.bfloat16}, "h": {torch.float16}}


class Fingerprint(str):
    """The identity of a model as text, such as ``"0e6e1a2b-f1f0...-b77c...-h90ab..."``.

    The first part is a hash of the names and shapes of the weights (parameters and buffers). Each further part is a hash of
    all values in a precision: d float64, f float32, b bfloat16, h float16. A fingerprint has a part for the model's
    own precision and a part for each lower precision. Two fingerprints are equal if they agree in the highest precision of
    both. A model therefore equals its own cast to half precision, and two models in float32 are equal only if all values are
    equal. A bfloat16 cast and a float16 cast of a model have no common precision, and are not equal.

    Prefixes of wrappers (``module.``, ``_orig_mod.``) and a prefix common to all names are removed from the names. A weight
    with several names is hashed under each name. The hash includes:

    - the weights of a module, with the running statistics of normalization layers. The code of a module is not included: two
      modules with equal weights and different arithmetic have equal fingerprints;
    - the modules and parameters that a function, partial or bound method uses;
    - the code of a function, and its numbers and strings, also inside of lists, tuples and dicts.

    The hash excludes counts of batches of normalization layers and averages, values that the model's own code changes, such as
    a count of calls, and buffers outside of the ``state_dict`` that the model changes.

    The fingerprint of a model without weights begins with ``"unknown"``, because only the code identifies the model. A `tag`
    of the ODE replaces the whole fingerprint.
    """

    __slots__ = ()

    @property
    def known(self) -> bool:
        """Whether the model is identified by its weights or by a tag."""
        return not self.startswith("unknown")

    @property
    def values(self) -> str:
        """The part about the values of the weights, or the tag; empty for an unknown model. Equal in every process."""
        model, plus, change = self.partition("+")
        own = model.partition("-")[2] if _WEIGHTS.fullmatch(model) else model
        return f"{own}{plus}{change}" if self.known else change

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        ours, theirs = str(self), str(other)
        (a, _, change), (b, _, others) = ours.partition("+"), theirs.partition("+")
        if ours == theirs or change != others or not (_WEIGHTS.fullmatch(a) and _WEIGHTS.fullmatch(b)):
            return ours == theirs
        (a_names, *a_parts), (b_names, *b_parts) = a.split("-"), b.split("-")
        first, second = ({p[0]: p for p in parts} for parts in (a_parts, b_parts))
        common = next((key for key in first if key in second), None)
        return a_names == b_names and common is not None and first[common] == second[common]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.partition("-")[0], self.partition("+")[2]))

    def changed_by(self, layer: object) -> Fingerprint:
        """The fingerprint of `layer`, a module over an ODE whose class changes the output."""
        state: Any = layer
        own = {k: v for k, v in vars(layer).items() if k not in OF_ODE and not k.startswith("_")}
        held = {**state._parameters, **state._modules}
        found = Parts()
        found.kinds.append(type(layer))
        for name, value in sorted({**_class_values(type(layer)), **own, **held}.items()):
            if name not in OF_ODE:
                found.add(value, name, deep=False)
        found.add_closure(type(layer).output, "output")  # type: ignore[attr-defined]
        found.tensors += [(name, v) for name, v in sorted(state._buffers.items()) if v is not None]
        found.settle()
        weights = [_text(found.tensors, [])] if found.tensors else []
        return Fingerprint(f"{self}+{type(layer).__qualname__}({', '.join([*found.pieces, *weights])})")


def checked_tag(tag: object) -> str | None:
    """Return `tag`, if None or text; otherwise raise InputError."""
    if tag is None or (isinstance(tag, str) and tag):
        return tag
    raise InputError(f"a tag is the name of the model as text, such as 'my-model-v2', got {tag!r}.")


def fingerprint_of(model: object, tag: str | None = None) -> Fingerprint:
    """The fingerprint of a model: of its tag if any, or of its weights, read with a single transfer from the device."""
    if tag is not None:
        return Fingerprint(f"tag-{tag}")
    with outside():
        return _read(model)


def _read(model: Any) -> Fingerprint:
    found = Parts()
    found.add(model, "")
    found.settle()
    found.tensors = [(name, bare(v)) for name, v in found.tensors]
    if not found.tensors:
        name = getattr(model, "__qualname__", type(model).__qualname__)
        return Fingerprint(f"unknown-{name}-{_hash(repr(found.pieces).encode(), 12)}")
    mark = _mark(found)
    try:
        last = _LAST.get(model)
    except TypeError:  # a model that is not hashable, or takes no weak reference
        return Fingerprint(_text(found.tensors, found.pieces))
    if last is None or last[0] != mark:
        last = _LAST[model] = mark, Fingerprint(_text(found.tensors, found.pieces))
    return last[1]


_LAST: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Fingerprint]] = WeakKeyDictionary()
"""The last fingerprint of each model, with the mark of its weights at the time."""


# ---- the parts of a model --------------------------------------------------------------------------------------------


class Parts:
    """The modules and weights behind a callable, and the plain values and code around them.

    Attributes
    ----------
    modules : modules that the callable uses.
    tensors : weights with their names.
    pieces : plain values and code, printable.
    codes, kinds : code of functions, and classes of objects.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: list[tuple[str, Tensor]] = []
        self.pieces: list[str] = []
        self.codes: list[CodeType] = []
        self.kinds: list[type] = []
        self._named: dict[int, str] = {}  # names of the pieces that have one, by place
        self._spare: list[tuple[str, Tensor]] = []  # buffers outside of the state_dict
        self._seen: dict[int, Any] = {}

    def add(self, value: Any, name: str, deep: bool = True) -> None:
        """Add a value, and with `deep` also the contents of the value and the functions that the value calls."""
        if isinstance(value, _PLAIN):
            if not (isinstance(value, str) and _DEVICE.fullmatch(value)) and name.rpartition(".")[2] not in _RANKS:
                self._named[len(self.pieces)] = name
                self.pieces.append(f"{name}={value!r}" if name else repr(value))
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if type(value) is FunctionType:  # as most models are, and asking for a Parameter takes far longer
            if deep:
                self._add_callable(value, name)
        elif isinstance(value, nn.Parameter):
            self.tensors.append((name, value))
        elif isinstance(value, nn.Module):
            self._add_module(value, name)
        elif isinstance(value, list | tuple):
            for k, v in enumerate(value):
                self.add(v, f"{name}.{k}", deep)
        elif isinstance(value, Mapping):
            for key, v in value.items():
                self.add(v, f"{name}.{key}", deep)
        elif isinstance(value, set | frozenset):
            self.add(sorted(repr(v) for v in value if isinstance(v, _PLAIN)), name)
        elif deep and value is not None and not isinstance(value, Tensor):
            self._add_callable(value, name)

    def settle(self) -> None:
        """Drop the values that the model's own code changes, such as counters."""
        if not self._named and not self._spare:
            return
        changed = changed_names(self.codes, self.kinds)
        drop = {k for k, name in self._named.items() if not changed.isdisjoint(name.split("."))}
        self.pieces = [piece for k, piece in enumerate(self.pieces) if k not in drop]
        self.tensors += [(name, v) for name, v in self._spare if name.rpartition(".")[2] not in changed]
        self._named, self._spare = {}, []

    def _add_module(self, module: nn.Module, name: str) -> None:
        if isinstance(module, ByLevel):
            self.pieces.append(repr(module.levels))
            for k, network in enumerate(module.networks):
                self.add(network, f"{name}.{k}" if name else f"{k}")
            return
        self.modules.append(module)
        empty = True
        for path, part in module.named_modules():
            prefix = ".".join(filter(None, (name, path)))
            self.kinds.append(type(part))
            for n, v in (*part._parameters.items(), *part._buffers.items()):  # tied weights under each name
                if v is not None:
                    empty = False
                    own = self._spare if n in part._non_persistent_buffers_set else self.tensors
                    own.append((f"{prefix}.{n}" if prefix else n, v))
        if empty:
            self.pieces.append(type(module).__qualname__)
            for key, v in sorted(vars(module).items()):
                if not key.startswith("_") and key != "training":
                    self.add(v, f"{name}.{key}", deep=False)

    def _add_callable(self, value: Any, name: str) -> None:
        value = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(value, partial):
            self.add(value.func, name)
            for k, v in (*enumerate(value.args, start=1), *sorted(value.keywords.items())):
                self._add_argument(v, f"{name}.{k}")
        elif isinstance(value, MethodType):
            self.add(value.__self__, name)
            if value.__name__ not in ("forward", "__call__"):
                self.pieces.append(value.__name__)
        elif isinstance(value, FunctionType):
            self._add_function(value, name)
        else:
            self.pieces.append(type(value).__qualname__)
            self.kinds.append(type(value))
            own = {**_class_values(type(value)), **getattr(value, "__dict__", {})}
            for key, v in sorted(own.items()):
                self.add(v, f"{name}.{key}", deep=callable(v))

    def _add_argument(self, value: Any, name: str) -> None:
        """Add an argument of a partial. Arguments never change, so tensors are included."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.tensors.append((name, value))
        else:
            self.add(value, name)

    def _add_function(self, function: FunctionType, name: str) -> None:
        code = function.__code__
        self.pieces.append(_code_hash(code))
        if function.__defaults__:
            self.add(function.__defaults__, f"{name}.defaults")
        if function.__kwdefaults__:
            self.add(dict(sorted(function.__kwdefaults__.items())), f"{name}.defaults")
        self.add_closure(function, name)
        for variable in globals_of(code):
            v = function.__globals__.get(variable, ...)
            own = isinstance(v, FunctionType) and v.__module__ == function.__module__
            if own or _is_plain(v) or isinstance(v, nn.Parameter | nn.Module | partial | MethodType):
                self.add(v, f"{name}.{variable}")

    def add_closure(self, function: FunctionType, name: str) -> None:
        """Add the variables of enclosing functions that a function uses."""
        self.codes.append(function.__code__)
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not yet assigned
                continue
            if variable != "__class__":
                self.add(value, f"{name}.{variable}")


def _class_values(kind: type) -> dict[str, Any]:
    """Plain values that are attributes of a class outside of this library and of torch."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("builtins", "torch", __name__.partition(".")[0]):
            found = {k: v for k, v in vars(base).items() if not k.startswith("_") and _is_plain(v)} | found
    return found


def _is_plain(value: object) -> bool:
    """Whether a value is a number, text or another plain value, or a list, tuple or dict of plain values."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, _PLAIN)


@lru_cache(maxsize=4096)
def _code_hash(code: CodeType) -> str:
    return _hash(repr(_shown(code)).encode(), 12)


def _shown(code: CodeType) -> tuple[Any, ...]:
    """A function's code without the places of its lines."""
    constants = [_shown(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


# ---- hashes ----------------------------------------------------------------------------------------------------------


def _text(tensors: list[tuple[str, Tensor]], pieces: list[str]) -> str:
    """The hash of names and shapes, and a hash of the values in each precision."""
    paths = [[p for p in name.split(".") if p and p not in _WRAPPERS] for name, _ in tensors]
    kept = [(path, v.detach()) for path, (_, v) in zip(paths, tensors, strict=True) if path[-1:] not in _COUNTERS]
    while kept and all(len(path) > 1 for path, _ in kept) and len({path[0] for path, _ in kept}) == 1:
        kept = [(path[1:], v) for path, v in kept]
    ordered = sorted(((".".join(path), v) for path, v in kept), key=lambda item: item[0])
    layout = [(name, list(v.shape), v.is_floating_point() or v.is_complex()) for name, v in ordered]
    values = [dense(v) for _, v in ordered if not v.is_meta]
    dtypes = {v.dtype for v in values if v.is_floating_point()}
    parts = [
        key for key, narrow in _CASTS.items() if dtypes <= _WIDE | narrow and (key != "d" or torch.float64 in dtypes)
    ]
    if not parts:  # a precision of its own, or several at a time
        parts, layout = ["x"], [*layout, sorted(map(str, dtypes))]  # type: ignore[list-item]
    found = sums(values, parts)
    hashes = [f"{key}{_hash(found[k], 12)}" for k, key in enumerate(parts)]
    return "-".join([_hash(repr((layout, pieces)).encode(), 8), *hashes])


def _hash(data: bytes, length: int) -> str:
    return hashlib.sha256(data).hexdigest()[:length]


@torch.no_grad()
def _mark(parts: Parts) -> tuple[Any, ...]:
    """A mark of the weights in memory, cheaper than the fingerprint; two marks are equal only if no weight has changed.

    The version of a tensor alone does not show writes through ``.data``.
    """
    places = [
        (name, v.dtype, tuple(v.shape), v.data_ptr(), 0 if v.is_inference() else v._version)
        for name, v in parts.tensors
        if not v.is_meta
    ]
    own = [marks(dense(v.detach()).reshape(-1)) for _, v in parts.tensors if not v.is_meta]
    totals = torch.cat([v.to(own[0].device) for v in own]).cpu().tolist() if own else []
    return tuple(places), tuple(parts.pieces), tuple(totals)
