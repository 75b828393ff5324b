# SPDX-License-Identifier: Apache-2.0
"""The worker's side of the Hints service: typed calls that return at once.

Every call appends to a queue; a background thread (link.py) does the rest. Without a daemon nothing is sent and nothing
fails; the thread keeps trying, and tells a daemon that appears what is alive then.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import secrets
import socket
import sys
import time
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from mfsd.client.advice import Advice, Advisor
from mfsd.client.encode import fault
from mfsd.client.events import Events
from mfsd.client.ledger import Ledger
from mfsd.client.link import Link
from mfsd.client.outcome import Rejected, Stats
from mfsd.client.selectors import Connection, Named, name, whole
from mfsd.client.way import where
from mfsd.client.whereabouts import Whereabouts
from mfsd.ground.model import (
    INF,
    Address,
    BatchHint,
    EndHint,
    Event,
    Hint,
    MarkHint,
    ProgressHint,
    RequestHint,
    Stage,
    TransferHint,
    What,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from typing import Self

__all__ = ["Advice", "Client", "Rejected", "Stats", "Transfer"]

DEFAULT_TARGET: Final = "unix:/run/mfsd/mfsd.sock"
TARGET_VARIABLE: Final = "MFSD_TARGET"
"""Environment variable that replaces the default target; empty: send no hints at all."""

_clients: weakref.WeakSet[Client] = weakref.WeakSet()

log = logging.getLogger("mfsd.client")


@dataclass(frozen=True, slots=True)
class Transfer:
    """What ``Client.transfer`` is told, for ``Client.transfers``."""

    id: str
    connection: Connection
    size: int
    stage: Stage
    request: str = ""
    batch: str = ""
    layer: int = 0
    deadline_s: float | None = None
    ttl_s: float = 0.0
    interleaved: bool = False
    max_defer_s: float | None = None


class Client:
    """Sends this process's hints to the daemon of its host. Thread-safe; never blocks; never raises for lack of one.

    ``session`` names the process to the daemon, unique among its sessions (default: host, pid and a random part).
    ``target`` is a gRPC address, or the path of the daemon's socket; "" sends nothing; None: the environment's
    MFSD_TARGET, else the default socket.
    ``queue`` bounds the hints that wait for the background thread: when it is full the oldest goes (``stats.dropped``).
    ``batch`` is how many hints a message takes at most. ``on_event`` and ``on_rejected`` are called from the background
    thread and must return soon; for a connection that can't be hinted ``on_rejected`` is called at once, from yours.

    What it has said ends with ``close``, and with the process. After a fork the child's client is closed, since neither
    the thread nor gRPC survives it: make one in the child. Under gevent's patched threads it can't work, and raises
    RuntimeError.
    """

    def __init__(
        self,
        session: str | None = None,
        target: str | os.PathLike[str] | None = None,
        *,
        queue: int = 65_536,
        batch: int = 256,
        on_event: Callable[[Event], None] | None = None,
        on_rejected: Callable[[Rejected], None] | None = None,
    ) -> None:
        if target is None:
            target = os.environ.get(TARGET_VARIABLE, DEFAULT_TARGET)
        target = where(target)
        if session is not None and (not isinstance(session, str) or session.startswith(("unix:", "/"))):
            raise ValueError(f"session = {session!r}: must be a name; where the daemon listens is target=...")
        self.session = session or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(6)}"
        for parameter, value in (("queue", queue), ("batch", batch)):
            whole(parameter, value, "how many hints")
        for parameter, callback in (("on_event", on_event), ("on_rejected", on_rejected)):
            if callback is not None and not callable(callback):
                raise TypeError(f"{parameter}: {callback!r} can't be called; give a function of one argument, or None")
        self._link: Link | None = None
        self._last = Stats()
        self._inherited = False
        """It was another process's, of which this one is a fork, and nobody has used it here yet."""
        self._whereabouts = Whereabouts()
        self._events = Events(on_event)
        self._advisor: Advisor | None = None
        if target:
            _need_threads()
            self._advisor = Advisor(target)
            ledger = Ledger(queue, self._whereabouts.reached)
            self._link = Link(self.session, target, queue, batch, self._events.tell, on_rejected, ledger=ledger)
        _clients.add(self)

    # --- hints --------------------------------------------------------------------------------------------------------

    def request(
        self,
        request_id: str,
        *,
        ttft_left_s: float | None = None,
        no_deadline: bool = False,
        batch: str = "",
        compute_left_s: float = 0.0,
        ttl_s: float = 0.0,
    ) -> None:
        """Announce a request whose first token is due in ``ttft_left_s`` seconds (negative: late). Call again to renew.

        ``no_deadline``, instead: nobody has said when it is due, so it is neither met nor missed. ``compute_left_s`` is
        the compute still ahead of the first token, 0 if unknown. ``ttl_s`` is how long after the deadline, or from now,
        the daemon may forget the request, 0 for its default.
        """
        why, deadline = "", INF
        if not no_deadline:
            deadline = _at(time.monotonic(), ttft_left_s)  # type: ignore[arg-type]  # what is no number is refused
            if deadline == INF:
                why = f"ttft_left_s: {ttft_left_s} is no number of seconds; say no_deadline=True where there is none"
        elif ttft_left_s is not None:
            why = "no_deadline: is said together with ttft_left_s; give one of them"
        self._say(RequestHint(request_id, deadline, batch, compute_left_s, ttl_s), why)

    def batch(
        self,
        batch_id: str,
        requests: Iterable[str] = (),
        *,
        layers: int = 0,
        current_layer: int = 0,
        layer_compute_s: float = 0.0,
    ) -> None:
        """Announce which requests execute together, and what is known of the forward pass (0: unknown)."""
        why = ""
        if isinstance(requests, str | bytes) or not hasattr(requests, "__iter__"):
            why, requests = f"requests: {requests!r} is no list; give a list of strings", ()
        self._say(BatchHint(batch_id, list(requests), layers, current_layer, layer_compute_s), why)

    def layer(self, batch_id: str, current_layer: int, *, compute_done: bool = False) -> None:
        """Say that a batch starts a layer (0-based), or that its forward pass has ended."""
        self._say(ProgressHint(batch_id, current_layer, compute_done))

    def transfer(
        self,
        transfer_id: str,
        connection: Connection,
        size: int,
        *,
        stage: Stage,
        request: str = "",
        batch: str = "",
        layer: int = 0,
        deadline_s: float | None = None,
        ttl_s: float = 0.0,
        interleaved: bool = False,
        max_defer_s: float | None = None,
    ) -> None:
        """Announce ``size`` payload bytes about to be written to a connection, in the order of writing.

        ``request`` or ``batch`` (or both) own it; collectives and background need neither. ``layer`` consumes (stage
        1), executes (2) or produced (3) the data. ``deadline_s`` is from now; None: its request's. ``interleaved``: its
        bytes and those of others are written in turns. ``max_defer_s`` is the longest time from now that it may be held
        back, below the lease or time-out of whoever waits for it; None: the policy's default. Raises OSError for a
        closed socket.
        """
        named, now = name(connection), time.monotonic()
        hint = TransferHint(
            transfer_id, request, batch, stage, layer, size, named.selector,
            INF if deadline_s is None else _at(now, deadline_s), ttl_s, not interleaved, named.position,
            INF if max_defer_s is None else _at(now, max_defer_s),
        )  # fmt: skip
        if self._say(hint, named.fault):
            self._whereabouts.note(hint, named)

    def transfers(self, transfers: Iterable[Transfer]) -> None:
        """Announce many at once, which costs the daemon a fraction; as ``transfer`` for each, in their order.

        Raises TypeError for what is no Transfer, OSError for a closed socket; nothing is announced then.
        """
        now = time.monotonic()
        known: dict[int, tuple[Connection, Named]] = {}
        """By identity; the connection is kept so that no other one gets its number."""
        hints: list[Hint] = []
        for t in (transfers,) if isinstance(transfers, Transfer) else transfers:
            if not isinstance(t, Transfer):
                raise TypeError(f"transfers: {t!r} is no Transfer; give Transfer(id, connection, size, stage, ...)")
            if id(t.connection) not in known:
                known[id(t.connection)] = t.connection, name(t.connection)
            named = known[id(t.connection)][1]
            hint = TransferHint(
                t.id,
                t.request,
                t.batch,
                t.stage,
                t.layer,
                t.size,
                named.selector,
                INF if t.deadline_s is None else _at(now, t.deadline_s),
                t.ttl_s,
                not t.interleaved,
                named.position,
                INF if t.max_defer_s is None else _at(now, t.max_defer_s),
            )
            if why := named.fault or fault(hint):
                self._refuse(hint, why)
            else:
                self._whereabouts.note(hint, named)
                hints.append(hint)
        if hints:
            self._put(*hints)

    def done(self, *, transfer: str = "", request: str = "", batch: str = "") -> None:
        """Say that all bytes of a transfer, or of all that a request or batch owns, have been handed to the socket."""
        self._end(transfer, request, batch, cancelled=False)

    def cancel(self, *, transfer: str = "", request: str = "", batch: str = "") -> None:
        """Say that the bytes will not come."""
        self._end(transfer, request, batch, cancelled=True)

    def mark(self, connection: Connection, stage: Stage, *, interleaved: bool = False) -> None:
        """Give a connection a static stage, for bytes that no transfer announces (a collective group's sockets).

        ``interleaved``: so are the bytes of transfers that are announced on it.
        """
        named = name(connection)
        self._say(MarkHint(named.selector, stage, not interleaved), named.fault)

    def unmark(self, connection: Connection) -> None:
        """Take a mark back."""
        self._say(MarkHint(name(connection).selector, Stage.NONE))

    def _refuse(self, hint: Hint, why: str) -> None:
        if self._link is not None:
            self._link.refuse(hint, why)

    def _end(self, transfer: str, request: str, batch: str, *, cancelled: bool) -> None:
        named = [(What.TRANSFER, transfer), (What.REQUEST, request), (What.BATCH, batch)]
        for what, one in named:
            if one:
                written = self._whereabouts.end(what, one, cancelled=cancelled) if type(one) is str else ()
                self._say(EndHint(what, one, cancelled, written))
        if not (transfer or request or batch):
            self._refuse(EndHint(What.TRANSFER, "", cancelled), "transfer: is empty; name a transfer, request or batch")

    def _say(self, hint: Hint, why_not: str = "") -> bool:
        """False: it can't be sent."""
        if why := why_not or fault(hint):
            self._refuse(hint, why)
            return False
        self._put(hint)
        return True

    def _put(self, *hints: Hint) -> None:
        if self._link is not None:
            self._link.put(*hints)
        elif self._inherited:
            self._inherited = False
            log.warning("no hints are sent by process %d: its client is that of its parent; make one here", os.getpid())

    # --- the way back -------------------------------------------------------------------------------------------------

    def events(self) -> AsyncIterator[Event]:
        """What the daemon tells from now on, in the running event loop, until ``close``: ``async for e in ...``."""
        return self._events.listen()

    def advice(self, peer: str | Address, *, source: str | Address = "") -> Advice | None:
        """What the path to a host can bear, and how long bytes take: to choose where to decode, or to recompute.

        ``peer`` is an IP address; ``source``: the sending host's, if that is another one. Never waits: what is told is
        a fraction of a second old, and None until a daemon has said something, which the first question makes it do.
        """
        return None if self._advisor is None else self._advisor.get(str(peer), str(source or ""))

    # --- life ---------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """What has become of the hints so far (a copy); after ``close``, until then."""
        return self._link.stats() if self._link is not None else replace(self._last)

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait until the daemon has answered everything said so far, which it does when the kernel obeys.

        False when it has not within ``timeout`` seconds.
        """
        _seconds(timeout)
        return self._link is None or self._link.flush(timeout)

    def close(self, timeout: float = 0.2) -> None:
        """Send what is queued, for at most ``timeout`` seconds, and end the background thread. Idempotent."""
        _seconds(timeout)
        link, self._link = self._link, None
        if link is not None:
            link.close(timeout)
            self._last = replace(link.stats(), connected=False)
        advisor, self._advisor = self._advisor, None
        if advisor is not None:
            advisor.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _forked(self) -> None:
        link, self._link, self._advisor = self._link, None, None
        self._events = Events(None)  # somebody may have held the old one's lock
        self._events.close()
        if link is not None:
            self._inherited = True
            link.forked()


def _at(now: float, seconds: float) -> float:
    """When so many seconds are over. What is no number stays what it is, and is refused with its name."""
    try:
        return now + seconds
    except (TypeError, OverflowError):
        return seconds


def _seconds(timeout: float) -> None:
    try:
        nan = math.isnan(timeout)  # for which Condition would wait for ever
    except TypeError:
        raise TypeError(f"timeout: {timeout!r} is no number of seconds") from None
    if nan:
        raise ValueError("timeout: nan is no number of seconds")


def _need_threads() -> None:
    """Raise RuntimeError where threads are not what they seem: gRPC's wait in C, and greenlets among them never run."""
    patched = getattr(sys.modules.get("gevent.monkey"), "is_module_patched", None)
    if patched is not None and (patched("threading") or patched("thread")):
        raise RuntimeError(
            "mfsd.client needs real threads, but gevent has patched them: patch with thread=False, send the hints from "
            f"another process, or set {TARGET_VARIABLE} to nothing (or target='') to send none"
        )


def _close_all() -> None:
    for client in list(_clients):
        client.close()


def _forget_all() -> None:
    for client in list(_clients):
        client._forked()  # noqa: SLF001 - our own class


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
