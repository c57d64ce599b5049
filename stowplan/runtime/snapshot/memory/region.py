"""Memory that outlives the processes that map it: sealed, populated memfd regions, handed from process to process.

A region lives as long as one descriptor or mapping of it does. It has no name, so nothing is left to clean up, and its
seals forbid every holder to change its size, so nobody can make others fault by cutting it short.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
import weakref

from stowplan.core.errors import SnapshotMemoryUnavailable, SnapshotRefused
from stowplan.core.host_memory import available_bytes
from stowplan.core.units import MIB, format_bytes
from stowplan.runtime.snapshot.fail_points import fail_at

__all__ = ["RESERVE_BYTES", "Region", "check_available", "mapped_bytes"]

# Left to the kernel and to everything else when memory is taken for snapshots.
RESERVE_BYTES = 256 * MIB
_POPULATED_AT_ONCE_BYTES = 256 * MIB
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not name it
_mapped: weakref.WeakSet[Region] = weakref.WeakSet()
_SIZE_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW")


def mapped_bytes() -> int:
    """What regions take that this process has, and that the kernel does not count as available any more."""
    return sum(region.num_bytes for region in _mapped if not region.closed)


def check_available(needed_bytes: int, purpose: str) -> None:
    """Raise SnapshotMemoryUnavailable unless ``needed_bytes`` can be taken now, ``RESERVE_BYTES`` being left over.

    What counts is the kernel's MemAvailable and the limits of the process's control groups. Linux only.
    """
    if sys.platform != "linux":
        raise SnapshotMemoryUnavailable(
            f"snapshots in memory take Linux (memfd_create and its seals), and this is {sys.platform}: train without "
            f"them, or on Linux.",
            needed_bytes,
        )
    available = max(0, available_bytes() - RESERVE_BYTES)
    if needed_bytes > available:
        raise SnapshotMemoryUnavailable(
            f"{purpose} take {format_bytes(needed_bytes)} ({needed_bytes} bytes) of this host's memory, and "
            f"{format_bytes(available)} ({available} bytes) can be had within MemAvailable and the control group's "
            f"limit, {format_bytes(RESERVE_BYTES)} left over for others. Shard the state over more hosts, raise the "
            f"limit of the container or the job, or train without snapshots in memory.",
            needed_bytes,
            available,
        )


class Region:
    """A mapped memfd; ``view`` has all its bytes, ``descriptor`` is its own and is closed with it.

    The mapping is not inherited by forked children, such as workers of data loaders.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor, self.num_bytes = descriptor, num_bytes
        self._mapping = mmap.mmap(descriptor, num_bytes)
        self._mapping.madvise(mmap.MADV_DONTFORK)
        _mapped.add(self)
        self.view = memoryview(self._mapping)

    @classmethod
    def create(cls, name: str, num_bytes: int, purpose: str = "snapshots") -> Region:
        """Zeros, all of them in memory already; ``name`` is what /proc shows.

        Raises SnapshotMemoryUnavailable: not Linux, or not enough memory, before any is taken where that can be known.
        """
        check_available(num_bytes, purpose)
        try:
            fail_at("reserve")
            region = cls._sealed(name, num_bytes)
        except OSError as error:
            raise SnapshotMemoryUnavailable(
                f"{purpose} take {format_bytes(num_bytes)} ({num_bytes} bytes), and the kernel does not give them: "
                f"{error.strerror}. Raise the limits of this process (ulimit -a), the container or the job, or train "
                f"without snapshots in memory.",
                num_bytes,
            ) from error
        try:
            region.populate()
        except BaseException:
            region.close()
            raise
        return region

    @classmethod
    def _sealed(cls, name: str, num_bytes: int) -> Region:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def received(cls, descriptor: int) -> Region:
        """The region that another process has sent; it owns ``descriptor`` from now on, also when it is refused.

        Raises SnapshotRefused ("unsafe"): no memfd of a fixed size, so a mapping of it might fault.
        """
        try:
            status = os.fstat(descriptor)
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) if stat.S_ISREG(status.st_mode) else 0
        except OSError:
            seals = 0
        missing = [name for name in _SIZE_SEALS if not seals & getattr(fcntl, name)]
        if missing or not status.st_size:
            os.close(descriptor)
            raise SnapshotRefused(
                "unsafe",
                f"a descriptor that was sent is not memory of a fixed size: no {' and '.join(missing) or 'bytes'}. "
                f"Send back the descriptor that the memory process gave.",
            )
        return cls(descriptor, status.st_size)

    def populate(self) -> None:
        """Bring all pages into memory and into this process's page table, so that later copies do not fault.

        What is there stays. Other threads run meanwhile. Raises SnapshotMemoryUnavailable.
        """
        for begin in range(0, self.num_bytes, _POPULATED_AT_ONCE_BYTES):
            length = min(_POPULATED_AT_ONCE_BYTES, self.num_bytes - begin)
            error = _advise(self._mapping, begin, length, _MADV_POPULATE_WRITE)
            if error == errno.EINVAL:  # before Linux 5.14
                error = _allocate(self.descriptor, begin, length)
            if error:
                raise SnapshotMemoryUnavailable(
                    f"the kernel gave {format_bytes(begin)} of {format_bytes(self.num_bytes)} ({self.num_bytes} bytes) "
                    f"for snapshots and then no more: {os.strerror(error)}. End what else uses memory on this host, or "
                    f"raise the limit of the container or the job.",
                    self.num_bytes,
                )

    @property
    def closed(self) -> bool:
        """Whether nothing of it is mapped here any more."""
        return self._mapping.closed

    def close(self) -> bool:
        """Give up descriptor and mapping; slices of ``view`` that are still held keep the mapping: then it is False."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self.view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()
        return self.closed


def _advise(mapping: mmap.mmap, begin: int, length: int, advice: int) -> int:
    """An errno, or 0. mmap.madvise would keep the interpreter's lock; ctypes gives it back."""
    start = ctypes.c_char.from_buffer(mapping)
    address = ctypes.c_void_p(ctypes.addressof(start) + begin)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(address, ctypes.c_size_t(length), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0


def _allocate(descriptor: int, begin: int, length: int) -> int:
    try:
        os.posix_fallocate(descriptor, begin, length)
    except OSError as error:
        return error.errno or errno.ENOMEM
    return 0
