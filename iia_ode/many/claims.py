"""Claims: locks on the batches of a folder, which the operating system releases when a process ends.

A claim is a lock on one byte of a file, byte k for batch k. A killed process leaves no claim behind.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["Claims", "claims_on"]

_NAME = ".claims"
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_open: set[tuple[str, int]] = set()  # folder and process; locks belong to a process: two threads would share them
_guard = threading.Lock()


class Claims:
    """The claims of one process on the batches of a folder.

    Attributes
    ----------
    work : whether the file system of the folder has locks; known after the first :meth:`take`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.work = descriptor, True

    def take(self, k: int) -> bool:
        """Claim batch k, unless another process has the claim. Without locks, every claim is granted."""
        try:
            self._lock(k)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _UNKNOWN:
                raise
            self.work = False
        return True

    @contextmanager
    def waiting(self, k: int) -> Iterator[None]:
        """Hold the claim on k for the duration of a block; wait until another process releases the claim."""
        while not self.take(k):
            time.sleep(0.02)
        try:
            yield
        finally:
            self.release(k)

    def release(self, k: int) -> None:
        """Give the claim on batch k back."""
        if self.work:
            self._unlock(k)

    if sys.platform == "win32":

        def _lock(self, k: int) -> None:
            os.lseek(self._descriptor, k, os.SEEK_SET)
            msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)

        def _unlock(self, k: int) -> None:
            os.lseek(self._descriptor, k, os.SEEK_SET)
            msvcrt.locking(self._descriptor, msvcrt.LK_UNLCK, 1)

    else:

        def _lock(self, k: int) -> None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, k)

        def _unlock(self, k: int) -> None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, k)


@contextmanager
def claims_on(folder: Path) -> Iterator[Claims]:
    """The claims on the batches of a folder, for the duration of a block.

    Raises
    ------
    InputError : another thread of this process works on the folder.
    """
    name = os.path.realpath(folder), os.getpid()  # a fork has no locks of its parent
    with _guard:
        if name in _open:
            raise InputError(f"this process is writing samples to {str(folder)!r} already: use one call at a time.")
        _open.add(name)
    try:
        descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield Claims(descriptor)
        finally:
            os.close(descriptor)
    finally:
        with _guard:
            _open.discard(name)
