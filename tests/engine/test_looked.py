# SPDX-License-Identifier: Apache-2.0
"""Transfers of streams that have been asked how far they are: as columns as one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.harness import Host

from mfsd.engine.looked import STALLED_S, Looked
from mfsd.engine.positions import Position

if TYPE_CHECKING:
    from mfsd.engine.records import Connection, Stream, Transfer


@dataclass
class Case:
    """A stream: its transfers as (begin, end, size, handed over), and where it stands."""

    transfers: list[tuple[float, float, float, bool]]
    acked: float
    written: float
    ordered: bool


def queue(draw: Any) -> list[tuple[float, float, float, bool]]:
    """Mostly one behind the other, as they are announced; some of them corrected before, some overlapping."""
    out: list[tuple[float, float, float, bool]] = []
    at = float(draw(st.integers(0, 3)))
    handed = draw(st.integers(0, 6))
    for i in range(draw(st.integers(1, 6))):
        size = float(draw(st.integers(1, 5)))
        end = at + draw(st.sampled_from([size, size, size, size - 1, 0.0]))
        out.append((at, end, size, i < handed))
        at = end + draw(st.sampled_from([0.0, 0.0, 0.0, 2.0, -1.0]))
    return out


@st.composite
def cases(draw: Any) -> Case:
    """Streams."""
    acked = float(draw(st.integers(0, 20)))
    return Case(queue(draw), acked, acked + draw(st.integers(0, 12)), draw(st.booleans()))


def one_by_one(case: Case) -> list[tuple[float, float]]:
    """Where the transfers are when each has been looked at after the other."""
    out = [(begin, end) for begin, end, _, _ in case.transfers]
    if not any(handed for *_, handed in case.transfers):
        return out
    if not case.ordered:
        ends = [min(e, case.written) if h else e for _, e, _, h in case.transfers]
        return [(b, e) for (b, _), e in zip(out, ends, strict=True)]
    position = min(begin for begin, _ in out)
    for i, (_, end, size, handed) in enumerate(case.transfers):
        begin, position = position, position + size
        if handed:
            reach = begin + (min(size, end - begin) if end > begin else size)
            position = min(reach, max(case.written, begin))
        out[i] = begin, position
    return out


@given(st.lists(cases(), min_size=1, max_size=4))
def test_as_one_by_one(given_cases: list[Case]) -> None:
    h = Host()
    h.request("r", 5.0)
    known: list[Stream] = []
    positions: dict[Connection, Position] = {}
    t = h.engine.books.transfers
    for i, case in enumerate(given_cases):
        sock = h.socket(i + 1)
        for k, (_, _, size, _) in enumerate(case.transfers):
            h.transfer(f"{i}/{k}", sock, int(size), ordered=case.ordered)
        every = [h.session.transfers[f"{i}/{k}"] for k in range(len(case.transfers))]
        for transfer, (begin, end, _, handed) in zip(every, case.transfers, strict=True):
            t.put(transfer, "start", begin)
            t.put(transfer, "end", end)
            transfer.handed_over = handed
        stream = every[0].stream
        (member,) = stream.members.values()
        joined = float(h.engine.books.streams.members.get(member, "joined"))
        known.append(stream)
        positions[member.conn] = Position(joined + case.acked, joined + case.written)
    before = [s.announced for s in known]
    looked = Looked.at(h.engine.books, h.connections, known, positions, h.now)
    looked.correct(h.engine.books)
    chosen = list(looked.chosen(looked.arrived(t.live("created")[looked.rows], h.now)))
    for i, (case, stream) in enumerate(zip(given_cases, known, strict=True)):
        wanted = one_by_one(case)
        queue: list[Transfer] = list(stream.queue)
        assert [(t.get(x, "start"), t.get(x, "end")) for x in queue] == wanted
        told = any(handed for *_, handed in case.transfers)
        assert stream.announced == (wanted[-1][1] if told and case.ordered else before[i])
        done = [
            (handed and case.acked >= case.written) or ((handed or case.ordered) and end <= case.acked)
            for (_, end), (*_, handed) in zip(wanted, case.transfers, strict=True)
        ]
        if not case.ordered and case.acked - wanted[0][0] >= sum(size for _, _, size, _ in case.transfers):
            done = [True] * len(done)
        assert chosen[i] == [x for x, over in zip(queue, done, strict=True) if over]
        assert looked.missing(i) == wanted[-1][1] - case.acked


def test_who_is_handed_over_stands_first() -> None:
    h = Host()
    h.request("r", 5.0)
    sock = h.socket(1)
    for name in "abcd":
        h.transfer(name, sock, 10)
    for name in "bd":
        h.session.transfers[name].handed_over = True
    stream = h.session.transfers["a"].stream
    (conn,) = stream.members
    looked = Looked.at(h.engine.books, h.connections, [stream], {conn: Position(1.0, 16.0)}, h.now)
    looked.correct(h.engine.books)
    assert [x.id for x in stream.queue] == ["b", "d", "a", "c"]  # its SYN counts as a byte
    assert np.column_stack([looked.start, looked.end]).tolist() == [[0, 10], [10, 15], [15, 25], [25, 35]]
    assert stream.announced == 35


def test_one_that_is_nearly_through_and_stands_still_was_announced_too_large() -> None:
    h = Host()
    h.request("r", 5.0)
    sock = h.socket(1)
    h.transfer("t", sock, 100)
    h.send(sock, 90)
    stream = h.session.transfers["t"].stream
    (conn,) = stream.members
    joined = float(h.engine.books.streams.members.get(stream.members[conn], "joined"))
    at = {conn: Position(joined + 90.0, joined + 90.0)}

    def done() -> list[Transfer]:
        looked = Looked.at(h.engine.books, h.connections, [stream], at, h.now)
        created = h.engine.books.transfers.live("created")[looked.rows]
        return next(looked.chosen(looked.arrived(created, h.now)))

    assert done() == []
    h.now += STALLED_S + 0.1
    assert [x.id for x in done()] == ["t"]
