"""Letting the C library keep freed memory, so that CPU timings show kernels and not page faults.

glibc gives large blocks back to the system when they are freed, and every page of the next block is faulted in anew.
A training step on the CPU allocates gigabytes that way; on virtual machines the faults can cost more than the kernels.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_pages"]

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MAX_INT = 2**31 - 1


def keep_freed_pages() -> bool:
    """Serve all memory from the heap and never trim it, for this process, from now on. False where libc has no such
    switch (then nothing changes). Live bytes, which plans are about, are the same; the process's RSS stays at its peak.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MAX_INT), (_M_TOP_PAD, 64 * 2**20))
    return all(mallopt(name, value) == 1 for name, value in settings)
