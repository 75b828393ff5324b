# SPDX-License-Identifier: Apache-2.0
"""Transfers by columns: what a hint does, done for a thousand of them at a time.

The ledger decides what one transfer is; here is only what can be shared by all rows of a message: owners and streams
are looked up once, offsets are read once, and the books get whole columns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import compress, groupby, pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mfsd.engine.records import Transfer
from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import INF, HintError, Selector, Stage, TransferHint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.ledger import Ledger
    from mfsd.engine.records import Batch, Request, Session, Stream
    from mfsd.policy.views import F8, I4

_STAGES: Final = list(Stage)
_SHARED: Final = ("ids", "owners", "selectors")
"""Fields of TransferColumns that are no columns."""
_OWNERLESS: Final = np.array([s.ownerless for s in Stage])


@dataclass(slots=True)
class TransferColumns:
    """Rows of proto ``mfsd.v1.TransferColumns``, decoded and clamped. Columns have shape (n,)."""

    row: I4
    """Where it stood in the message."""
    ids: list[str]
    owners: list[str]
    request: I4
    """Index into owners, from 1; 0: none."""
    batch: I4
    stage: npt.NDArray[np.uint8]
    target_layer: I4
    size: F8
    selectors: list[Selector | None]
    """None: no row uses it."""
    selector: I4
    """Index into selectors, from 0."""
    deadline: F8
    """Own; inf: its request's."""
    ordered: npt.NDArray[np.bool_]
    position: F8
    """0: unknown."""
    hold_until: F8
    """inf: not said."""
    ttl: F8

    def __len__(self) -> int:
        return len(self.ids)

    def hint(self, i: int) -> TransferHint:
        """A row by itself."""
        owners, selector = ["", *self.owners], self.selectors[self.selector[i]]
        assert selector is not None  # noqa: S101 - rows without one are left out
        return TransferHint(
            self.ids[i],
            owners[self.request[i]],
            owners[self.batch[i]],
            Stage(int(self.stage[i])),
            int(self.target_layer[i]),
            int(self.size[i]),
            selector,
            float(self.deadline[i]),
            float(self.ttl[i]),
            bool(self.ordered[i]),
            int(self.position[i]),
            float(self.hold_until[i]),
        )

    def keep(self, wanted: npt.NDArray[np.bool_]) -> TransferColumns:
        """The same with these rows only."""
        at = np.flatnonzero(wanted)
        columns = {f.name: getattr(self, f.name)[at] for f in fields(self) if f.name not in _SHARED}
        return replace(self, ids=[self.ids[i] for i in at.tolist()], **columns)


Bad = list[tuple[int, HintError]]
"""Rows that did not take effect, and why."""


@dataclass(slots=True)
class _Owners:
    """What the rows may name as their owners; index 0: nothing."""

    requests: list[Request | None]
    batches: list[Batch | None]

    def known(self, c: TransferColumns) -> npt.NDArray[np.bool_]:
        """Which rows have an owner."""
        requests, batches = (np.array([o is not None for o in part]) for part in (self.requests, self.batches))
        return np.asarray(requests[c.request] | batches[c.batch])

    def deadlines(self, ledger: Ledger) -> F8:
        """Of the requests."""
        rows = ledger.books.requests
        return np.array([INF if r is None else float(rows.get(r, "deadline")) for r in self.requests])

    def rows(self, ledger: Ledger, c: TransferColumns) -> tuple[I4, I4]:
        """Rows of the request and the batch that each transfer names; -1: none."""
        requests, batches = ledger.books.requests, ledger.books.batches
        request = np.array([-1 if r is None else requests.row(r) for r in self.requests], dtype=np.int32)
        batch = np.array([-1 if b is None else batches.row(b) for b in self.batches], dtype=np.int32)
        return request[c.request], batch[c.batch]


def announce(ledger: Ledger, session: Session, columns: TransferColumns, now: float) -> Bad:
    """Apply transfers; what can't be applied changes nothing and is returned."""
    bad: Bad = []
    if not session.transfers.keys().isdisjoint(columns.ids):
        ledger.look_again(session, columns.ids, now)
    names = columns.owners
    owners = _Owners([None, *map(session.requests.get, names)], [None, *map(session.batches.get, names)])
    c = _taken(ledger, session, columns, owners, now, bad)
    deadline = np.minimum(c.deadline, owners.deadlines(ledger)[c.request])
    expires = np.where((now < deadline) & (deadline < INF), deadline, now) + c.ttl
    streams = _streams(ledger, session, c, expires, now, bad)
    lost = [i for i, s in enumerate(streams) if s is None]
    if lost:
        wanted = ~np.isin(c.selector, lost)
        c, deadline, expires = c.keep(wanted), deadline[wanted], expires[wanted]
    if len(c):
        transfers, start, of = _queue(ledger, session, c, owners, streams, now)
        for transfer in compress(transfers, (deadline < now).tolist()):
            transfer.stream.recast = True
        request, batch = owners.rows(ledger, c)  # not before: a transfer that turns out to be over may move them
        ledger.books.transfers.extend(
            transfers,
            (  # in the order of records.TRANSFER_COLUMNS
                c.stage,
                c.size,
                start,
                start + c.size,
                request,
                batch,
                of,
                c.target_layer,
                deadline,
                c.deadline,
                c.hold_until,
                now,
                expires,
                LEVEL_NEW,
                -1,  # seen_layer
                False,  # infeasible
                False,  # given_up
                np.array([s is None or s.ordered for s in streams]).take(c.selector),
                0.0,  # begun
                LEVEL_NEW,
                0.0,  # told
            ),
        )
    return bad


def _taken(
    ledger: Ledger, session: Session, c: TransferColumns, owners: _Owners, now: float, bad: Bad
) -> TransferColumns:
    """The rows that may be announced: new, owned, and not too many."""
    wanted = owners.known(c) | _OWNERLESS[c.stage]
    names = session.transfers.keys()
    room = ledger.admission.room(session)
    if wanted.all() and len(c) <= room and len(set(c.ids)) == len(c) and names.isdisjoint(c.ids):
        return c
    seen: set[str] = set()
    for i, name in enumerate(c.ids):
        request, batch = (c.owners[k - 1] if k else "" for k in (int(c.request[i]), int(c.batch[i])))
        try:
            at = c.selectors[c.selector[i]], int(c.position[i])
            ledger.admission.check_new(session, name, at, len(seen), known=name in seen)
            if not wanted[i]:
                raise ledger.no_owner(request, batch)
            ledger.move(session, name, at[0], now)
            seen.add(name)
        except HintError as e:
            wanted[i] = False
            bad.append((int(c.row[i]), e))
    return c.keep(wanted)


def _streams(
    ledger: Ledger, session: Session, c: TransferColumns, expires: F8, now: float, bad: Bad
) -> list[Stream | None]:
    """The stream of each selector; None where it can't be had, whose rows are bad then, or isn't needed."""
    streams: list[Stream | None] = [None] * len(c.selectors)
    used, first = np.unique(c.selector, return_index=True)
    until = np.zeros(len(c.selectors))
    np.maximum.at(until, c.selector, expires)
    for index, i in zip(used.tolist(), first.tolist(), strict=True):
        selector = c.selectors[index]
        assert selector is not None  # noqa: S101 - the decoder leaves no row that names such
        try:
            streams[index] = ledger.carriage.stream_of(
                session,
                selector,
                _STAGES[c.stage[i]],
                float(until[index]),
                now,
                ordered=bool(c.ordered[i]),
                position=int(c.position[i]),
            )
        except HintError as e:
            bad += [(int(row), e) for row in c.row[c.selector == index]]
    return streams


def _queue(
    ledger: Ledger, session: Session, c: TransferColumns, owners: _Owners, streams: list[Stream | None], now: float
) -> tuple[list[Transfer], F8, I4]:
    """Make the transfers, queued and linked; with the offsets of their first bytes, and their streams' indices."""
    requests, batches = owners.requests, owners.batches
    rows: Any = zip(c.ids, c.stage.tolist(), c.request.tolist(), c.batch.tolist(), c.selector.tolist(), strict=True)
    transfers = [
        # rows without a stream have been taken out
        Transfer(name, session, _STAGES[stage], requests[r], batches[b], streams[s])
        for name, stage, r, b, s in rows
    ]
    starts = _place(ledger, c, transfers, streams, now)
    session.transfers.update(zip(c.ids, transfers, strict=True))
    ledger.books.charge(session, len(c), sum(map(len, c.ids)), transfer=True)
    _link(c.request, requests, transfers)
    _link(c.batch, batches, transfers)
    for transfer in transfers if session.lost else ():
        session.make_good(transfer.id, transfer.request)
    index = np.array([-1 if s is None else s.index for s in streams], dtype=np.int32)
    return transfers, starts, index.take(c.selector)


def _link(index: I4, owners: Sequence[Request | None] | Sequence[Batch | None], transfers: list[Transfer]) -> None:
    """Have owners know their transfers; ``index`` of each one's owner, shape (len(transfers),)."""
    one = owners[index[0]]
    if (index == index[0]).all():  # the rule
        if one is not None:
            one.transfers.update(transfers)
        return
    for i, transfer in zip(index.tolist(), transfers, strict=True):
        if (owner := owners[i]) is not None:
            owner.transfers.add(transfer)


def _place(
    ledger: Ledger, c: TransferColumns, transfers: list[Transfer], streams: list[Stream | None], now: float
) -> F8:
    """Queue the transfers behind all that is announced on their streams; the offsets of their first bytes."""
    sent_by, carriage = ledger.connections.positions.sent_by, ledger.carriage
    same: dict[Stream | None, int] = {}  # a message may name one stream in several ways
    number = np.array([same.setdefault(s, len(same)) for s in streams])[c.selector]
    order = np.argsort(number, kind="stable")
    first = np.flatnonzero(np.diff(number[order], prepend=-1))
    size, position = c.size[order], c.position[order]
    behind = np.cumsum(size) - size  # all rows before, as if they were on one stream
    begins = np.zeros(len(first))
    loose = np.zeros(len(first), dtype=np.bool_)
    known = np.logical_or.reduceat(position > 0, first)
    stages, sizes, positions = c.stage[order].tolist(), size.tolist(), position.tolist()
    queued = [transfers[i] for i in order.tolist()]
    cuts = [*first.tolist(), len(queued)]
    exact: dict[int, list[float]] = {}
    for i, (begin, end) in enumerate(pairwise(cuts)):
        stream = queued[begin].stream
        offset = ledger.books.streams.offset(stream, sent_by)
        begins[i], queued[begin].maybe_late = carriage.begin(stream, sizes[begin], positions[begin], offset, now)
        loose[i] = not stream.ordered
        stream.queue.extend(queued[begin:end])
        for stage, _ in groupby(stages[begin:end]):
            carriage.note(stream, _STAGES[stage])
        if known[i] and stream.ordered:
            exact[begin] = [float(begins[i])]
            for k in range(begin + 1, end):
                if carriage.stands_behind(stream, positions[k]):
                    queued[k - 1].passed = True
                exact[begin].append(carriage.behind(stream, positions[k]))
                stream.announced = exact[begin][-1] + sizes[k]
        elif stream.ordered:
            stream.announced = float(begins[i]) + sum(sizes[begin:end])
    of = np.repeat(np.arange(len(first)), np.diff(cuts))
    placed = begins[of] + np.where(loose[of], 0.0, behind - behind[first][of])
    for begin, these in exact.items():
        placed[begin : begin + len(these)] = these
    out = np.empty(len(c))
    out[order] = placed
    return out
