# SPDX-License-Identifier: Apache-2.0
"""What a worker has announced and not yet ended: to be said again to a daemon that has not heard it.

The ledger also stands in for the daemon while there is none: hints are entered, ends cancel them out, and only what is
still alive when a daemon appears is sent. Bounded: the oldest entries go first.

The process is a worker's, and Python's collector of garbage goes through whatever is kept, in the middle of the
worker's work. What is kept of a hint is therefore a plain tuple of numbers and strings, which the collector leaves out
once it has seen it; a hint, its selector and an entry around them would be six objects of which it never tires.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from mfsd.ground.model import (
    INF,
    BatchHint,
    CookieSelector,
    EndHint,
    Event,
    EventKind,
    Hint,
    MarkHint,
    ProgressHint,
    RequestHint,
    Selector,
    Stage,
    TransferHint,
    What,
)
from mfsd.ground.wire import OVERTIME_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_TTL_S: Final = 30.0
"""For hints that leave their life to the daemon; its own default."""
SWEEP: Final = 2
"""Entries that are looked at with each new one, whether they have expired."""

_of_request: Final = attrgetter("id", "deadline", "batch_id", "compute_left", "ttl")
_of_transfer: Final = attrgetter(
    "id", "request_id", "batch_id", "target_layer", "size", "deadline", "ttl", "ordered", "position",
    "hold_until",
)  # fmt: skip
REQUEST, BATCH, SIZE, POSITION, END = 4, 5, 7, 11, 13
"""Where they are in the entry of a transfer."""
_STAGES: Final = {stage.value: stage for stage in Stage}


@dataclass(slots=True)
class Entries:
    """What hints of one kind say, by name, the oldest first."""

    kept: OrderedDict[str, tuple[Any, ...]] = field(default_factory=OrderedDict)
    """When each stops to matter comes first."""
    _to_look_at: list[str] = field(default_factory=list)
    """Names that were there when the present round began."""

    def expired(self, now: float) -> list[str]:
        """Some that have, for the caller to drop; each gets its turn, round after round."""
        names, kept = self._to_look_at, self.kept
        if not names:
            names = self._to_look_at = list(kept)
        found = []
        for _ in range(min(SWEEP, len(names))):
            entry = kept.get(name := names.pop())
            if entry is not None and entry[0] < now:
                found.append(name)
        return found


def _until(due: float, ttl: float, now: float) -> float:
    """When a daemon forgets what is announced now."""
    return (due if now < due < INF else now) + (ttl or DEFAULT_TTL_S)


def _renew(part: Entries, name: str, until: float) -> None:
    """It lives until then at least. No error if it is not there."""
    entry = part.kept.get(name)
    if entry is not None and entry[0] < until:
        part.kept[name] = (until, *entry[1:])


@dataclass(slots=True)
class _Carried:
    """Transfers that a connection has."""

    selector: Selector
    number: int
    count: int = 0
    reached: int = 0
    """Position up to which those that have ended were written; 0: unknown."""
    end: int = 0
    """Position at which the last one is over, if none is taken back; 0: unknown."""
    seen: int = 0
    """How far it had been written at the last look; 0: nobody has looked."""
    until: float = 0.0
    """It was moving then, and none of them expires before."""


def _nobody_knows(_name: str, _cookie: int) -> int | None:
    return None


@dataclass(slots=True)
class Ledger:
    """Announced and alive, at most ``limit`` entries of each kind."""

    limit: int
    written: Callable[[str, int], int | None] = _nobody_knows
    """How far the socket of a transfer, with this cookie, has been written; None: it is not known, or gone."""
    forgotten: int = 0
    """Entries given up because of the limit."""
    _requests: Entries = field(default_factory=Entries)
    _batches: Entries = field(default_factory=Entries)
    _progress: Entries = field(default_factory=Entries)
    _transfers: Entries = field(default_factory=Entries)
    _marks: OrderedDict[Selector, MarkHint] = field(default_factory=OrderedDict)
    _carried: dict[Selector, _Carried] = field(default_factory=dict)
    """Of each connection with transfers."""
    _numbered: dict[int, _Carried] = field(default_factory=dict)
    """The same by number, which is what a transfer's entry has of its connection."""
    _owned: dict[str, dict[str, None]] = field(default_factory=dict)
    """Names of transfers by that of their request."""
    _overtime: dict[str, None] = field(default_factory=dict)
    """Names of transfers that live on, as the daemon says, though their time to live is over."""
    _next: int = 0

    def __len__(self) -> int:
        return sum(len(part.kept) for part in self._parts())

    def _parts(self) -> tuple[Entries, ...]:
        # In the order in which a daemon must hear them: owners before what they own.
        return (self._requests, self._batches, self._progress, self._transfers)

    def enter(self, hint: Hint, now: float) -> None:
        """Take note of one hint."""
        if isinstance(hint, TransferHint):
            self._transfer(hint, now)
        elif isinstance(hint, RequestHint):
            self._put(self._requests, hint.id, _until(hint.deadline, hint.ttl, now), _of_request(hint), now)
        elif isinstance(hint, BatchHint):
            says = hint.id, tuple(hint.request_ids), hint.layers, hint.current_layer, hint.layer_compute
            self._put(self._batches, hint.id, now + DEFAULT_TTL_S, says, now)
        elif isinstance(hint, ProgressHint):
            at = hint.batch_id, hint.current_layer, hint.compute_done
            self._put(self._progress, hint.batch_id, now + DEFAULT_TTL_S, at, now)
        elif isinstance(hint, EndHint):
            self._end(hint)
        else:
            self._marks.pop(hint.selector, None)
            if hint.stage is not Stage.NONE:
                self._marks[hint.selector] = hint
            if len(self._marks) > self.limit:
                self._marks.popitem(last=False)
                self.forgotten += 1

    def _transfer(self, hint: TransferHint, now: float) -> None:
        due = self._due(hint)
        self._drop(hint.id)
        carried = self._carried.get(hint.selector)
        if carried is None:
            self._next += 1
            carried = self._carried[hint.selector] = self._numbered[self._next] = _Carried(hint.selector, self._next)
        carried.count += 1
        stage = hint.stage.value if isinstance(hint.stage, Stage) else hint.stage  # whatever somebody takes for one
        end = 0
        if hint.ordered and hint.position:
            end = carried.end = max(hint.position, carried.end) + hint.size
        says = carried.number, stage, *_of_transfer(hint), end
        if hint.request_id:
            self._owned.setdefault(hint.request_id, {})[hint.id] = None
        self._put(self._transfers, hint.id, _until(due, hint.ttl, now), says, now)

    def _due(self, hint: TransferHint) -> float:
        """Its own deadline, or its request's, whichever comes first; inf: none."""
        owner = self._requests.kept.get(hint.request_id)
        return min(hint.deadline, INF if owner is None else owner[2])

    def _put(self, part: Entries, name: str, expires: float, says: tuple[Any, ...], now: float) -> None:
        # A renewed entry moves to the end, so that the oldest are first.
        kept = part.kept
        kept.pop(name, None)
        kept[name] = (expires, *says)
        for one in part.expired(now):
            self._expire(part, one, now)
        if len(kept) > self.limit:
            self._forget(part, next(iter(kept)))
            self.forgotten += 1

    def _expire(self, part: Entries, name: str, now: float) -> None:
        """Its time is over: forget it, unless what it announces is still on its way, as the daemon does."""
        owns = (name,) if part is self._transfers else self._owned.get(name, ()) if part is self._requests else ()
        until = max((self._moves(one, now) for one in owns), default=0.0)
        if until < now:
            self._forget(part, name)
        else:
            part.kept[name] = (until, *part.kept[name][1:])

    def _moves(self, name: str, now: float) -> float:
        """Until when a transfer lives on, whose socket has moved, and not to its end; 0: it does not."""
        entry = self._transfers.kept[name]
        carried = self._numbered[entry[1]]
        if not isinstance(carried.selector, CookieSelector) or not entry[END]:
            return 0.0
        at = self.written(name, carried.selector.cookie)
        if at is None:
            return 0.0
        if at >= entry[END]:
            carried.reached = max(carried.reached, entry[END])
            return 0.0
        if carried.until < now and at > (carried.seen or entry[POSITION]):
            carried.seen, carried.until = at, now + DEFAULT_TTL_S
        return carried.until

    def _forget(self, part: Entries, name: str) -> None:
        if part is self._transfers:
            self._drop(name)
        else:
            part.kept.pop(name, None)

    def _drop(self, name: str, *, done: bool = False) -> None:
        """Forget a transfer, if it is there; ``done``: its bytes have been written."""
        entry = self._transfers.kept.pop(name, None)
        if entry is None:
            return
        self._overtime.pop(name, None)
        request, carried = entry[REQUEST], self._numbered[entry[1]]
        names = self._owned.get(request, {})
        names.pop(name, None)
        if not names:
            self._owned.pop(request, None)
        carried.count -= 1
        if done and entry[POSITION]:
            carried.reached = max(entry[POSITION], carried.reached) + entry[SIZE]
        if not carried.count:
            del self._numbered[carried.number], self._carried[carried.selector]

    def _end(self, hint: EndHint) -> None:
        for cookie, position in hint.written:
            carried = self._carried.get(CookieSelector(cookie))
            if carried is not None:
                carried.reached = max(carried.reached, position)
        if hint.what is What.TRANSFER:
            self._drop(hint.id, done=not hint.cancelled)
            return
        if hint.what is What.REQUEST:
            for name in list(self._owned.get(hint.id, ())):
                self._drop(name, done=not hint.cancelled)
        # Those of a batch stay until they are ended or expire.
        (self._requests if hint.what is What.REQUEST else self._batches).kept.pop(hint.id, None)
        self._progress.kept.pop(hint.id, None)

    def hear(self, event: Event, now: float) -> None:
        """What the daemon tells of a transfer: that it outlives its time to live, or does so no longer."""
        name = event.transfer_id
        entry = self._transfers.kept.get(name)
        if entry is None:
            return
        if event.kind is EventKind.OVERTIME:
            self._overtime[name] = None
            until = now + OVERTIME_S
            _renew(self._transfers, name, until)
            _renew(self._requests, entry[REQUEST], until)
            _renew(self._batches, entry[BATCH], until)
        elif event.kind in (EventKind.EXPIRED, EventKind.CONNECTION_GONE) and name in self._overtime:
            self._drop(name)  # else it may be another one of that name by now

    def again(self, now: float) -> Iterator[Hint]:
        """As ``alive``, for a daemon that gives all of it its time to live anew."""
        for hint in self.alive(now):
            if isinstance(hint, TransferHint):
                _renew(self._transfers, hint.id, _until(self._due(hint), hint.ttl, now))
            elif isinstance(hint, RequestHint):
                _renew(self._requests, hint.id, _until(hint.deadline, hint.ttl, now))
            elif isinstance(hint, BatchHint):
                _renew(self._batches, hint.id, now + DEFAULT_TTL_S)
            elif isinstance(hint, ProgressHint):
                _renew(self._progress, hint.batch_id, now + DEFAULT_TTL_S)
            yield hint

    def alive(self, now: float) -> Iterator[Hint]:
        """What a daemon that knows nothing needs to hear, owners first; what has expired is dropped on the way.

        A request's compute time and the layer of a batch are as last said: the worker's next progress corrects them.
        """
        for part in self._parts():
            for name in [n for n, entry in part.kept.items() if entry[0] < now]:
                self._expire(part, name, now)
        yield from self._marks.values()
        requests, batches = self._requests.kept, self._batches.kept
        for _, *request in requests.values():
            yield RequestHint(*request)
        for _, name, members, *forward in batches.values():
            yield BatchHint(name, [r for r in members if r in requests], *forward)
        for _, name, *progress in self._progress.kept.values():
            if name in batches or name in requests:
                yield ProgressHint(name, *progress)
        reached = {number: carried.reached for number, carried in self._numbered.items()}
        for entry in self._transfers.kept.values():
            hint = self._again(entry, reached)
            if hint.request_id and hint.request_id not in requests and hint.batch_id:
                hint.request_id = ""
            if hint.stage.ownerless or hint.request_id in requests or hint.batch_id in batches:
                yield hint

    def _again(self, entry: tuple[Any, ...], reached: dict[int, int]) -> TransferHint:
        """A transfer begins where its socket stood when it was announced, or behind those before it."""
        _, number, stage, name, request, batch, layer, size, deadline, ttl, ordered, position, hold, _ = entry
        carried = self._numbered[number]
        if position and ordered:
            position = max(position, reached[number])
            reached[number] = position + size
        return TransferHint(
            name,
            request,
            batch,
            _STAGES.get(stage, stage),
            layer,
            size,
            carried.selector,
            deadline,
            ttl,
            ordered,
            position,
            hold,
        )
