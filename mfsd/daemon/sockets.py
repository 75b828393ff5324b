# SPDX-License-Identifier: Apache-2.0
"""The kernel's knowledge of sockets, as the engine wants it (engine.sockets.Sockets).

Where the kernel tells of connections (datapath/bpf/teller.py), nothing is ever searched on the event loop: a cookie is
looked up in the directory, and what is open already when a selector comes is picked from the directory in a thread.
Where it doesn't, sockets are listed by inet_diag, in a thread as well, again and again. TCP's word on single sockets
comes from inet_diag either way.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog

from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import address_bytes
from mfsd.datapath.bpf.rules import Match
from mfsd.engine.sockets import Closed, Established, Event, Found, Socket
from mfsd.host.sockets import DiagError, SocketResolver
from mfsd.logs import Seldom
from mfsd.model import CookieSelector, HintError, PortRange, ProcessSelector, Selector, TupleSelector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from mfsd.datapath.bpf.teller import Teller, Told
    from mfsd.engine.sockets import Progress
    from mfsd.host.sockets import Socket as Listed
    from mfsd.model import Endpoints

IPPROTO_TCP: Final = 6
KNOWN_MAX: Final = 65_536
"""Sockets remembered from listings where the kernel doesn't tell."""

log = structlog.get_logger(__name__)


class HostSockets:
    """See the module. ``wake`` is called from any thread when an answer to ``look`` has come."""

    def __init__(self, teller: Teller | None, wake: Callable[[], None] = lambda: None) -> None:
        self._teller = teller
        self._wake = wake
        self._diag = SocketResolver()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mfsd-sockets")
        self._answers: list[Found] = []
        self._known: OrderedDict[int, Socket] = OrderedDict()
        self._rules: dict[tuple[Selector, int], list[Match]] = {}
        self._wanted: dict[Match, int] = {}
        """How many selectors and users share a match."""
        self._seldom = Seldom()
        if teller is not None:
            self._thread.submit(self._enter_older)

    def close(self) -> None:
        """Idempotent. The teller is the caller's."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._diag.close()

    # --- engine.sockets.Sockets ---------------------------------------------------------------------------------------

    @property
    def tells(self) -> bool:
        """The kernel reports connections by itself."""
        return self._teller is not None

    def events(self) -> list[Event]:
        """What has happened since the last call."""
        out: list[Event] = []
        if self._teller is not None and self._teller.waiting:
            for event in self._teller.events():
                if event.kind == _abi.EVENT_CLOSED:
                    out.append(Closed(event.sock.cookie, event.acked, event.clean))
                else:
                    out.append(Established(self._socket(event.sock), event.slot, event.active))
        if self._answers:
            answers, self._answers = self._answers, []
            out += answers
        return out

    def by_cookie(self, cookie: int) -> Socket | None:
        """See Sockets."""
        if self._teller is None:
            return self._known.get(cookie)
        told = self._teller.find(cookie)
        return None if told is None else self._socket(told)

    def exact(self, selector: TupleSelector) -> Socket | None:
        """See Sockets."""
        if selector.protocol != IPPROTO_TCP:
            return None  # its socket may have many peers: the classifier goes by the tuple
        try:
            found = self._diag.resolve(selector)
        except DiagError as e:
            self._failed("looking up a socket", e)
            return None
        return _listed(found[0]) if found else None

    def look(self, selectors: Sequence[Selector]) -> None:
        """See Sockets."""
        self._thread.submit(self._look, list(selectors))

    def progress(self, sockets: Sequence[tuple[int, Endpoints]]) -> Mapping[int, Progress | None]:
        """See Sockets."""
        if not sockets:
            return {}
        try:
            return self._diag.tcp_progress(sockets)
        except DiagError as e:
            self._failed("asking TCP", e)
            return {}

    def watch(self, selector: Selector, uid: int, band: int, lanes: int, expires_ns: int) -> None:
        """See Sockets."""
        if self._teller is None:
            return
        matches = self._rules.get((selector, uid))
        if matches is None:
            matches = self._rules[selector, uid] = _matches(selector, uid)
            for match in matches:
                self._wanted[match] = self._wanted.get(match, 0) + 1
        for match in matches:
            if not self._teller.rules.put(match, band, lanes, expires_ns) and self._seldom("rules"):
                log.warning("the kernel's table of rules is full; connections are placed after their first bytes")

    def unwatch(self, selector: Selector, uid: int) -> None:
        """See Sockets."""
        if self._teller is None:
            return
        for match in self._rules.pop((selector, uid), ()):
            self._wanted[match] -= 1
            if not self._wanted[match]:
                del self._wanted[match]
                self._teller.rules.drop(match)

    def lend(self, slots: Sequence[int]) -> None:
        """See Sockets."""
        if self._teller is not None:
            self._teller.lend(slots)

    # --- searches, in the thread --------------------------------------------------------------------------------------

    def _enter_older(self) -> None:
        """Connections that were there before the kernel began to tell go into the directory, too."""
        assert self._teller is not None  # noqa: S101 - for the type checker
        try:
            for listed in self._diag.all():
                if self._teller.find(listed.cookie) is None:
                    self._teller.add(listed.cookie, listed.endpoints)
        except OSError as e:
            self._failed("listing sockets", e)

    def _look(self, selectors: list[Selector]) -> None:
        try:
            found = self._from_directory(selectors) if self._teller is not None else self._from_listing(selectors)
        except OSError as e:
            self._failed("listing sockets", e)
            found = [[] for _ in selectors]
        self._answers += [Found(s, f) for s, f in zip(selectors, found, strict=True)]
        self._wake()

    def _from_listing(self, selectors: Sequence[Selector]) -> list[list[Socket]]:
        found = [[_listed(s) for s in sockets] for sockets in self._diag.resolve_many(selectors)]
        for sockets in found:
            for one in sockets:
                self._known[one.cookie] = one
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return found

    def _from_directory(self, selectors: Sequence[Selector]) -> list[list[Socket]]:
        assert self._teller is not None  # noqa: S101 - for the type checker
        cookies, rows = self._teller.all()
        out: list[list[Socket]] = []
        for selector in selectors:
            picked = _pick(selector, rows)
            found = [self._socket(t) for t in self._teller.told(cookies[picked], rows[picked])]
            if isinstance(selector, ProcessSelector):
                # Of connections that are older than we are, the directory does not know whose they are.
                known = {s.cookie for s in found}
                found += [s for s in map(_listed, self._of_process(selector)) if s.cookie not in known]
            out.append(found)
        return out

    def _of_process(self, selector: ProcessSelector) -> list[Listed]:
        try:
            return self._diag.resolve(selector)
        except HintError:
            return []  # gone, or not ours to see

    def _socket(self, told: Told) -> Socket:
        assert self._teller is not None  # noqa: S101 - for the type checker
        return Socket(told.cookie, told.endpoints, told.uid, told.pid, told.netns == self._teller.netns)

    def _failed(self, what: str, error: OSError) -> None:
        if self._seldom(what):
            log.warning("sockets", what=what, error=str(error))


def _listed(found: Listed) -> Socket:
    return Socket(found.cookie, found.endpoints, found.uid, 0, here=True)


def _matches(selector: Selector, uid: int) -> list[Match]:
    """What the kernel has to match for a selector."""
    if isinstance(selector, TupleSelector):
        dst = ipaddress.ip_network(selector.dst)
        return [Match(selector.src, dst, selector.sport, selector.dport, uid=uid)]
    if isinstance(selector, ProcessSelector):
        return [Match(None, selector.remote, PortRange(), selector.dport, selector.pid, uid)]
    return []


def _pick(selector: Selector, rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which rows of the directory a selector means, shape (n,)."""
    if isinstance(selector, CookieSelector):
        return np.zeros(len(rows), dtype=np.bool_)
    key = rows["key"]
    swap = key["dport"].dtype.newbyteorder(">")
    dport = key["dport"].view(swap)
    out = (dport >= selector.dport.first) & (dport <= selector.dport.last)
    if isinstance(selector, ProcessSelector):
        out &= rows["owner"]["pid"] == selector.pid
        if selector.remote is not None:
            out &= _within(key["daddr"], selector.remote)
        return out
    sport = key["sport"].view(swap)
    out &= (sport >= selector.sport.first) & (sport <= selector.sport.last)
    out &= _within(key["daddr"], ipaddress.ip_network(selector.dst))
    if selector.src is not None:
        out &= _within(key["saddr"], ipaddress.ip_network(selector.src))
    return out


def _within(
    addresses: npt.NDArray[np.uint8], network: ipaddress.IPv4Network | ipaddress.IPv6Network
) -> npt.NDArray[np.bool_]:
    """Which of (n, 16) addresses lie in a network."""
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    mask = np.frombuffer((((1 << bits) - 1) << (128 - bits)).to_bytes(16, "big"), "u1")
    wanted = np.frombuffer(address_bytes(network.network_address), "u1")
    inside: npt.NDArray[np.bool_] = np.all((addresses & mask) == (wanted & mask), axis=1)
    return inside
