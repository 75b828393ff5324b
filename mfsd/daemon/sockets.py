# SPDX-License-Identifier: Apache-2.0
"""The kernel's knowledge of sockets, as the engine wants it (engine.sockets.Sockets).

Where the kernel tells of connections (datapath/bpf/teller.py), nothing is ever searched on the event loop: a cookie is
looked up in the directory, and what is open already when a selector comes is picked from the directory in a thread.
Where it doesn't, sockets are listed by inet_diag, in a thread as well, again and again. TCP's word on single sockets
comes from inet_diag either way.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from socket import IPPROTO_TCP
from typing import TYPE_CHECKING, Final

import structlog

from mfsd.daemon.datagrams import Datagrams
from mfsd.daemon.meant import listed_of, made, maker_of, matches, rows_of
from mfsd.daemon.pace import Pace
from mfsd.datapath import _abi
from mfsd.engine.sockets import ON_THE_WAY_S, Closed, End, Established, Event, Found, Socket
from mfsd.ground.logs import Seldom
from mfsd.ground.model import CookieSelector, Maker, ProcessSelector, RuleSelector, Selector, TupleSelector
from mfsd.host import clock
from mfsd.host.makers import Census, Makers
from mfsd.host.processes import Numbers
from mfsd.host.sockets import SocketResolver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from mfsd.datapath.bpf.rules import Match
    from mfsd.datapath.bpf.teller import Event as Ended
    from mfsd.datapath.bpf.teller import Teller, Told
    from mfsd.engine.sockets import Progress
    from mfsd.ground.model import Endpoints
    from mfsd.host.sockets import Socket as Listed

KNOWN_MAX: Final = 65_536
"""Sockets remembered from listings where the kernel doesn't tell."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Rule:
    """What the kernel has been told for one selector of one user."""

    matches: list[Match]
    place: tuple[int, int, int]
    """(band, lanes, expires_ns)."""


class HostSockets:
    """See the module. ``wake`` is called from any thread when an answer to ``look`` has come."""

    def __init__(
        self, teller: Teller | None, wake: Callable[[], None] = lambda: None, cgroups: Path | None = None
    ) -> None:
        """``cgroups``: root of cgroup v2."""
        self._teller = teller
        self._wake = wake
        self._diag = SocketResolver()
        """For the thread, whose listings take their time."""
        self._asked = SocketResolver(self._diag)
        """For the event loop, which never waits for a listing."""
        self._datagrams = Datagrams(self._diag.datagrams, lambda work: self._search("listing UDP sockets", work))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mfsd-sockets")
        self._thread.submit(bool)  # it starts now: when it is needed there may be none to be had
        self._answers: deque[Found] = deque()
        self._known: OrderedDict[int, Socket] = OrderedDict()
        self._sought: set[CookieSelector] = set()
        """Cookies that a search for is to begin."""
        self._rules: dict[tuple[Selector, int], _Rule] = {}
        self._wanted: dict[Match, list[_Rule]] = {}
        """Who share a match: it leads to the most urgent of their bands."""
        self._census = Census(cgroups)
        self.process: Callable[[int, int], int] = Numbers().ours
        self._meant: Mapping[Maker, Makers] = {}
        self._latest: Mapping[Maker, Makers] = {}
        """The thread's last answer, which replaces the former."""
        self._pace = Pace()
        self._families: Future[None] | None = None
        """The last search for whom selectors mean."""
        self._lost = 0
        """Events that the kernel had no room for, of which we know."""
        self._taken_off = 0
        """How often the programs that tell had been taken off, as far as we know."""
        self._seldom = Seldom()
        self.entered: Future[None] | None = None
        """Over once connections older than us are known, as far as they are here; None: they may be listed any time."""
        if teller is not None:
            self.entered = self._search("listing sockets", self._enter_older)

    def close(self) -> None:
        """Idempotent. The teller is the caller's."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._census.close()
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
                    out.append(Closed(event.sock.cookie, event.acked, event.clean, event.active, event.at))
                else:
                    if not event.sock.pid:
                        self._pace.makerless()
                    elif self._census.met.stranger(event.sock.pid, event.sock.tid, event.sock.cgroup):
                        self._pace.stranger()
                    out.append(Established(self._socket(event.sock, self._asked), event.slot, event.active))
        if self._teller is not None and self._teller.taken_off != self._taken_off:
            self._taken_off = self._teller.taken_off
            self._search("listing sockets", self._enter_older)
            self._look_again()
        if self._teller is not None and self._teller.lost != self._lost and not self._teller.waiting:
            self._lost = self._teller.lost
            self._look_again()
        while self._answers:
            out.append(self._answers.popleft())
        self._follow_makers()
        return out

    def by_cookie(self, cookie: int) -> Socket | None:
        """See Sockets."""
        if self._teller is None:
            if cookie not in self._known:
                self._seek(cookie)
            return self._known.get(cookie)
        told = self._teller.find(cookie)
        return None if told is None else self._socket(told, self._asked)

    def end_of(self, cookie: int) -> End | None:
        """See Sockets."""
        event = None if self._teller is None else self._teller.end_of(cookie)
        return None if event is None else self._end(event)

    def datagram(self, cookie: int) -> bool | None:
        """See Sockets."""
        return self._datagrams.has(cookie)

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

    def user(self, socket: Socket) -> int:
        """See Sockets."""
        return self._user(self._asked, socket.endpoints, socket.cookie)

    def look(self, selectors: Sequence[Selector]) -> None:
        """See Sockets."""
        wanted, since = list(selectors), clock.monotonic() - ON_THE_WAY_S
        self._search("listing sockets", lambda: self._look(wanted, since), lambda: self._not_found(wanted))

    def _look_again(self) -> None:
        """For whatever is looked for: some of it may have gone by unseen."""
        self.look(list(dict.fromkeys(selector for selector, _ in self._rules)))

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
            if maker_of(selector) is not None:
                self._pace.at_once()
            self._put(rule, matches(selector, uid, self._meaning))
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
        wanted, now = set(matches), self._wanted
        for match in dict.fromkeys((*before, *matches)):
            share = now[match] = [r for r in now.get(match, ()) if r is not rule]
            if match in wanted:
                share.append(rule)
            if not share:
                del now[match]
                self._teller.rules.drop(match)
                continue
            bands, lanes, expires = zip(*(r.place for r in share), strict=True)
            if not self._teller.rules.put(match, min(bands), max(lanes), max(expires)) and self._seldom("rules"):
                log.warning("the kernel's table of rules is full; connections are placed after their first bytes")

    def descends(self, pid: int, ancestor: int) -> bool:
        """See Sockets."""
        return pid == ancestor or pid in (self._meaning(Maker(pid=ancestor)).pids or ())

    def made_by(self, socket: Socket, maker: Maker) -> bool:
        """See Sockets."""
        return maker.anybody or made(socket, maker, self._meaning(maker))

    def _follow_makers(self) -> None:
        """Let selectors mean whom the thread has found last, and have it look again."""
        if self._latest is not self._meant:
            before, self._meant = self._meant, self._latest
            again: dict[Selector, None] = {}
            for (selector, uid), rule in self._rules.items():
                maker = maker_of(selector)
                if maker is None or self._meant.get(maker) == before.get(maker):
                    continue
                old, new = rule.matches, matches(selector, uid, self._meaning)
                self._put(rule, new)
                if set(new) - set(old) or self._teller is None:
                    again[selector] = None
            if again:
                self.look(list(again))
        if (self._families is None or self._families.done()) and self._pace.due():
            theirs = {s: m for s, _ in self._rules if (m := maker_of(s)) is not None}
            if theirs:
                self._families = self._search("looking for processes", lambda: self._look_for(theirs.values()))
            if theirs and self._pace.finds():
                self.look(list(theirs))

    def _look_for(self, makers: Iterable[Maker]) -> None:
        with self._pace:
            found = self._census.look(set(makers))
        if found != self._latest:
            self._latest = found
            self._wake()

    def _meaning(self, maker: Maker) -> Makers:
        """Whom a description means, as far as is known; nobody, until it has been looked for. From any thread."""
        found = self._latest.get(maker)
        if found is not None:
            return found
        nobody: frozenset[int] = frozenset()
        process = bool(maker.pid or maker.executable)
        return Makers(nobody if process else None, nobody if maker.thread else None, nobody if maker.cgroup else None)

    def lend(self, slots: Sequence[int]) -> None:
        """See Sockets."""
        if self._teller is not None:
            self._teller.lend(slots)

    def named(self, cookie: int, port: int) -> list[Socket]:
        """Connections with a cookie, or with a port at either end. A search, for other threads than the loop's."""
        if self._teller is not None:
            every = [self._socket(told, self._diag) for told in self._teller.told(*self._teller.all())]
        else:
            every = [_listed(s) for s in self._diag.all()]
        return [s for s in every if s.cookie == cookie or (port and port in (s.endpoints.sport, s.endpoints.dport))]

    def _seek(self, cookie: int) -> None:
        """Have all cookies that are asked for until it begins searched for together."""
        first = not self._sought
        self._sought.add(CookieSelector(cookie))
        if first:
            self._search("listing sockets", self._look_for_cookies)

    # --- searches, in the thread --------------------------------------------------------------------------------------

    def _search(self, what: str, work: Callable[[], None], failed: Callable[[], None] = lambda: None) -> Future[None]:
        """Have the thread work; whatever goes wrong there is logged, and ``failed`` is called."""

        def body() -> None:
            try:
                work()
            except Exception as e:  # noqa: BLE001 - nobody looks at the result, and others wait for the next search
                self._failed(what, e)
                failed()

        return self._thread.submit(body)

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

    def _look(self, selectors: list[Selector], since: float) -> None:
        makers = {m for s in selectors if (m := maker_of(s)) is not None}
        if makers - self._latest.keys():
            self._look_for(makers | self._latest.keys())
        found = self._from_directory(selectors) if self._teller is not None else self._from_listing(selectors)
        over = [] if self._teller is None else [self._end(e) for e in self._teller.ends_since(int(since * 1000))]
        self._answers.extend(Found(s, f, over) for s, f in zip(selectors, found, strict=True))
        self._wake()

    def _from_listing(self, selectors: Sequence[Selector]) -> list[list[Socket]]:
        plain = [(n, s) for n, s in enumerate(selectors) if isinstance(s, CookieSelector | TupleSelector)]
        found: list[list[Socket]] = [[] for _ in selectors]
        for (n, _), sockets in zip(plain, self._diag.resolve_many([s for _, s in plain]), strict=True):
            found[n] += map(_listed, sockets)
        others = [(n, s) for n, s in enumerate(selectors) if isinstance(s, ProcessSelector | RuleSelector)]
        every = list(self._diag.all()) if others else []
        for n, selector in others:
            found[n] += map(_listed, listed_of(selector, every, self._meaning))
        self._known.update((one.cookie, one) for known in found for one in known)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return found

    def _from_directory(self, selectors: Sequence[Selector]) -> list[list[Socket]]:
        assert self._teller is not None  # noqa: S101 - for the type checker
        cookies, rows = self._teller.all()
        every = list(self._diag.all()) if any(maker_of(s) is not None for s in selectors) else []
        out: list[list[Socket]] = []
        for selector in selectors:
            picked = rows_of(selector, rows)
            maker = maker_of(selector)
            found = [self._socket(t, self._diag) for t in self._teller.told(cookies[picked], rows[picked])]
            if isinstance(selector, ProcessSelector | RuleSelector) and maker is not None:
                found = [s for s in found if self.made_by(s, maker)]
                # Of connections that are older than we are, the directory does not know whose they are.
                known = {s.cookie for s in found}
                found += [_listed(s) for s in listed_of(selector, every, self._meaning) if s.cookie not in known]
            out.append(found)
        return out

    def _socket(self, told: Told, diag: SocketResolver | None = None) -> Socket:
        """``diag``: what TCP is asked by whose it is, where nobody has noted that."""
        assert self._teller is not None  # noqa: S101 - for the type checker
        if told.bound:
            self._asked.bound_to(told.cookie, told.bound)
        here = told.netns == self._teller.netns
        uid = told.uid
        if uid < 0 and here and diag is not None and (uid := self._user(diag, told.endpoints, told.cookie)) >= 0:
            self._teller.own(told.cookie, uid)
        return Socket(told.cookie, told.endpoints, uid, told.pid, here, told.tid, told.cgroup)

    def _user(self, diag: SocketResolver, endpoints: Endpoints, cookie: int) -> int:
        try:
            return diag.owner(endpoints, cookie)
        except OSError as e:
            self._failed("looking up a socket", e)
            return -1

    def _end(self, event: Ended) -> End:
        return End(self._socket(event.sock), event.acked, event.clean, event.active, event.at)

    def _failed(self, what: str, error: Exception) -> None:
        if self._seldom(what):
            log.warning("sockets", what=what, error=f"{type(error).__name__}: {error}")


def _listed(found: Listed) -> Socket:
    return Socket(found.cookie, found.endpoints, found.uid, 0, here=True, cgroup=found.cgroup)
