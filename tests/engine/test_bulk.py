# SPDX-License-Identifier: Apache-2.0
"""Transfers by columns do what the same transfers do one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.harness import MSS, Host, exact_tuple

from mfsd.engine.bulk import TransferColumns
from mfsd.engine.records import TRANSFER_COLUMNS
from mfsd.engine.settings import LimitsConfig
from mfsd.ground.model import (
    INF,
    BatchHint,
    CookieSelector,
    EndHint,
    HintError,
    PortRange,
    ProcessSelector,
    RequestHint,
    Selector,
    Stage,
    TransferHint,
    TupleSelector,
    What,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def columns(hints: Sequence[TransferHint]) -> TransferColumns:
    """What the API makes of them."""
    owners = sorted({name for h in hints for name in (h.request_id, h.batch_id) if name})
    selectors: list[Selector | None] = list(dict.fromkeys(h.selector for h in hints))
    number = {name: i + 1 for i, name in enumerate(owners)} | {"": 0}
    return TransferColumns(
        row=np.arange(len(hints), dtype=np.int32),
        ids=[h.id for h in hints],
        owners=owners,
        request=np.array([number[h.request_id] for h in hints], dtype=np.int32),
        batch=np.array([number[h.batch_id] for h in hints], dtype=np.int32),
        stage=np.array([h.stage for h in hints], dtype=np.uint8),
        target_layer=np.array([h.target_layer for h in hints], dtype=np.int32),
        size=np.array([h.size for h in hints], dtype=np.float64),
        selectors=selectors,
        selector=np.array([selectors.index(h.selector) for h in hints], dtype=np.int32),
        deadline=np.array([h.deadline for h in hints]),
        ordered=np.array([h.ordered for h in hints], dtype=np.bool_),
        position=np.array([h.position for h in hints], dtype=np.float64),
        hold_until=np.array([h.hold_until for h in hints]),
        ttl=np.array([h.ttl for h in hints]),
    )


def prepared() -> Host:
    """Two connections that have sent something, a request in a batch, one without, and a batch."""
    h = Host()
    for cookie in (1, 2):
        h.send(h.socket(cookie), 3 * MSS)
    h.request("r", 5.0, batch_id="b")
    h.request("alone", 7.0)
    h.engine.apply(h.session, BatchHint("c", ["r"], 4), h.now)
    h.tick(0.01)
    return h


def state(h: Host) -> list[Any]:
    """All that is known of transfers, comparable between hosts."""
    books = h.engine.books
    rows = {name: books.transfers.live(name).tolist() for name in TRANSFER_COLUMNS}
    objects = [
        (t.id, t.stage, t.request and t.request.id, t.batch and t.batch.id, t.maybe_late)
        for t in books.transfers.objects
    ]
    streams = [(s.selector, s.announced, s.ordered, [t.id for t in s.queue]) for s in books.streams.all()]
    members = [sorted(t.id for t in r.transfers) for r in h.session.requests.values()]
    slots = {c.cookie: (c.band, c.expires, h.connections.last_stage[c.slot]) for c in h.connections.by_slot.values()}
    return [rows, objects, streams, members, slots, set(h.session.transfers), h.kernel.rules]


SELECTORS: list[Selector] = [CookieSelector(1), CookieSelector(2), CookieSelector(9)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(SELECTORS),
            st.sampled_from([("r", ""), ("alone", ""), ("", "b"), ("r", "c"), ("", "")]),
            st.sampled_from([Stage.KV_REUSE, Stage.COLLECTIVE, Stage.P2D, Stage.BACKGROUND]),
            st.integers(1, 10 * MSS),
            st.sampled_from([INF, 1003.0, 999.0]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_the_same_as_one_by_one(rows: list[tuple[Selector, tuple[str, str], Stage, int, float]]) -> None:
    hints = [
        TransferHint(
            f"t{i}", *owner, stage, i, size, selector, deadline, ttl=10.0 + i, hold_until=1010.0 + i if i % 2 else INF
        )
        for i, (selector, owner, stage, size, deadline) in enumerate(rows)
        if any(owner) or stage.ownerless
    ]
    together, singly = prepared(), prepared()
    assert together.engine.transfers(together.session, columns(hints), together.now) == [] if hints else True
    late = {}
    for hint in hints:
        singly.engine.apply(singly.session, hint, singly.now)
        late = {t.id: t for t in singly.session.transfers.values()}
    for h in (together, singly):
        h.tick()
    if len(late) == len(hints):  # what looks late among several of one message has not had the time to be
        a, b = state(together), state(singly)
        a[4], b[4] = ({k: v[::2] for k, v in x[4].items()} for x in (a, b))  # lives: the longest of a message, at once
        assert a == b


def test_what_is_wrong_with_a_row_is_said_and_costs_only_that() -> None:
    h = Host(limits=LimitsConfig(max_transfers_per_session=4), slots=2)
    h.request("r", 5.0)
    h.transfer("known", h.socket(1), 10)

    def hint(name: str, cookie: int = 1, request: str = "r", stage: Stage = Stage.P2D) -> TransferHint:
        return TransferHint(name, request, "", stage, 0, 10, CookieSelector(cookie))

    rows = [
        hint("a"),
        hint("known"),
        hint("a"),
        hint("b", request="nobody"),
        hint("c", 2),
        hint("no room in the table", 3),
        hint("too many", stage=Stage.BACKGROUND, request="nobody"),
    ]
    bad = h.engine.transfers(h.session, columns(rows), h.now)
    assert [(row, e.field, e.exhausted) for row, e in sorted(bad, key=lambda b: b[0])] == [
        (1, "transfer.id", False),
        (2, "transfer.id", False),
        (3, "transfer.request_id", False),
        (5, "selector", True),
        (6, "transfer.id", True),
    ]
    assert set(h.session.transfers) == {"known", "a", "c"}
    h.tick()
    assert h.engine.books.transfers.n == 3


def test_positions_say_where_transfers_begin() -> None:
    h = Host()
    s = h.socket(1)
    s.bytes_acked += 150 * MSS
    h.request("r", 5.0)
    first = TransferHint("a", "r", "", Stage.P2D, 0, 100 * MSS, CookieSelector(1), position=1)
    second = TransferHint("b", "r", "", Stage.P2D, 0, 100 * MSS, CookieSelector(1), position=1 + 100 * MSS)
    third = TransferHint("c", "r", "", Stage.P2D, 0, 100 * MSS, CookieSelector(1), position=1 + 250 * MSS)
    assert not h.engine.transfers(h.session, columns([first, second, third]), h.now)
    h.tick()
    h.tick(0.01)
    assert set(h.session.transfers) == {"b", "c"}
    view, objects = h.engine.steering.views(h.now).transfers, h.engine.books.transfers.objects
    left = {t.id: (view.left[row], view.ahead[row]) for row, t in enumerate(objects)}
    assert left == {"b": (50 * MSS, 0), "c": (100 * MSS, 100 * MSS)}


def test_interleaved_ones_and_selectors_of_several_connections() -> None:
    h = Host()
    lanes = [h.socket(i) for i in (1, 2)]
    peer = TupleSelector(None, lanes[0].endpoints.dst, PortRange(), PortRange(6000, 6000), 6)
    exact = exact_tuple(lanes[0].endpoints)
    h.request("r", 5.0)
    rows = [
        TransferHint("a", "r", "", Stage.P2D, 0, 100 * MSS, peer, ordered=False),
        TransferHint("b", "r", "", Stage.P2D, 0, 10 * MSS, peer, ordered=False),
        TransferHint("c", "r", "", Stage.COLLECTIVE, 0, 10 * MSS, exact),
    ]
    assert not h.engine.transfers(h.session, columns(rows), h.now)
    h.tick()
    assert [h.band(lane) for lane in lanes] == ["level 0", "level 4"]
    h.send(lanes[1], 16 * MSS)
    h.tick(0.01)
    assert h.engine.steering.views(h.now).transfers.left.tolist() == [92 * MSS, 10 * MSS, 10 * MSS]
    assert h.engine.books.transfers.live("start").tolist() == [0, 0, 0]
    assert h.engine.books.transfers.live("ordered").tolist() == [False, False, True]


def test_a_request_that_ends_meanwhile_moves_no_rows_of_others() -> None:
    """What was announced late ends when the next one is announced, and its request with it."""
    h = Host()
    s = h.socket(1)
    h.request("over", 5.0)
    h.request("r", 6.0)
    h.send(s, 10 * MSS)  # nothing is known of the socket yet
    h.transfer("first", s, MSS, request="r")
    h.send(s, MSS)
    h.tick(0.01)
    assert not h.session.transfers
    h.send(s, 10 * MSS)
    h.transfer("late", s, 10 * MSS, request="over")
    assert h.session.transfers["late"].maybe_late
    h.engine.apply(h.session, RequestHint("r", h.now + 6), h.now)
    h.session.requests["over"].completed = True
    h.now += 0.1  # nothing is written meanwhile
    row = TransferHint("next", "r", "", Stage.P2D, 0, MSS, CookieSelector(1))
    assert not h.engine.transfers(h.session, columns([row]), h.now)
    h.tick()
    assert set(h.session.transfers) == {"next"}
    assert set(h.session.requests) == {"r"}
    t = h.engine.books.transfers
    assert h.engine.books.requests.objects[int(t.live("request")[0])].id == "r"


def test_ends_find_them() -> None:
    h = prepared()
    rows = [TransferHint(f"t{i}", "r", "", Stage.P2D, i, MSS, CookieSelector(1 + i % 2)) for i in range(10)]
    assert not h.engine.transfers(h.session, columns(rows), h.now)
    h.engine.apply(h.session, EndHint(What.REQUEST, "r", cancelled=True), h.now)
    h.tick(0.01)
    assert (h.engine.books.transfers.n, set(h.session.requests)) == (0, {"alone"})


def test_a_row_of_an_unknown_owner_is_refused_in_the_words_of_a_single_one() -> None:
    h = Host()
    row = TransferHint("t", "", "nobody", Stage.P2D, 0, 1, CookieSelector(1))
    ((_, bad),) = h.engine.transfers(h.session, columns([row]), h.now)
    with pytest.raises(HintError) as single:
        h.engine.apply(h.session, row, h.now)
    assert str(bad) == str(single.value)


def test_a_row_by_itself_says_all_that_its_columns_say() -> None:
    """Every field differs from its default, so that none can be left out."""
    hint = TransferHint(
        "t", "r", "b", Stage.P2D, 3, 4096, CookieSelector(7), 9.0, 11.0, ordered=False, position=5, hold_until=13.0
    )
    whole = columns([hint, hint])
    assert whole.hint(1) == hint
    assert whole.keep(np.array([False, True])).hint(0) == hint


@pytest.mark.parametrize("lost", [False, True])
def test_names_again(*, lost: bool) -> None:
    """Of what has been written, and of what is lost, whether or not anybody has heard of that."""
    h = Host()
    for attempt in range(2):
        socks = [h.socket(10 * attempt + i + 1) for i in range(3)]
        h.request("r" if lost else f"r{attempt}", 60.0)
        owner = "r" if lost else f"r{attempt}"
        hints = [
            TransferHint(f"kv{i}", owner, "", Stage.P2D, 0, 10 * MSS, CookieSelector(s.cookie), position=1)
            for i, s in enumerate(socks)
        ]
        assert not h.engine.transfers(h.session, columns(hints), h.now)
        for s in socks:
            h.send(s, 10 * MSS, acked=bool(attempt))
        if lost and not attempt:
            for s in socks:
                h.kernel.close(s, clean=False)
        elif not lost:
            h.done(owner, What.REQUEST)
            for s in socks:
                h.ack(s, s.unsent_plus_unacked)
    if lost:
        h.done("r", What.REQUEST)
    h.tick(0.01)
    h.tick(0.3)
    assert h.counted == ((3, 1, 0) if lost else (6, 2, 0))
    assert not h.session.transfers


@pytest.mark.parametrize("by", ["single hints", "columns"])
def test_what_a_socket_that_was_never_connected_was_to_carry_goes_on_another(by: str) -> None:
    """By the same name; nobody has said that it won't come on the first one."""
    h = Host()
    first = h.socket(1)
    first.bytes_acked = 0
    h.request("r", 60.0)
    h.transfer("t", first, 10 * MSS)
    h.kernel.close(first, clean=False)  # refused
    h.tick(0.01)
    s = h.socket(2)
    if by == "columns":
        hint = TransferHint("t", "r", "", Stage.P2D, 0, 10 * MSS, CookieSelector(s.cookie), position=1)
        assert not h.engine.transfers(h.session, columns([hint]), h.now)
    else:
        h.transfer("t", s, 10 * MSS, position=1)
    h.tick(0.01)
    h.send(s, 9 * MSS)
    h.tick(0.01)
    assert h.counted == (0, 0, 0)
    h.send(s, MSS)
    h.tick(0.01)
    h.done("r", What.REQUEST)
    for _ in range(30):
        h.tick(0.1)
    assert h.counted == (1, 1, 0)
    assert not h.session.events
    h.request("q", 60.0)
    h.transfer("u", s, MSS, request="q")
    with pytest.raises(HintError, match="announced already"):
        h.transfer("u", first, MSS, request="q")


def test_a_process_is_the_one_that_the_session_calls_so() -> None:
    h = Host()
    h.kernel.calls[70, 1] = 70
    session = h.engine.session("container", h.now, pid=70)
    h.engine.apply(session, RequestHint("r", h.now + 60), h.now)
    hints = [
        TransferHint("t", "r", "", Stage.P2D, 0, MSS, ProcessSelector(1, None, PortRange()), ttl=9.0),
        TransferHint("u", "r", "", Stage.P2D, 0, MSS, CookieSelector(9), ttl=9.0),
    ]
    assert not h.engine.transfers(session, columns(hints), h.now)
    assert [*session.streams] == [ProcessSelector(70, None, PortRange()), CookieSelector(9)]
