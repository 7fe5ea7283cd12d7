"""Read and write the library's files: safetensors with a JSON string in the header, written atomically, never unpickled.

A kind of file has a format version and a schema, the annotations of a dataclass. :func:`read_tensors` is the only reader:
checks of version, checksum and schema come before the first object is built. Reading ignores unknown fields of a header and
fills in defaults. A field with a default may therefore be added to a schema without a new version; every other change of a
schema needs a new version in `FORMATS`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .__about__ import __version__
from .errors import FileFormatError, IIAError, InputError

__all__ = [
    "FORMATS",
    "bytes_of",
    "check_writable",
    "from_json",
    "read_kind",
    "read_tensors",
    "to_json",
    "write_bytes",
    "write_tensors",
]

FORMATS: dict[str, int] = {"fitted solver": 2, "teacher": 2}
"""Format version of each kind of file; 1 for any other kind."""

_KEY = "iia_ode"
_ATTEMPTS = 20  # readings of a file that other processes replace all the time
_DEEPEST = 50  # levels of lists and objects in a header; the library's own headers have fewer than ten

_T = TypeVar("_T")


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` atomically: a reader sees the old file or the whole new file, never a part.

    Missing folders are made. A link is followed: the file behind the link is replaced, and the link stays. An existing file
    keeps its mode; other hard links to the file keep the old content. A new file has the default mode (umask).

    Raises
    ------
    InputError : `path` is no path.
    OSError : the file cannot be written; the message names the file. As for ``open(path, "wb")``, an existing file must be
        writable. A device or pipe is refused.
    """
    target = _target(path)
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    with _temporary_beside(target) as temporary:
        # Nobody else may read the new content of a private file, not even for a moment.
        permissions = 0o666 if mode is None else 0o600
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, permissions), "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.chmod(temporary, mode)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    return as_path(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless a file can be made at `path`. Call it before long work with a result for this path."""
    with _temporary_beside(_target(path)) as temporary:
        temporary.touch(exist_ok=False)
        temporary.unlink()


_BINARY = getattr(os, "O_BINARY", 0)  # of Windows


def as_path(path: object) -> Path:
    """The path of a file.

    Raises
    ------
    InputError : not a path.
    """
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # anything else is a TypeError
    except TypeError as error:
        raise InputError(f"expected the path of a file, got {type(path).__name__} {path!r}.") from error
    if "\0" in text:
        raise InputError(f"a path has no zero byte, got {text!r}.")
    return Path(text)


def _target(path: str | os.PathLike[str]) -> Path:
    """The file behind all links of `path`, which need not exist."""
    target = Path(os.path.realpath(as_path(path)))
    if target.is_dir():
        raise _os_error(errno.EISDIR, path)
    if target.is_symlink():
        raise _os_error(errno.ELOOP, path)
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    if target.exists() and not os.access(target, os.W_OK):
        raise _os_error(errno.EACCES, path)
    return target


def _os_error(number: int, path: str | os.PathLike[str]) -> OSError:
    return OSError(number, os.strerror(number), os.fspath(path))


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """An unused name in the folder of `target`; makes the folder, removes the file in the end, names `target` in errors."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
    except OSError as error:
        if str(error.filename) != str(temporary) or error.errno is None:
            raise
        raise _os_error(error.errno, target) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> Path:
    """Write `tensors` and a JSON-ready `header` as one safetensors file of the given `kind`, atomically.

    Format version, kind and version of the library are added to the header. :func:`write_bytes` has the rules for links,
    modes and folders.

    Raises
    ------
    FileFormatError : the header is not plain JSON: it holds a tensor, NaN or an object of another library. Or a tensor has
        a dtype that safetensors does not know.
    OSError : the file cannot be written.
    """
    # Copies: safetensors refuses tensors that share memory, and two weights of a plan may share it.
    stored = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    about = {"format": FORMATS.get(kind, 1), "kind": kind, "library": __version__}
    try:
        # Through JSON and back, because the digest is taken of the reader's values (lists for tuples, text for keys).
        body = json.loads(_dump(about | dict(header)))
    except (TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"the header of {path} is not plain JSON: {error}.") from error
    try:
        data = save(stored, {_KEY: _dump({**body, "sha256": _digest(stored, body)})})
    except (SafetensorError, LookupError, TypeError) as error:
        raise FileFormatError(f"a tensor of {path} is of a kind that no file holds: {error}.") from error
    return write_bytes(path, data)


# ---- reading ---------------------------------------------------------------------------------------------------------


@overload
def read_tensors(
    path: str | os.PathLike[str], kind: str, schema: None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


@overload
def read_tensors(path: str | os.PathLike[str], kind: str, schema: type[_T]) -> tuple[dict[str, Tensor], _T]: ...


def read_tensors(
    path: str | os.PathLike[str], kind: str, schema: type[Any] | None = None
) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the header of a file of :func:`write_tensors` with the same `kind`.

    Parameters
    ----------
    path : the file.
    kind : the expected kind.
    schema : a dataclass with the fields of the header; by default the header is a dict.

    Returns
    -------
    Tensors on the CPU, in memory of their own, and the header. Memory and time are in proportion to the file.

    Raises
    ------
    FileFormatError : the file is missing, not safetensors, not of this library, damaged or edited, of another kind, of
        another format version, or its header does not fit the schema.
    InputError : `path` is no path.
    """
    tensors, header = _unreplaced(path, _whole)
    if header["kind"] != kind:
        raise FileFormatError(f"{str(path)!r} holds a {header['kind']!r}, expected a {kind!r}.")
    return tensors, header if schema is None else from_json(schema, header, repr(str(path)))


def read_kind(path: str | os.PathLike[str]) -> str:
    """The `kind` of a file of :func:`write_tensors`, from the header alone; the checksum is not tested.

    Raises
    ------
    FileFormatError : the file is missing, not safetensors, not of this library, of another format version, or has no kind.
    InputError : `path` is no path.
    """
    return _unreplaced(path, _kind)


def _whole(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file, after the check of the checksum."""
    with _opened(path) as (file, header):
        # Copies: memory of the file changes when another process writes into the file, and lies at any address.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    if header.pop("sha256", None) != _digest(tensors, header):
        raise FileFormatError(
            f"{str(path)!r} is damaged or edited: its checksum does not match. Take an unharmed copy, or make it again."
        )
    return tensors, header


def _kind(path: str | os.PathLike[str]) -> str:
    with _opened(path) as (_, header):
        return str(header["kind"])


def _unreplaced(path: str | os.PathLike[str], read: Callable[[str | os.PathLike[str]], _T]) -> _T:
    """Read a file, and read it again if another process replaced it meanwhile: safetensors opens a path twice."""
    for _ in range(_ATTEMPTS):
        before = _identity(path)
        try:
            return read(path)
        except FileFormatError:
            if before is None or before == _identity(path):
                raise
    return read(path)


def _identity(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """What tells a file from its replacement; None without a file."""
    try:
        found = os.stat(as_path(path))
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open file of this library, and its header with the checksum."""
    own = as_path(path)
    try:
        known = own.is_file()
    except OSError as error:  # a name that the system does not take
        raise FileFormatError(f"no file {str(own)[:100]!r}: {error.strerror}.") from error
    if not known:
        raise FileFormatError(f"{str(own)!r} is a folder." if own.is_dir() else f"no file {str(own)!r}.")
    try:
        with safe_open(own, framework="pt", device="cpu") as file:
            yield file, _header(own, file.metadata() or {})
    except IIAError:
        raise
    except (SafetensorError, OSError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{str(own)!r} is not a readable safetensors file: {error}.") from error


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header, with a known format version."""
    if _KEY not in metadata:
        raise FileFormatError(f"{str(path)!r} was not written by iia_ode: its header has no {_KEY!r} entry.")
    try:
        header = json.loads(metadata[_KEY], parse_constant=_no_number)
        version, kind = header["format"], header["kind"]
        if type(version) is not int or not isinstance(kind, str):
            raise ValueError(f"got format {version!r} and kind {kind!r}")
        if _depth(header) > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} levels")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(f"{str(path)!r} is damaged: its header is not valid ({error!r}).") from error
    known = FORMATS.get(kind, 1)
    if version > known:
        raise FileFormatError(
            f"{str(path)!r} has format version {version}; this iia_ode reads up to {known}. Upgrade iia_ode."
        )
    if version < known:
        raise FileFormatError(
            f"{str(path)!r} has format version {version} of a {kind!r}; this iia_ode {__version__} reads {known}. Make the "
            f"file again, or read it with the iia_ode that wrote it."
        )
    return dict(header)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _depth(value: Any) -> int:
    """Levels of lists and objects in a JSON value, up to one more than the limit."""
    depth, level = 0, [value]
    while level and depth <= _DEEPEST:
        depth += 1
        level = [
            v
            for node in level
            if isinstance(node, dict | list)
            for v in (node.values() if isinstance(node, dict) else node)
        ]
    return depth


def _dump(body: Mapping[str, Any]) -> str:
    return json.dumps(body, allow_nan=False, sort_keys=True)


def _digest(tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> str | None:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes; independent of the layout of the file.

    A header with a number beyond float64, which is never written, has no digest.
    """
    try:
        digest = hashlib.sha256(_dump(body).encode())
    except ValueError:
        return "none"
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{json.dumps(name)} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, for a hash."""
    flat = values.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # A single entry may have stride 0, which no view of bytes takes.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


# ---- dataclasses as JSON ---------------------------------------------------------------------------------------------


def to_json(value: Any) -> dict[str, Any]:
    """The JSON object of a dataclass.

    Raises
    ------
    FileFormatError : a field holds NaN, infinity or an object that JSON cannot hold.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(asdict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"this {type(value).__name__} is not plain JSON: {error}.") from error
    return found


def from_json(kind: type[_T], value: Mapping[str, Any], source: str) -> _T:
    """The dataclass `kind` from a JSON object of :func:`to_json`; `source` is the subject of error messages.

    Raises
    ------
    FileFormatError : a field is missing or has another type; the message names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, UnicodeError) as error:
        problem = str(error).replace("`$", "`header")
        raise FileFormatError(f"{source} is damaged, or from another version of iia_ode: {problem}.") from error
