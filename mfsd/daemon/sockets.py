# SPDX-License-Identifier: Apache-2.0
"""The kernel's knowledge of sockets, as the engine wants it (engine.sockets.Sockets).

Where the kernel tells of connections (datapath/bpf/teller.py), nothing is ever searched on the event loop: a cookie is
looked up in the directory, and what is open already when a selector comes is picked from the directory in a thread.
Where it doesn't, sockets are listed by inet_diag, in a thread as well, again and again. TCP's word on single sockets
comes from inet_diag either way.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog

from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import address_bytes
from mfsd.datapath.bpf.rules import Match
from mfsd.engine.sockets import Closed, Established, Event, Found, Socket
from mfsd.host.processes import Families
from mfsd.host.sockets import SocketResolver
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
FAMILIES_S: Final = 1.0
"""How often descendants of processes that selectors name are looked for."""
KNOWN_MAX: Final = 65_536
"""Sockets remembered from listings where the kernel doesn't tell."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Rule:
    """What the kernel has been told for one selector of one user."""

    matches: list[Match]
    place: tuple[int, int, int]
    """(band, lanes, expires_ns)."""


class HostSockets:
    """See the module. ``wake`` is called from any thread when an answer to ``look`` has come."""

    def __init__(self, teller: Teller | None, wake: Callable[[], None] = lambda: None) -> None:
        self._teller = teller
        self._wake = wake
        self._diag = SocketResolver()
        """For the thread, whose listings take their time."""
        self._asked = SocketResolver(self._diag)
        """For the event loop, which never waits for a listing."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mfsd-sockets")
        self._answers: deque[Found] = deque()
        self._known: OrderedDict[int, Socket] = OrderedDict()
        self._sought: set[CookieSelector] = set()
        """Cookies that a search for is to begin."""
        self._rules: dict[tuple[Selector, int], _Rule] = {}
        self._wanted: dict[Match, int] = {}
        """How many selectors and users share a match."""
        self._families = Families()
        self._descendants: Mapping[int, frozenset[int]] = {}
        self._grown: list[Mapping[int, frozenset[int]]] = []
        """Answers of the thread, the newest last."""
        self._next_families = 0.0
        self._seldom = Seldom()
        if teller is not None:
            self._search("listing sockets", self._enter_older)

    def close(self) -> None:
        """Idempotent. The teller is the caller's."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._diag.close()
        self._asked.close()

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
        while self._answers:
            out.append(self._answers.popleft())
        self._follow_families()
        return out

    def by_cookie(self, cookie: int) -> Socket | None:
        """See Sockets."""
        if self._teller is None:
            if cookie not in self._known:
                self._seek(cookie)
            return self._known.get(cookie)
        told = self._teller.find(cookie)
        return None if told is None else self._socket(told)

    def exact(self, selector: TupleSelector) -> Socket | None:
        """See Sockets."""
        if selector.protocol != IPPROTO_TCP:
            return None  # its socket may have many peers: the classifier goes by the tuple
        try:
            found = self._asked.resolve(selector)
        except OSError as e:
            self._failed("looking up a socket", e)
            return None
        return _listed(found[0]) if found else None

    def sends(self, endpoints: Endpoints, uid: int) -> bool:
        """See Sockets."""
        if endpoints.protocol == IPPROTO_TCP:
            return False
        try:
            return self._asked.owner(endpoints) == uid
        except OSError as e:
            self._failed("looking up a socket", e)
            return False

    def look(self, selectors: Sequence[Selector]) -> None:
        """See Sockets."""
        wanted = list(selectors)
        self._search("listing sockets", lambda: self._look(wanted), lambda: self._not_found(wanted))

    def progress(self, sockets: Sequence[tuple[int, Endpoints]]) -> Mapping[int, Progress | None] | None:
        """See Sockets."""
        if not sockets:
            return {}
        try:
            return self._asked.tcp_progress(sockets)
        except OSError as e:
            self._failed("asking TCP", e)
            return None

    def watch(self, selector: Selector, uid: int, band: int, lanes: int, expires_ns: int) -> None:
        """See Sockets."""
        rule = self._rules.get((selector, uid))
        if rule is None:
            rule = self._rules[selector, uid] = _Rule([], (band, lanes, expires_ns))
            if isinstance(selector, ProcessSelector):
                self._next_families = 0.0
            self._put(rule, self._matches(selector, uid))
        elif rule.place != (band, lanes, expires_ns):
            rule.place = band, lanes, expires_ns
            self._put(rule, rule.matches)

    def unwatch(self, selector: Selector, uid: int) -> None:
        """See Sockets."""
        rule = self._rules.pop((selector, uid), None)
        if rule is not None:
            self._put(rule, [])

    def _put(self, rule: _Rule, matches: list[Match]) -> None:
        """Have the kernel match just these for a rule."""
        before, rule.matches = rule.matches, matches
        if self._teller is None:
            return
        for match in matches:
            if match not in before:
                self._wanted[match] = self._wanted.get(match, 0) + 1
            if not self._teller.rules.put(match, *rule.place) and self._seldom("rules"):
                log.warning("the kernel's table of rules is full; connections are placed after their first bytes")
        for match in before:
            if match not in matches:
                self._wanted[match] -= 1
                if not self._wanted[match]:
                    del self._wanted[match]
                    self._teller.rules.drop(match)

    def descends(self, pid: int, ancestor: int) -> bool:
        """See Sockets."""
        return pid == ancestor or pid in self._descendants.get(ancestor, ())

    def _matches(self, selector: Selector, uid: int) -> list[Match]:
        """What the kernel has to match for a selector."""
        if isinstance(selector, TupleSelector):
            dst = ipaddress.ip_network(selector.dst)
            return [Match(selector.src, dst, selector.sport, selector.dport, uid=uid)]
        if isinstance(selector, ProcessSelector):
            pids = self._family(selector)
            return [Match(None, selector.remote, PortRange(), selector.dport, pid, uid) for pid in pids]
        return []

    def _follow_families(self) -> None:
        """Let processes' descendants count like them: those that the thread has found, and have it look again."""
        if self._grown:
            before, self._descendants, self._grown = self._descendants, self._grown[-1], []
            again: dict[Selector, None] = {}
            for (selector, uid), rule in self._rules.items():
                if isinstance(selector, ProcessSelector):
                    family = self._descendants.get(selector.pid, frozenset())
                    if family != before.get(selector.pid, frozenset()):
                        self._put(rule, self._matches(selector, uid))
                    if family - before.get(selector.pid, frozenset()):
                        again[selector] = None
            if again:
                self.look(list(again))
        now = time.monotonic()
        if now >= self._next_families:
            pids = {s.pid for s, _ in self._rules if isinstance(s, ProcessSelector)}
            self._next_families = now + FAMILIES_S
            if pids:
                self._search("looking for descendants", lambda: self._look_for_families(pids))

    def _look_for_families(self, pids: set[int]) -> None:
        found = self._families.look(pids)
        self._grown.append(found)  # which the loop may take away at once
        if found != self._descendants:
            self._wake()

    def _family(self, selector: ProcessSelector) -> list[int]:
        grown = self._grown  # from any thread
        return [selector.pid, *(grown[-1] if grown else self._descendants).get(selector.pid, ())]

    def lend(self, slots: Sequence[int]) -> None:
        """See Sockets."""
        if self._teller is not None:
            self._teller.lend(slots)

    def _seek(self, cookie: int) -> None:
        """Have all cookies that are asked for until it begins searched for together."""
        first = not self._sought
        self._sought.add(CookieSelector(cookie))
        if first:
            self._search("listing sockets", self._look_for_cookies)

    # --- searches, in the thread --------------------------------------------------------------------------------------

    def _search(self, what: str, work: Callable[[], None], failed: Callable[[], None] = lambda: None) -> None:
        """Have the thread work; whatever goes wrong there is logged, and ``failed`` is called."""

        def body() -> None:
            try:
                work()
            except Exception as e:  # noqa: BLE001 - nobody looks at the result, and others wait for the next search
                self._failed(what, e)
                failed()

        self._thread.submit(body)

    def _not_found(self, selectors: Sequence[Selector]) -> None:
        self._answers.extend(Found(s, None) for s in selectors)
        self._wake()

    def _look_for_cookies(self) -> None:
        sought, self._sought = self._sought, set()
        self._from_listing(list(sought))
        self._wake()

    def _enter_older(self) -> None:
        """Connections that were there before the kernel began to tell go into the directory, too."""
        assert self._teller is not None  # noqa: S101 - for the type checker
        for listed in self._diag.all():
            if self._teller.find(listed.cookie) is None:
                self._teller.add(listed.cookie, listed.endpoints, listed.uid)

    def _look(self, selectors: list[Selector]) -> None:
        pids = {s.pid for s in selectors if isinstance(s, ProcessSelector)}
        if pids - self._descendants.keys():
            self._look_for_families(pids | self._descendants.keys())
        found = self._from_directory(selectors) if self._teller is not None else self._from_listing(selectors)
        self._answers.extend(Found(s, f) for s, f in zip(selectors, found, strict=True))
        self._wake()

    def _from_listing(self, selectors: Sequence[Selector]) -> list[list[Socket]]:
        single = [
            (n, replace(s, pid=pid)) if isinstance(s, ProcessSelector) else (n, s)
            for n, s in enumerate(selectors)
            for pid in (self._family(s) if isinstance(s, ProcessSelector) else (0,))
        ]
        found: list[list[Socket]] = [[] for _ in selectors]
        for (n, _), sockets in zip(single, self._diag.resolve_many([s for _, s in single]), strict=True):
            found[n] += map(_listed, sockets)
        for known in found:
            for one in known:
                self._known[one.cookie] = one
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return found

    def _from_directory(self, selectors: Sequence[Selector]) -> list[list[Socket]]:
        assert self._teller is not None  # noqa: S101 - for the type checker
        cookies, rows = self._teller.all()
        out: list[list[Socket]] = []
        for selector in selectors:
            family = self._family(selector) if isinstance(selector, ProcessSelector) else []
            picked = _pick(selector, rows, family)
            found = [self._socket(t) for t in self._teller.told(cookies[picked], rows[picked])]
            if isinstance(selector, ProcessSelector):
                # Of connections that are older than we are, the directory does not know whose they are.
                known = {s.cookie for s in found}
                for pid in family:
                    found += [s for s in map(_listed, self._of_process(selector, pid)) if s.cookie not in known]
            out.append(found)
        return out

    def _of_process(self, selector: ProcessSelector, pid: int) -> list[Listed]:
        try:
            return self._diag.resolve(replace(selector, pid=pid))
        except HintError:
            return []  # gone, or not ours to see

    def _socket(self, told: Told) -> Socket:
        assert self._teller is not None  # noqa: S101 - for the type checker
        if told.bound:
            self._asked.bound_to(told.cookie, told.bound)
        return Socket(told.cookie, told.endpoints, told.uid, told.pid, told.netns == self._teller.netns)

    def _failed(self, what: str, error: Exception) -> None:
        if self._seldom(what):
            log.warning("sockets", what=what, error=f"{type(error).__name__}: {error}")


def _listed(found: Listed) -> Socket:
    return Socket(found.cookie, found.endpoints, found.uid, 0, here=True)


def _pick(selector: Selector, rows: npt.NDArray[Any], pids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which rows of the directory a selector means, shape (n,). ``pids``: the processes of a ProcessSelector."""
    if isinstance(selector, CookieSelector):
        return np.zeros(len(rows), dtype=np.bool_)
    key = rows["key"]
    swap = key["dport"].dtype.newbyteorder(">")
    dport = key["dport"].view(swap)
    out = (dport >= selector.dport.first) & (dport <= selector.dport.last)
    if isinstance(selector, ProcessSelector):
        out &= np.isin(rows["owner"]["pid"], pids)
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
