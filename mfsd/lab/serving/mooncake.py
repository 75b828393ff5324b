# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine over TCP, as far as the lab needs it, and how its arrivals are seen.

One-sided writes notify nobody at the other end, so a decode host looks: senders write ones where there were zeros.
Mooncake cuts a write into slices that may come over different connections, each of them in order, so the last byte
of every slice is looked at.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from mfsd.lab.models import Scaled
    from mfsd.lab.requests import Request

PORTS: Final = (15_000, 17_000)
"""MC_MIN_RPC_PORT and MC_MAX_RPC_PORT: it listens somewhere in between, so hints can name its connections."""

SLICE: Final = 65_536
"""Bytes; Mooncake's MC_TCP_SLICE_SIZE unless told otherwise."""


class TransferError(Exception):
    """A transfer failed; the message says which."""


class Mooncake:
    """One of them, reachable by others as ``session``. Raises ImportError without the extra, TransferError."""

    def __init__(self, address: str) -> None:
        from mooncake.engine import TransferEngine  # noqa: PLC0415 - an extra

        self._transfers: Any = TransferEngine()
        self._check(self._transfers.initialize(address, "P2PHANDSHAKE", "tcp", ""), f"initialize {address}")
        self._memories: list[npt.NDArray[np.uint8]] = []
        """It knows addresses only; what is registered must not be freed."""
        self.session = f"{address}:{self._transfers.get_rpc_port()}"

    def memory(self, size: int) -> tuple[npt.NDArray[np.uint8], int]:
        """``size`` bytes of registered memory, zero, and their address."""
        data = np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8)
        address = int(data.ctypes.data)
        self._memories.append(data)
        self._check(self._transfers.register_memory(address, len(data)), f"register {size} bytes")
        return data, address

    def write(self, session: str, local: int, remote: int, size: int) -> None:
        """Write ``size`` bytes into another one's memory; returns when this one calls it done."""
        self._check(self._transfers.transfer_sync_write(session, local, remote, size), f"write to {session}")

    def read(self, session: str, local: int, remote: int, size: int) -> None:
        """Read from another one's memory; returns when the bytes are here."""
        self._check(self._transfers.transfer_sync_read(session, local, remote, size), f"read from {session}")

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status:
            raise TransferError(f"Mooncake's transfer engine: {what}: status {status}")


@dataclass(frozen=True, slots=True)
class Memory:
    """Where requests' KV lies at a decode host: a region per step, one after the other. Offsets and sizes in bytes."""

    base: dict[int, int]
    """Request -> offset of its first step."""
    size: dict[int, int]
    """Request -> bytes of each step."""
    steps: int
    total: int

    @classmethod
    def of(cls, work: Sequence[Request], scaled: Scaled) -> Memory:
        """Lay out the KV of ``work``."""
        base, size, at = {}, {}, 0
        for request in work:
            base[request.id], size[request.id] = at, scaled.kv(request.tokens)
            at += size[request.id] * scaled.rounds
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

    def expect(self, request: int) -> None:
        """Begin to look for a request."""
        self._missing[request] = self._memory.marks(request)

    def look(self) -> list[tuple[int, int, bool]]:
        """What has come since the last look: request, bytes (those of whole slices), whether all of it is there."""
        out = []
        for request, marks in list(self._missing.items()):
            missing = marks[self._data[marks] == 0]
            seen = len(marks) - len(missing)
            if seen:
                each = self._memory.size[request] * self._memory.steps / len(self._memory.marks(request))
                out.append((request, round(seen * each), not len(missing)))
                self._missing[request] = missing
            if not len(missing):
                del self._missing[request]
        return out
