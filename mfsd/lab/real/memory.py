# SPDX-License-Identifier: Apache-2.0
"""The decode host's memory: a region per request and step, and the bytes that tell that all of it is there.

One-sided writes notify nobody at the other end, so the decode host looks: senders write ones where there were zeros.
The engine cuts a write into slices that may come over different connections, each of them in order, so the last byte
of every slice is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from mfsd.lab.models import Scaled
    from mfsd.lab.workload import Job

SLICE: Final = 65_536
"""Bytes; Mooncake's MC_TCP_SLICE_SIZE unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Regions of all requests, one after the other. Offsets and sizes in bytes."""

    base: dict[int, int]
    """Request -> offset of its first step."""
    size: dict[int, int]
    """Request -> bytes of each step."""
    steps: int
    total: int

    @classmethod
    def of(cls, jobs: Sequence[Job], scaled: Scaled) -> Memory:
        """Lay out the KV of ``jobs``."""
        base, size, at = {}, {}, 0
        for job in jobs:
            base[job.id], size[job.id] = at, scaled.kv(job.tokens)
            at += size[job.id] * scaled.rounds
        return cls(base, size, scaled.rounds, at)

    def offset(self, request: int, step: int) -> int:
        """Of the region of a request's step."""
        return self.base[request] + step * self.size[request]

    def marks(self, request: int) -> npt.NDArray[np.int64]:
        """Offsets of the last byte of every slice of a request, shape (n,)."""
        size = self.size[request]
        ends = np.append(np.arange(SLICE, size, SLICE), size) - 1
        first = self.base[request] + np.arange(self.steps) * size
        out: npt.NDArray[np.int64] = (first[:, None] + ends[None, :]).ravel()
        return out


class Watch:
    """Looks for what has arrived in ``memory``, whose bytes are in ``data``, shape (total,), zero until written."""

    def __init__(self, memory: Memory, data: npt.NDArray[np.uint8]) -> None:
        self._memory, self._data = memory, data
        self._missing: dict[int, npt.NDArray[np.int64]] = {}
        self.done: dict[int, float] = {}
        """Request -> when it was seen to be complete."""
        self.slices: dict[int, list[tuple[float, int]]] = {}
        """Request -> (time, slices seen since the last look)."""

    def expect(self, request: int) -> None:
        """Begin to look for a request."""
        self._missing[request] = self._memory.marks(request)
        self.slices[request] = []

    def look(self, now: float) -> None:
        """See what has come by ``now``."""
        for request, marks in list(self._missing.items()):
            missing = marks[self._data[marks] == 0]
            if len(missing) < len(marks):
                self.slices[request].append((now, len(marks) - len(missing)))
                self._missing[request] = missing
            if not len(missing):
                del self._missing[request]
                self.done[request] = now
