# SPDX-License-Identifier: Apache-2.0
"""Parts of the SDK: what it writes, and what it remembers for the next daemon."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest

from mfsd.api import columns
from mfsd.api.decode import Decoder
from mfsd.client import Stage, process_peer, tuple_of
from mfsd.client.encode import COLUMNS, encode, encode_columns, split
from mfsd.client.ledger import Ledger
from mfsd.client.way import CHANNEL_BACKOFF_S, pause
from mfsd.daemon import predecessor
from mfsd.engine.settings import LimitsConfig
from mfsd.ground.model import (
    BatchHint,
    CookieSelector,
    EndHint,
    Event,
    EventKind,
    Hint,
    MarkHint,
    ProgressHint,
    RequestHint,
    TransferHint,
    What,
)
from mfsd.ground.wire import OVERTIME_S
from mfsd.v1 import hints_pb2

NOW = 500.0
HINTS: list[Hint] = [
    RequestHint("r", NOW + 0.25, "b", 0.125, 2.0),
    RequestHint("late", NOW - 0.5, "", 0.0, 2.0),
    RequestHint("never", math.inf, "b", 0.125, 2.0),
    BatchHint("b", ["r"], 8, 2, 0.25),
    ProgressHint("b", 3, compute_done=True),
    TransferHint("t", "r", "b", Stage.P2D, 4, 4096, CookieSelector(77), NOW + 0.25, 2.0),
    TransferHint("t", "r", "", Stage.KV_REUSE, 4, 4096, tuple_of("fd00::1", (5, 9), "fd00::2", 3), NOW + 0.25, 2.0),
    TransferHint("t", "r", "", Stage.KV_REUSE, 4, 4096, process_peer(3, "10.0.0.0/24", 9), NOW + 0.25, 2.0),
    EndHint(What.TRANSFER, "t", cancelled=True),
    EndHint(What.REQUEST, "r"),
    EndHint(What.BATCH, "b"),
    MarkHint(tuple_of("10.0.0.1", 0, protocol=6), Stage.COLLECTIVE),
    MarkHint(CookieSelector(5), Stage.NONE),
    MarkHint(CookieSelector(5), Stage.BACKGROUND, ordered=False),
    TransferHint("t", "", "", Stage.BACKGROUND, 4, 4096, CookieSelector(7), ttl=2.0, ordered=False, position=1 << 40),
    TransferHint("t", "r", "", Stage.P2D, 4, 4096, CookieSelector(7), ttl=2.0, hold_until=NOW + 8.5),
]


@pytest.mark.parametrize("hint", HINTS, ids=lambda h: type(h).__name__)
def test_what_the_client_encodes_the_daemon_decodes(hint: Hint) -> None:
    message = hints_pb2.Hint()
    encode(hint, NOW, message)
    assert Decoder(LimitsConfig()).decode(message, NOW) == hint


def test_what_the_client_encodes_in_columns_the_daemon_decodes() -> None:
    hints = [h for h in HINTS if isinstance(h, TransferHint)] * 2
    message = hints_pb2.TransferColumns()
    encode_columns(hints, NOW, message)
    decoded, bad = columns.transfers(Decoder(LimitsConfig()), message, NOW)
    assert not bad
    owners = ["", *decoded.owners]
    assert hints == [
        TransferHint(
            decoded.ids[i],
            owners[decoded.request[i]],
            owners[decoded.batch[i]],
            Stage(int(decoded.stage[i])),
            int(decoded.target_layer[i]),
            int(decoded.size[i]),
            decoded.selectors[decoded.selector[i]],
            float(decoded.deadline[i]),
            float(decoded.ttl[i]),
            bool(decoded.ordered[i]),
            int(decoded.position[i]),
            float(decoded.hold_until[i]),
        )
        for i in range(len(hints))
    ]
    same = hints_pb2.TransferColumns()
    encode_columns([hints[0]] * 5, NOW, same)
    assert (len(same.ids), len(same.bytes), len(same.position), len(same.request)) == (5, 1, 0, 1)


def test_a_deadline_that_is_just_now_is_not_taken_for_missing() -> None:
    message = hints_pb2.Hint()
    encode(RequestHint("r", NOW), NOW, message)
    assert message.request.ttft_left_us == -1


def test_a_transfer_that_has_been_held_back_for_long_enough_still_says_so_to_a_new_daemon() -> None:
    hint = TransferHint("t", "r", "", Stage.P2D, 0, 1, CookieSelector(1), hold_until=NOW + 8.0)
    for waited, left in ((0.0, 8_000_000), (6.5, 1_500_000), (8.0, 1), (20.0, 1)):
        message, many = hints_pb2.Hint(), hints_pb2.TransferColumns()
        encode(hint, NOW + waited, message)
        encode_columns([hint], NOW + waited, many)
        assert (message.transfer.max_defer_us, list(many.max_defer_us)) == (left, [left])


def ids(ledger: Ledger, now: float) -> list[Any]:
    return [getattr(h, "id", None) or getattr(h, "batch_id", None) for h in ledger.alive(now)]


def test_the_ledger_forgets_what_has_expired() -> None:
    ledger = Ledger(limit=10)
    ledger.enter(RequestHint("r", 10.0, ttl=5.0), 0.0)
    ledger.enter(TransferHint("t", "r", "", Stage.P2D, 0, 1, CookieSelector(1), ttl=5.0), 0.0)
    ledger.enter(TransferHint("c", "", "", Stage.COLLECTIVE, 0, 1, CookieSelector(1), ttl=5.0), 0.0)
    assert ids(ledger, 4.0) == ["r", "t", "c"]
    assert ids(ledger, 6.0) == ["r", "t"]
    assert ids(ledger, 16.0) == []
    assert len(ledger) == 0


def test_the_ledger_forgets_requests_without_a_deadline_too() -> None:
    ledger = Ledger(limit=10)
    ledger.enter(RequestHint("q", math.inf, ttl=5.0), 0.0)
    ledger.enter(TransferHint("t", "q", "", Stage.P2D, 0, 1, CookieSelector(1), ttl=5.0), 0.0)
    (request, transfer) = ledger.alive(4.0)
    assert isinstance(request, RequestHint)
    assert isinstance(transfer, TransferHint)
    assert (request.deadline, transfer.deadline) == (math.inf, math.inf)
    assert ids(ledger, 6.0) == []


def test_what_is_still_being_written_outlives_its_time() -> None:
    at = 1000
    ledger = Ledger(limit=10, written=lambda name, cookie: None if (name, cookie) == ("closed", 2) else at)
    ledger.enter(RequestHint("r", 10.0, ttl=5.0), 0.0)
    for name, size, cookie in (("before", 10, 1), ("w", 1000, 1), ("behind", 10, 1), ("closed", 1000, 2)):
        ledger.enter(
            TransferHint(name, "r", "", Stage.P2D, 0, size, CookieSelector(cookie), ttl=5.0, position=1000), 0.0
        )
    at = 1500
    assert ids(ledger, 16.0) == ["r", "w", "behind"]
    at = 1600
    assert ids(ledger, 50.0) == ["r", "w", "behind"]
    assert positions(ledger) == {"w": 1010, "behind": 2010}
    assert ids(ledger, 90.0) == []  # it stands still
    assert (len(ledger), ledger._carried, ledger._owned) == (0, {}, {})


def test_what_the_daemon_says_outlives_its_time_is_kept_until_it_says_otherwise() -> None:
    """By addresses, or in turns with others: what of it has been written only the daemon can tell."""
    ledger, there = Ledger(limit=10), tuple_of("10.0.0.1", 5)
    ledger.enter(RequestHint("q", 1.0, ttl=5.0), 0.0)
    ledger.enter(BatchHint("b"), 0.0)
    for name, request, batch in (("kv", "q", ""), ("gone", "q", ""), ("weights", "", "b"), ("quiet", "", "b")):
        ledger.enter(TransferHint(name, request, batch, Stage.P2D, 0, 1, there, ttl=5.0), 0.0)

    def hear(kind: EventKind, at: float, *names: str) -> None:
        for name in names:
            ledger.hear(Event(kind, "q" if name in ("kv", "gone") else "", name, ""), at)

    hear(EventKind.OVERTIME, 4.0, "kv", "gone", "weights", "never heard of")
    assert ids(ledger, 4.0 + OVERTIME_S - 0.1) == ["q", "b", "kv", "gone", "weights"]
    hear(EventKind.OVERTIME, 30.0, "kv", "gone", "weights")
    hear(EventKind.CONNECTION_GONE, 55.0, "gone", "never heard of")
    assert ids(ledger, 30.0 + OVERTIME_S - 0.1) == ["q", "b", "kv", "weights"]
    hear(EventKind.EXPIRED, 60.0, "kv")
    ledger.enter(EndHint(What.TRANSFER, "weights"), 60.0)
    assert ids(ledger, 60.0) == ["q", "b"]
    assert ids(ledger, 100.0) == []
    assert (len(ledger), ledger._overtime, ledger._carried, ledger._owned) == (0, {}, {}, {})


def test_what_has_expired_says_nothing_of_another_one_of_its_name() -> None:
    ledger = Ledger(limit=10)
    for at in (0.0, 100.0):
        ledger.enter(TransferHint("w", "", "", Stage.BACKGROUND, 0, 1, tuple_of("10.0.0.1", 5), ttl=5.0), at)
        if not at:
            ledger.hear(Event(EventKind.OVERTIME, "", "w", ""), 4.0)
    ledger.hear(Event(EventKind.EXPIRED, "", "w", ""), 100.0)  # the one before
    assert ids(ledger, 101.0) == ["w"]


def test_what_is_said_again_lives_as_long_as_the_daemon_has_it_from_then_on() -> None:
    ledger = Ledger(limit=10)
    ledger.enter(RequestHint("q", math.inf, ttl=5.0), 0.0)
    ledger.enter(RequestHint("due", 20.0, ttl=5.0), 0.0)
    ledger.enter(BatchHint("b", ["q"]), 0.0)
    ledger.enter(ProgressHint("b", 1), 0.0)
    for name, request in (("t", "q"), ("kv", "due")):
        ledger.enter(TransferHint(name, request, "", Stage.P2D, 0, 1, tuple_of("10.0.0.1", 5), ttl=5.0), 0.0)
    assert len(list(ledger.again(4.0))) == 6
    assert ids(ledger, 8.0) == ["q", "due", "b", "b", "t", "kv"]
    assert ids(ledger, 10.0) == ["due", "b", "b", "kv"]
    assert ids(ledger, 26.0) == ["b", "b"]


def positions(ledger: Ledger) -> dict[str, int]:
    return {h.id: h.position for h in ledger.alive(0.0) if isinstance(h, TransferHint)}


def test_the_ledger_knows_where_transfers_begin_whose_predecessors_have_been_written() -> None:
    ledger = Ledger(limit=10)

    def announce(name: str, size: int, position: int, cookie: int = 1) -> None:
        hint = TransferHint(name, "", "", Stage.BACKGROUND, 0, size, CookieSelector(cookie), position=position)
        ledger.enter(hint, 0.0)

    announce("a", 100, 1000)
    announce("b", 50, 1000)  # behind a, of which nothing has been written yet
    announce("other", 70, 5000, cookie=2)
    announce("unknown", 70, 0, cookie=3)
    assert positions(ledger) == {"a": 1000, "b": 1100, "other": 5000, "unknown": 0}
    ledger.enter(EndHint(What.TRANSFER, "a"), 0.0)
    assert positions(ledger) == {"b": 1100, "other": 5000, "unknown": 0}
    announce("c", 10, 1120)  # 20 bytes of b have been written
    announce("d", 10, 1120)
    assert positions(ledger) == {"b": 1100, "other": 5000, "unknown": 0, "c": 1150, "d": 1160}
    ledger.enter(EndHint(What.TRANSFER, "c", cancelled=True), 0.0)  # never written
    ledger.enter(EndHint(What.TRANSFER, "b"), 0.0)
    assert positions(ledger) == {"other": 5000, "unknown": 0, "d": 1150}
    for name in ("d", "other", "unknown"):
        ledger.enter(EndHint(What.TRANSFER, name), 0.0)
    assert ledger._carried == {}
    for n in range(20):  # those that give way, too
        announce(f"n{n}", 10, 1, cookie=n)
    assert len(ledger._carried) == 10


@pytest.mark.parametrize("what", [What.REQUEST, What.TRANSFER])
@pytest.mark.parametrize("written", [1000, 1040, 1100])
@pytest.mark.parametrize("cancelled", [False, True])
def test_the_ledger_knows_what_requests_have_written_that_are_over(
    what: What, written: int, *, cancelled: bool
) -> None:
    ledger = Ledger(limit=10)
    for name in ("a", "b"):
        ledger.enter(RequestHint(name, 60.0), 0.0)
        hint = TransferHint(name, name, "", Stage.P2D, 0, 100, CookieSelector(1), position=1000)
        ledger.enter(hint, 0.0)
    ledger.enter(EndHint(what, "a", cancelled, ((1, written),) if cancelled else ()), 0.0)
    assert positions(ledger) == {"b": written if cancelled else 1100}
    ledger.enter(EndHint(what, "b", cancelled), 0.0)
    assert (ledger._carried, ledger._owned) == ({}, {})


def test_a_message_holds_what_may_be_applied_in_its_order() -> None:
    def transfer(n: int) -> TransferHint:
        return TransferHint(f"t{n}", "", "", Stage.BACKGROUND, 0, 1, CookieSelector(1))

    owner, end = RequestHint("r", 1.0), EndHint(What.TRANSFER, "t0")
    many: list[Hint] = [transfer(n) for n in range(COLUMNS)]
    few = many[:-1]
    cases: list[tuple[list[Hint], int, int]] = [
        ([owner, *many, end], 1 + COLUMNS, 1),
        ([*many, *many], 2 * COLUMNS, 0),
        ([owner, *few, end, *many], len(few) + 2 + COLUMNS, len(few) + 2 + COLUMNS),
        ([owner, end], 2, 2),
        ([], 0, 0),
    ]
    for hints, taken, first in cases:
        batch = split(hints)
        assert (batch.hints, batch.columns) == (hints[:taken], first)


def test_the_ledger_leaves_out_what_no_daemon_would_take() -> None:
    ledger = Ledger(limit=10)
    ledger.enter(RequestHint("r", 10.0), 0.0)
    ledger.enter(BatchHint("b", ["r", "gone"]), 0.0)
    ledger.enter(ProgressHint("b", 1), 0.0)
    ledger.enter(ProgressHint("gone", 1), 0.0)
    ledger.enter(TransferHint("orphan", "gone", "", Stage.P2D, 0, 1, CookieSelector(1)), 0.0)
    ledger.enter(TransferHint("adopted", "gone", "b", Stage.P2D, 0, 1, CookieSelector(1)), 0.0)
    told = list(ledger.alive(0.0))
    assert [type(h).__name__ for h in told] == ["RequestHint", "BatchHint", "ProgressHint", "TransferHint"]
    assert isinstance(told[1], BatchHint)
    assert told[1].request_ids == ["r"]
    assert isinstance(told[3], TransferHint)
    assert (told[3].id, told[3].request_id, told[3].batch_id) == ("adopted", "", "b")


@pytest.mark.parametrize("away", [0.0, 0.1, 0.4, 1.0, 2.0])
def test_clients_come_back_before_a_daemon_takes_over(away: float) -> None:
    """Attempts that are just too early: at the socket that says who they are, and at gRPC's."""
    least, most = predecessor.SETTLE_S
    at = away
    for _ in range(2):
        at += pause(at)
    assert at + CHANNEL_BACKOFF_S[0] < away + min(least + 2 * away, most)
    # When gRPC has failed as often as there was time for, its channel waits for longer, though no longer than this.
    assert pause(away) * 2 + CHANNEL_BACKOFF_S[1] < most


def test_the_ledger_lets_go_of_what_has_expired_though_no_daemon_restarts() -> None:
    """Of a worker that never says done, since its transfers are seen to arrive."""
    ledger = Ledger(limit=100_000)
    for at in range(0, 1000, 10):
        for n in range(20):
            ledger.enter(RequestHint(f"r{at}.{n}", at + 1.0, ttl=5.0), float(at))
            ledger.enter(TransferHint(f"t{at}.{n}", f"r{at}.{n}", "", Stage.P2D, 0, 1, CookieSelector(n), ttl=5.0), at)
        assert len(ledger) <= 2 * 20 * 2
    assert ledger.forgotten == 0
    assert len(ledger._carried) == len(ledger._numbered) <= 20


def test_what_the_ledger_keeps_is_nothing_to_the_collector_of_garbage() -> None:
    """It goes through all that it tracks, in the middle of the worker's work."""
    ledger = Ledger(limit=100_000)
    selector = CookieSelector(1)
    ledger.enter(TransferHint("first", "", "", Stage.COLLECTIVE, 0, 1, selector, 1e6), 0.0)
    gc.collect()
    before = len(gc.get_objects())
    for n in range(1000):
        ledger.enter(RequestHint(f"r{n}", 1e6), 0.0)
        ledger.enter(TransferHint(f"t{n}", f"r{n}", "", Stage.P2D, 0, 1, selector, 1e6), 0.0)
    gc.collect()
    assert len(gc.get_objects()) - before < 100
