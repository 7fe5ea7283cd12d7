"""A device without float64, emulated on the host, so that whole fits run on the device in tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # the one whose autograd needs no hardware; the numbers are on the host
_ACROSS = ("aten::_to_copy", "aten::copy_")


class OnChip(Tensor):
    """A tensor that says that it is on the device."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnChip":
        if host.dtype == torch.float64:
            raise TypeError("this device has no float64")
        made: OnChip = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            dtype=host.dtype,
            device=DEVICE,
            storage_offset=host.storage_offset(),
        )
        made.host = host
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnChip({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """torch gives data no numbers on the device meta, so they are moved there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


@contextmanager
def chip() -> Iterator[None]:
    """While active, the device exists: factories make tensors on it, and nothing there is float64."""
    with _FromData(), _Dispatch():
        yield


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    inputs = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
    chips = [v for v in inputs if isinstance(v, OnChip)]
    name = func._schema.name
    if name not in _ACROSS and chips and any(v.ndim for v in inputs if not isinstance(v, OnChip)):
        raise RuntimeError(f"{name}: tensors on two devices")
    device = kwargs.get("device")
    there = bool(chips) if device is None else torch.device(device).type == DEVICE.type
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten::copy_":
        there = isinstance(args[0], OnChip)
    own = {id(v.host): v for v in chips}
    out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if not there:
        return out
    return tree_map(lambda v: own[id(v)] if id(v) in own else OnChip(v) if isinstance(v, Tensor) else v, out)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, OnChip) else value
