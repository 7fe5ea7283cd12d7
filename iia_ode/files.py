"""Reading and writing: one safetensors file with one JSON string in its header; writes are atomic, nothing is unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import FileFormatError

__all__ = ["FORMAT_VERSION", "read_tensors", "write_bytes", "write_tensors"]

FORMAT_VERSION = 1
_KEY = "iia_ode"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` in one move: a reader sees the old file or the whole new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result should have the permissions any other new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> Path:
    """Write `tensors` and a JSON-ready `header` as one safetensors file of the given `kind`, atomically.

    Raises
    ------
    FileFormatError : the header is not plain JSON (a tensor, NaN or an object of another library in it).
    """
    try:
        text = json.dumps({"format": FORMAT_VERSION, "kind": kind, **header}, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"the header of {path} is not plain JSON: {error}.") from error
    return write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {_KEY: text}))


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that :func:`write_tensors` wrote with the same `kind`.

    Raises
    ------
    FileFormatError : no such file, not safetensors, not ours, of another kind, or of a newer format version.
    """
    if not Path(path).is_file():
        raise FileFormatError(f"no file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{str(path)!r} is not a readable safetensors file: {error}.") from error
    if _KEY not in metadata:
        raise FileFormatError(f"{str(path)!r} was not written by iia_ode: its header has no {_KEY!r} entry.")
    try:
        header: dict[str, Any] = json.loads(metadata[_KEY])
        version, found = int(header["format"]), header["kind"]
    except (ValueError, TypeError, KeyError) as error:
        raise FileFormatError(f"the header of {str(path)!r} is damaged: {error}.") from error
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"{str(path)!r} has format version {version}; this iia_ode reads up to {FORMAT_VERSION}. Upgrade iia_ode."
        )
    if found != kind:
        raise FileFormatError(f"{str(path)!r} holds a {found!r}, expected a {kind!r}.")
    return tensors, header
