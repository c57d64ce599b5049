"""A lock between processes that leaves no file behind and ends with the process that has it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["FileLock"]


class FileLock:
    """flock on a file that whoever releases it removes; a process that is killed leaves the file, which is harmless."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def acquire(self, *, blocking: bool = True) -> bool:
        """Whether it is had now; waits for it if it is to."""
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.path, flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(descriptor)
                return False
            if self._is_at_path(descriptor):
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # the former holder has removed the file meanwhile: locks of it mean nothing

    def release(self) -> None:
        """Remove the file, then let others in."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False
