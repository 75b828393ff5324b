# SPDX-License-Identifier: Apache-2.0
"""Keep freed memory in the process, so that large numpy temporaries don't fault in fresh pages at every tick.

By default glibc maps blocks above a threshold straight from the kernel and returns them, and the free top of the heap,
as soon as they are freed; the next tick then pays a page fault per 4 KiB for the same memory. With views of 100,000
transfers that is most of a tick (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).
"""

from __future__ import annotations

import ctypes
from typing import Final

KEPT: Final = 64 << 20
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MAX_MMAP_THRESHOLD: Final = 32 << 20
"""glibc refuses more: HEAP_MAX_SIZE / 2 on 64-bit machines (malloc/malloc.c)."""


def keep_freed() -> bool:
    """Ask the allocator to keep up to KEPT free bytes at the top of the heap. False: not glibc, or refused."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    kept: bool = mallopt(_M_TRIM_THRESHOLD, KEPT) == 1
    kept &= mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD) == 1
    return kept
