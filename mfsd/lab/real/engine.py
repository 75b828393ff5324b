# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine over TCP, as far as the lab needs it."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

PORTS: Final = (15_000, 17_000)
"""MC_MIN_RPC_PORT and MC_MAX_RPC_PORT: the engine listens somewhere in between, so hints can name its connections."""


class TransferError(Exception):
    """The engine failed; the message says at what."""


class Engine:
    """One engine, reachable by others as ``session``. Raises ImportError without the extra, TransferError."""

    def __init__(self, address: str) -> None:
        from mooncake.engine import TransferEngine  # noqa: PLC0415 - an extra

        self._engine: Any = TransferEngine()
        self._check(self._engine.initialize(address, "P2PHANDSHAKE", "tcp", ""), f"initialize {address}")
        self._memories: list[npt.NDArray[np.uint8]] = []
        """The engine knows addresses only; what is registered must not be freed."""
        self.session = f"{address}:{self._engine.get_rpc_port()}"

    def memory(self, size: int) -> tuple[npt.NDArray[np.uint8], int]:
        """``size`` bytes of registered memory, zero, and their address."""
        data = np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8)
        address = int(data.ctypes.data)
        self._memories.append(data)
        self._check(self._engine.register_memory(address, len(data)), f"register {size} bytes")
        return data, address

    def write(self, session: str, local: int, remote: int, size: int) -> None:
        """Write ``size`` bytes into another engine's memory; returns when this engine calls it done."""
        self._check(self._engine.transfer_sync_write(session, local, remote, size), f"write to {session}")

    def read(self, session: str, local: int, remote: int, size: int) -> None:
        """Read from another engine's memory; returns when the bytes are here."""
        self._check(self._engine.transfer_sync_read(session, local, remote, size), f"read from {session}")

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status:
            raise TransferError(f"Mooncake's transfer engine: {what}: status {status}")
