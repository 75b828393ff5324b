# SPDX-License-Identifier: Apache-2.0
"""Who speaks, on the kernel's word: the small socket beside the daemon's, whose name has ``.id`` appended.

gRPC for Python shows no credentials of its peers. So a client also connects here; the kernel says who that is
(SO_PEERCRED: pid and uid as this daemon's namespaces count them, whatever the client's are), and the client is given a
token to show with its calls. The connection stays open and says nothing more. Its end, or that of the process where the
kernel can watch it although somebody else has inherited the connection (SO_PEERPIDFD, Linux 6.5), is the end of all
that was said under the token.

On the daemon's event loop, without a thread. A peer costs a descriptor or two and is never waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import secrets
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.ground.bucket import Bucket

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.engine.records import Session

SO_PEERPIDFD: Final = 77
"""include/uapi/asm-generic/socket.h."""
UCRED: Final = struct.Struct("=3i")
"""pid, uid, gid (struct ucred, include/linux/socket.h)."""
SO_PEERGROUPS: Final = 59
"""include/uapi/asm-generic/socket.h; Linux 4.13."""
GROUPS: Final = 1024
"""Bytes that Python's getsockopt can return: 256 groups. Of who has more, only the first one (SO_PEERCRED) is known."""
BACKLOG: Final = 1024
"""Connections that wait to be accepted."""
AT_ONCE: Final = 8
"""Of them, accepted before others have their turn on the loop; each takes up to some tenths of a millisecond."""
REFUSED_S: Final = 0.002
"""Nobody is accepted for so long once somebody has been refused: he comes again at once."""
ACCEPT_AGAIN_S: Final = 0.5
"""Until the next try when there was no descriptor."""
PER_S: Final = 32
"""New connections of a user, once as many as it may have have come at once."""
PACES: Final = 256
"""Users whose pace is remembered in any case."""
RESERVED: Final = 16
"""Connections that operators may have when all others are taken."""
USERS: Final = 4
"""So many users may have as many connections as one; all together no more."""
PART: Final = 5
"""One connection for so many descriptors at most, of which it takes two; half of these for one process."""


@dataclass(frozen=True, slots=True)
class Rights:
    """Who may do more than a worker. Root and the daemon's own user may everything."""

    operators: frozenset[int] = frozenset()
    """Groups whose members may use the Control service."""
    trusted: frozenset[int] = frozenset()
    """Users who may hint connections of others, too: a router that speaks for all workers, say."""

    def operator(self, uid: int, groups: frozenset[int]) -> bool:
        """Whether such a process operates the daemon."""
        return self.superuser(uid) or not self.operators.isdisjoint(groups)

    def superuser(self, uid: int) -> bool:
        """Whether that user operates the daemon whatever its groups are."""
        return uid in (0, os.geteuid())

    def speaks_for_all(self, uid: int) -> bool:
        """Whether hints of that user may name anybody's connections."""
        return self.superuser(uid) or uid in self.trusted


@dataclass(slots=True, eq=False)
class Peer:
    """A process that has been given a token."""

    token: str
    pid: int
    """In our pid namespace; 0: it is not in there."""
    uid: int
    operator: bool = False
    only: int = -1
    """User whose connections alone it may name; -1: anybody's."""
    sessions: list[Session] = field(default_factory=list)
    gone: bool = False


class Identities:
    """Serves the socket and knows its peers."""

    def __init__(self, limit: int, rights: Rights | None = None) -> None:
        """``limit``: connections of one user at a time."""
        self.limit = limit
        self.rights = rights or Rights()
        self.ended: Callable[[Peer], None] = lambda _peer: None
        """Called when one is gone."""
        self._peers: dict[str, Peer] = {}
        self._by_uid: Counter[int] = Counter()
        self._by_pid: Counter[int] = Counter()
        self._listener: socket.socket | None = None
        self._coming: set[asyncio.Task[Any]] = set()
        self._paces: dict[int, Bucket] = {}
        """How often users may connect now."""
        self._pace_room = PACES
        self.open: set[asyncio.Transport] = set()

    def __len__(self) -> int:
        return len(self._peers)

    def of(self, token: str) -> Peer | None:
        """Who was given a token; None: nobody, or it is gone."""
        return self._peers.get(token)

    async def serve(self, listener: socket.socket) -> None:
        """Serve a listening socket until ``close``, which closes it, or another one takes its place."""
        listener.listen(BACKLOG)
        self._stop_listening()
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Stop, and hang up. Idempotent."""
        self._stop_listening()
        for transport in self.open:
            transport.abort()

    # --- connections --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        """Take some of those who wait; the others when others on the loop have had their turn."""
        loop, listener, refused = asyncio.get_running_loop(), self._listener, 0
        for _ in range(AT_ONCE):
            if listener is None:
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptors: it would be called again at once, and again
                self._pause(ACCEPT_AGAIN_S)
                return
            sock.setblocking(False)
            uid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))[1]
            if self._too_fast(uid, loop.time()):
                with sock, contextlib.suppress(OSError):
                    sock.send(f"!user {uid} connects too often\n".encode())
                refused += 1
                continue
            coming = loop.create_task(loop.connect_accepted_socket(lambda: _Connection(self), sock))
            self._coming.add(coming)
            coming.add_done_callback(self._coming.discard)
        if refused:
            self._pause(REFUSED_S)

    def _pause(self, seconds: float) -> None:
        if self._listener is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(seconds, self._listen)

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _too_fast(self, uid: int, now: float) -> bool:
        """A user has connected more often than PER_S, and its burst is used up."""
        if self.rights.superuser(uid):
            return False
        pace = self._paces.get(uid)
        if pace is None:
            if len(self._paces) > self._pace_room:
                self._paces = {u: p for u, p in self._paces.items() if now - p.at < self.limit / PER_S}
                self._pace_room = max(PACES, 2 * len(self._paces))  # who has 65,536 users costs no more by each
            pace = self._paces[uid] = Bucket(self.limit, now)
        if pace.fill(now, PER_S, self.limit) < 1:
            return True
        pace.left -= 1
        return False

    def admit(self, pid: int, uid: int, groups: frozenset[int] = frozenset()) -> Peer | str:
        """A peer with a token, or why not. An operator is let in beyond the limit: somebody must be able to look."""
        operator, only = self.rights.operator(uid, groups), -1 if self.rights.speaks_for_all(uid) else uid
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // PART
        room = min(RESERVED, most // 4) if operator else 0
        if pid and self._by_pid[pid] >= max(most // 2, 1):
            return f"process {pid} has half of the connections that mfsd has descriptors for (LimitNOFILE)"
        if self._by_uid[uid] >= self.limit + room:
            return f"user {uid} has {self.limit} connections open already (limits.max_sessions_per_user)"
        if len(self._peers) >= USERS * self.limit + room:
            return f"{len(self._peers)} connections are open already ({USERS} times limits.max_sessions_per_user)"
        if len(self._peers) >= most + room:
            return f"{len(self._peers)} connections are open already, one for {PART} descriptors (LimitNOFILE)"
        peer = Peer(secrets.token_hex(16), pid, uid, operator, only)
        self._peers[peer.token] = peer
        self._by_uid[uid] += 1
        self._by_pid[pid] += 1
        return peer

    def leave(self, peer: Peer) -> None:
        """Its connection has ended."""
        peer.gone = True
        del self._peers[peer.token]
        for count, whose in ((self._by_uid, peer.uid), (self._by_pid, peer.pid)):
            count[whose] -= 1
            if not count[whose]:
                del count[whose]
        self.ended(peer)


class _Connection(asyncio.Protocol):
    """One peer."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities
        self._transport: asyncio.Transport | None = None
        self._peer: Peer | None = None
        self._pidfd: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find out who it is, and give the token."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream socket
        self._transport = transport
        self._identities.open.add(transport)
        sock = transport.get_extra_info("socket")
        pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        try:
            self._pidfd = _pidfd(sock, pid)
        except ProcessLookupError:
            transport.abort()
            return
        admitted = self._identities.admit(pid, uid, frozenset({gid, *_groups(sock)}))
        if isinstance(admitted, str):
            transport.write(f"!{admitted}\n".encode())
            transport.close()
            return
        self._peer = admitted
        if self._pidfd is not None:
            asyncio.get_running_loop().add_reader(self._pidfd, transport.abort)
        transport.write(f"{admitted.token}\n".encode())

    def data_received(self, data: bytes) -> None:
        """A peer has nothing to say; what it says is not kept."""
        del data
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has hung up, or we have."""
        del exc
        if self._transport is not None:
            self._identities.open.discard(self._transport)
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._peer is not None:
            self._identities.leave(self._peer)


def _groups(sock: socket.socket) -> tuple[int, ...]:
    """The supplementary groups of the process at the other end."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS)
    except OSError:  # ERANGE: too many
        return ()
    return struct.unpack(f"={len(raw) // 4}I", raw)


def _pidfd(sock: socket.socket, pid: int) -> int | None:
    """A descriptor of the process at the other end; None: the end of the connection must do.

    Raises ProcessLookupError when it is gone already.
    """
    with contextlib.suppress(OSError):
        fd: int = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        return fd
    if pid:
        try:
            # Older kernels. Should the pid have been given to another process since, the connection has ended by now.
            return os.pidfd_open(pid)
        except OSError as e:
            if e.errno == errno.ESRCH:
                raise
    return None
