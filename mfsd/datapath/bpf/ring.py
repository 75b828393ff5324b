# SPDX-License-Identifier: Apache-2.0
"""The reading half of a BPF ring buffer (kernel/bpf/ringbuf.c, Documentation/bpf/ringbuf.rst)."""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER: Final = struct.Struct("=II")
_BUSY: Final = 1 << 31
"""BPF_RINGBUF_BUSY_BIT: being written."""
_DISCARD: Final = 1 << 30
"""BPF_RINGBUF_DISCARD_BIT: given up by its writer."""
_PAGE: Final = mmap.PAGESIZE


class Ring:
    """A ring of ``size`` bytes behind a map's descriptor, which stays the caller's. For one reader."""

    def __init__(self, fd: int, size: int) -> None:
        self._size = size
        self._consumer = mmap.mmap(fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The data are mapped twice in a row, so that no record is cut in two.
        self._producer = mmap.mmap(fd, _PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        # Each read and written at once. struct.pack_into() writes zeros first, and to the kernel, which reads it any
        # time, the ring would be full.
        self._consumed = memoryview(self._consumer).cast("Q")
        self._produced = memoryview(self._producer)[:8].cast("Q")
        self._at = self._consumed[0]

    @property
    def waiting(self) -> bool:
        """There is something to read."""
        return self._produced[0] != self._at

    def read(self, most: int) -> Iterator[bytes]:
        """Up to ``most`` records, oldest first; each is free for the kernel once the next is asked for."""
        data = self._producer
        for _ in range(most):
            if not self.waiting:
                return
            start = _PAGE + self._at % self._size
            length, _ = _HEADER.unpack_from(data, start)
            if length & _BUSY:
                return
            size = length & ~_DISCARD
            if not length & _DISCARD:
                yield data[start + 8 : start + 8 + size]
            self._at += 8 + (size + 7 & ~7)
            self._consumed[0] = self._at

    def close(self) -> None:
        """Idempotent."""
        self._consumed.release()
        self._produced.release()
        self._consumer.close()
        self._producer.close()
