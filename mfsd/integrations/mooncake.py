# SPDX-License-Identifier: Apache-2.0
"""Mooncake under mfsd: wrappers of the transfer engine and of the Store that announce what they move over TCP.

    from mooncake.engine import TransferEngine
    from mfsd.integrations.mooncake import HintedEngine

    engine = HintedEngine(TransferEngine(), client)
    engine.transfer_sync_write(session, buffer, there, size, mfsd=Owner("r7", Stage.P2D))

    store = HintedStore(MooncakeDistributedStore(), client)
    store.get("block", mfsd=Owner("r7", Stage.KV_REUSE))

Everything that is not wrapped goes through. A peer is named by address; its ports are those of Mooncake's range
(MC_MIN_RPC_PORT to MC_MAX_RPC_PORT, which peers must share). Reads leave the peer: section [relay] of the daemon.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

from mfsd.integrations import guard
from mfsd.integrations.guard import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.client import Client

__all__ = ["HintedEngine", "HintedStore", "Owner"]

_numbers = itertools.count()


class _Hinted:
    """What both wrappers share. Never raises but what Mooncake raises; never waits."""

    def __init__(self, inner: Any, client: Client, ports: tuple[int, int] | None) -> None:
        self._inner, self._client = inner, client
        self._ports = guard.mooncake_ports() if ports is None else ports
        self._guard, self._resolver = guard.Guard(), guard.Resolver()

    def __getattr__(self, name: str) -> Any:
        """What is not wrapped."""
        return getattr(self._inner, name)

    def _hinted(
        self, peer: str, size: int, owner: Owner | None, move: Callable[..., Any], *words: Any, reads: bool
    ) -> Any:
        """Announce, move, and say that it is over, however that ends."""
        name = f"mooncake-{os.getpid()}-{next(_numbers)}"
        said: list[bool] = []
        self._guard("a transfer's hint", lambda: said.append(self._announce(name, peer, size, owner or Owner(), reads)))
        try:
            out = move(*words)
        except BaseException:
            self._over(name, said, cancelled=True)
            raise
        self._over(name, said, cancelled=isinstance(out, int) and out < 0)
        return out

    def _announce(self, name: str, peer: str, size: int, owner: Owner, reads: bool) -> bool:  # noqa: FBT001 - from above
        host = peer.rpartition(":")[0].strip("[]") if ":" in peer and not peer.endswith("]") else peer
        selector = self._resolver.way(host or peer, self._ports, reads=reads)
        if selector is None or size <= 0:
            return False
        owner.announce(self._client, name, selector, size)
        return True

    def _over(self, name: str, said: list[bool], *, cancelled: bool) -> None:
        if said and said[0]:
            end = self._client.cancel if cancelled else self._client.done
            self._guard("a completion's hint", lambda: end(transfer=name))


class HintedEngine(_Hinted):
    """A TransferEngine. Its peers are named "host:port", as Mooncake has it."""

    def __init__(self, engine: Any, client: Client, ports: tuple[int, int] | None = None) -> None:
        """``ports``: of the peers' engines; None: Mooncake's range."""
        super().__init__(engine, client, ports)

    def transfer_sync_write(
        self, peer: str, buffer: int, there: int, length: int, *rest: Any, mfsd: Owner | None = None
    ) -> int:
        """As the engine's."""
        move = self._inner.transfer_sync_write
        return int(self._hinted(peer, length, mfsd, move, peer, buffer, there, length, *rest, reads=False))

    def transfer_sync_read(
        self, peer: str, buffer: int, there: int, length: int, *rest: Any, mfsd: Owner | None = None
    ) -> int:
        """As the engine's."""
        move = self._inner.transfer_sync_read
        return int(self._hinted(peer, length, mfsd, move, peer, buffer, there, length, *rest, reads=True))

    def batch_transfer_sync_write(
        self,
        peer: str,
        buffers: Sequence[int],
        there: Sequence[int],
        lengths: Sequence[int],
        *rest: Any,
        mfsd: Owner | None = None,
    ) -> int:
        """As the engine's; one transfer to mfsd, since it ends as one."""
        move = self._inner.batch_transfer_sync_write
        return int(self._hinted(peer, sum(lengths), mfsd, move, peer, buffers, there, lengths, *rest, reads=False))

    def batch_transfer_sync_read(
        self,
        peer: str,
        buffers: Sequence[int],
        there: Sequence[int],
        lengths: Sequence[int],
        *rest: Any,
        mfsd: Owner | None = None,
    ) -> int:
        """As the engine's; one transfer to mfsd."""
        move = self._inner.batch_transfer_sync_read
        return int(self._hinted(peer, sum(lengths), mfsd, move, peer, buffers, there, lengths, *rest, reads=True))


class HintedStore(_Hinted):
    """A MooncakeDistributedStore. Where a block lies the Store says per key; there the bytes come from."""

    def __init__(self, store: Any, client: Client, ports: tuple[int, int] | None = None) -> None:
        """``ports``: of the segments' engines; None: Mooncake's range."""
        super().__init__(store, client, ports)

    def get(self, key: str, *, mfsd: Owner | None = None) -> bytes:
        """As the store's: stage 1 of a request, if ``mfsd`` names one."""
        peer, size = self._place(key) if mfsd is not None else ("", 0)
        return bytes(self._hinted(peer, size, mfsd, self._inner.get, key, reads=True))

    def get_into(self, key: str, buffer: int, length: int, *, mfsd: Owner | None = None) -> int:
        """As the store's."""
        peer, size = self._place(key) if mfsd is not None else ("", 0)
        return int(self._hinted(peer, size, mfsd, self._inner.get_into, key, buffer, length, reads=True))

    def _place(self, key: str) -> tuple[str, int]:
        """Segment ("host:port") and size of a block; of none or of one on disk nobody knows."""
        out: list[tuple[str, int]] = []

        def look() -> None:
            for replica in self._inner.get_replica_desc(key):
                if replica.is_memory_replica():
                    where = replica.get_memory_descriptor().buffer_descriptor
                    out.append((str(where.transport_endpoint), int(where.size)))
                    return

        self._guard("looking up a block", look)
        return out[0] if out else ("", 0)
