"""Read and write the library's files: safetensors with a JSON string in the header, written atomically, never unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import FileFormatError

__all__ = ["FORMAT_VERSION", "bytes_of", "check_writable", "read_kind", "read_tensors", "write_bytes", "write_tensors"]

FORMAT_VERSION = 1
_KEY = "iia_ode"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` atomically: a reader sees the old file or the whole new file, never a part."""
    target = Path(path)
    temporary = _temporary_beside(target)
    try:
        with temporary.open("xb") as file:  # a new file with the default permissions
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless a file can be made at `path`. Call it before long work with a result for this path."""
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = _temporary_beside(Path(path))
    temporary.touch(exist_ok=False)
    temporary.unlink()


def _temporary_beside(target: Path) -> Path:
    """An unused name in the folder of `target`; makes the folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".{secrets.token_hex(8)}.tmp"


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> Path:
    """Write `tensors` and a JSON-ready `header` as one safetensors file of the given `kind`, atomically.

    Raises
    ------
    FileFormatError : the header is not plain JSON: it holds a tensor, NaN or an object of another library.
    """
    # Copies: safetensors refuses tensors that share memory, and two weights of a plan may share it.
    stored = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    try:
        # Through JSON and back, because the digest is taken of the reader's values (lists for tuples, text for keys).
        body = json.loads(_dump({"format": FORMAT_VERSION, "kind": kind, **header}))
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"the header of {path} is not plain JSON: {error}.") from error
    return write_bytes(path, save(stored, {_KEY: _dump({**body, "sha256": _digest(stored, body)})}))


def read_tensors(
    path: str | os.PathLike[str], kind: str, pattern: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file of :func:`write_tensors` with the same `kind`.

    Parameters
    ----------
    path : the file.
    kind : the expected kind.
    pattern : layout of the header. A dict holds the required keys with their patterns, a list holds one pattern for all
        entries, and anything else is a type.

    Raises
    ------
    FileFormatError : the file is missing, not safetensors, not of this library, damaged or edited, of another kind, of a
        newer format version, or its header does not fit the pattern.
    """
    with _opened(path) as (file, header):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    digest = header.pop("sha256", None)
    try:
        intact = digest == _digest(tensors, header)
    except ValueError:  # NaN in the header: never written
        intact = False
    if not intact:
        raise FileFormatError(
            f"{str(path)!r} is damaged or edited: its checksum does not match. Take an unharmed copy, or make it again."
        )
    if header["kind"] != kind:
        raise FileFormatError(f"{str(path)!r} holds a {header['kind']!r}, expected a {kind!r}.")
    if problem := _misfit(header, {} if pattern is None else dict(pattern), "its header"):
        raise FileFormatError(f"{str(path)!r} is damaged: {problem}.")
    return tensors, header


def read_kind(path: str | os.PathLike[str]) -> str:
    """The `kind` of a file of :func:`write_tensors`, from the header alone; the checksum is not tested.

    Raises
    ------
    FileFormatError : the file is missing, not safetensors, not of this library, of a newer format version, or has no kind.
    """
    with _opened(path) as (_, header):
        return str(header["kind"])


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open file of this library, and its header with the checksum."""
    if not Path(path).is_file():
        raise FileFormatError(f"no file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _header(path, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{str(path)!r} is not a readable safetensors file: {error}.") from error


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise FileFormatError(f"{str(path)!r} was not written by iia_ode: its header has no {_KEY!r} entry.")
    try:
        header: dict[str, Any] = json.loads(metadata[_KEY])
        version, _ = header["format"], header["kind"]
        newer = version > FORMAT_VERSION
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(f"{str(path)!r} is damaged: its header has no format and kind ({error}).") from error
    if newer:
        raise FileFormatError(
            f"{str(path)!r} has format version {version}; this iia_ode reads up to {FORMAT_VERSION}. Upgrade iia_ode."
        )
    return header


def _misfit(value: Any, pattern: Any, where: str) -> str | None:
    """The first place where a JSON value departs from its pattern, in words; None if the value fits."""
    kind: Any = type(pattern) if isinstance(pattern, dict | list) else pattern
    if not isinstance(value, kind):
        return f"{where} is {value!r}"
    parts: list[str | None] = []
    if isinstance(pattern, dict):
        if missing := sorted(pattern.keys() - value.keys()):
            return f"{where} lacks {', '.join(missing)}"
        parts = [_misfit(value[k], p, f"{where}.{k}") for k, p in pattern.items()]
    elif isinstance(pattern, list):
        parts = [_misfit(v, pattern[0], f"{where}[{k}]") for k, v in enumerate(value)]
    return next(filter(None, parts), None)


def _dump(body: Mapping[str, Any]) -> str:
    return json.dumps(body, allow_nan=False, sort_keys=True)


def _digest(tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> str:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes; independent of the layout of the file."""
    digest = hashlib.sha256(_dump(body).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{json.dumps(name)} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, for a hash."""
    flat = values.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # A single entry may have stride 0, which no view of bytes takes.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data
