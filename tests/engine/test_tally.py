# SPDX-License-Identifier: Apache-2.0
"""Distributions of what has ended, and what is remembered of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfsd.engine import tally
from mfsd.engine.columns import Deferred
from mfsd.engine.records import TRANSFER_COLUMNS, Request, Session, Transfer
from mfsd.engine.streams import Streams
from mfsd.engine.tally import SECONDS, TRANSFERS_KEPT, Exemplar, Histogram, Tally, spent
from mfsd.ground.model import INF, CookieSelector, Stage


def ended(t: Tally, name: str, now: float, *, delivered: bool = True, uid: int = 0, **values: float) -> None:
    """A transfer of which the columns say this, struck out."""
    session = Session("s", uid=uid)
    request = Request("r", session)
    stream = Streams().open(session, CookieSelector(1), None)
    transfer = Transfer(name, session, Stage.P2D, request, None, stream)
    columns: Deferred[Transfer] = Deferred(TRANSFER_COLUMNS)
    columns.add(transfer, stage=Stage.P2D, **values)
    assert columns.n == 1  # written
    t.ended([transfer], columns, now, delivered=delivered)


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 100) | st.sampled_from(SECONDS), st.sampled_from("abc") | st.just(""))))
)
def test_each_value_is_in_the_first_bucket_that_reaches_it(parts: list[list[tuple[float, str]]]) -> None:
    histogram = Histogram(SECONDS)
    for part in parts:
        histogram.add(np.array([value for value, _ in part]), [request for _, request in part])
    every = [one for part in parts for one in part]
    values = [value for value, _ in every]
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    below = 0.0
    for i, bound in enumerate((*SECONDS, INF)):
        assert sum(histogram.counts[: i + 1]) == sum(v <= bound for v in values)
        named = [Exemplar(r, v) for v, r in every if r and (below < v or not i) and v <= bound]
        assert histogram.exemplars[i] == (named[-1] if named else None)
        below = bound


def test_times_without_end_are_not_counted() -> None:
    histogram = Histogram(SECONDS)
    histogram.add(np.array([math.inf, -math.inf]), ["r", "r"])
    assert sum(histogram.counts) == 0
    assert not any(histogram.exemplars)


def test_queue_wire_and_slack_of_what_was_delivered() -> None:
    t = Tally()
    ended(t, "a", 10.0, created=7.0, begun=9.0, deadline=10.5, size=5)
    ended(t, "b", 10.0, delivered=False, created=7.0, begun=9.0, deadline=10.5)
    found = t.histograms()
    assert found["queue"]["p2d"].sum == pytest.approx(2.0)
    assert found["wire"]["p2d"].sum == pytest.approx(1.0)
    assert found["slack"]["p2d"].sum == pytest.approx(0.5)
    assert sum(found["queue"]["p2d"].counts) == 1
    assert [e.request for e in found["wire"]["p2d"].exemplars if e] == ["r"]
    assert sum(found["queue"]["collective"].counts) == 0
    assert [(x.id, x.delivered) for x in t.of_request("r")] == [("a", True), ("b", False)]


def test_in_time_and_late_by_user_and_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "USERS_KEPT", 1)
    t = Tally()
    ended(t, "in time", 10.0, created=7.0, deadline=10.0)
    ended(t, "late", 10.0, created=7.0, deadline=9.9)
    ended(t, "never", 10.0, delivered=False, created=7.0, deadline=9.9)
    ended(t, "cancelled", 10.0, delivered=False, created=7.0, deadline=10.1)
    ended(t, "undated", 10.0, created=7.0, deadline=INF)
    mine = t.due()
    (user,) = {uid for uid, _ in mine}
    assert mine == {(user, Stage.P2D): (2, 1)}
    assert t.due() == mine  # each is counted once
    ended(t, "another's", 10.0, uid=4711, created=7.0, deadline=11.0)
    assert t.due() == mine | {(None, Stage.P2D): (0, 1)}


def test_what_came_and_went_between_two_ticks_was_all_wire() -> None:
    t = Tally()
    ended(t, "a", 10.0, created=9.995, deadline=INF)
    found = t.histograms()
    assert found["queue"]["p2d"].sum == 0
    assert found["wire"]["p2d"].sum == pytest.approx(0.005)
    assert sum(found["slack"]["p2d"].counts) == 0  # it had no deadline


def test_what_is_read_does_not_change_any_more() -> None:
    t = Tally()
    first = t.histograms()
    ended(t, "a", 10.0, created=7.0, begun=9.0)
    t.rescues.append(0.002)
    assert sum(first["queue"]["p2d"].counts) == 0
    assert sum(t.histograms()["rescue"][""].counts) == 1
    assert sum(first["rescue"][""].counts) == 0


def test_memory_is_bounded_though_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "UNSORTED_MAX", 10)
    t = Tally()
    for i in range(35):
        ended(t, str(i), 10.0, created=7.0, begun=9.0)
        t.finished(Request(str(i), Session("s")), 1.0, 2.0, 1.5)
        assert t._noted - t._sorted <= 10
        assert len(t._finished) < 10
    assert sum(t.histograms()["queue"]["p2d"].counts) == 35
    assert sum(t.histograms()["request_slack"][""].counts) == 35


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 4)), max_size=6).map(sorted),
    st.floats(0, 5),
    st.floats(5, 10),
)
def test_seconds_at_levels_add_up(first: int, path: list[tuple[float, int]], begin: float, end: float) -> None:
    seconds = spent(first, path, begin, end)
    assert sum(seconds.values()) == pytest.approx(end - begin)
    assert set(seconds) <= {first, *(level for _, level in path)}


def test_seconds_at_levels() -> None:
    assert spent(3, [(2.0, 1), (5.0, 0)], 1.0, 6.0) == {3: 1.0, 1: 3.0, 0: 1.0}
    assert spent(3, [], 1.0, 6.0) == {3: 5.0}


def test_the_latest_ones_are_remembered_and_the_others_counted() -> None:
    t, session = Tally(), Session("s")
    stream = Streams().open(session, CookieSelector(1), None)
    columns: Deferred[Transfer] = Deferred(TRANSFER_COLUMNS)
    names = [str(i) for i in range(TRANSFERS_KEPT + 1500)]
    every = [Transfer(n, session, Stage.P2D, Request(n, session), None, stream) for n in names]
    for transfer in every:
        columns.add(transfer, stage=Stage.P2D, created=7.0, size=int(transfer.id))
    assert columns.n == len(every)
    for begin in range(0, len(every), 7000):
        part = every[begin : begin + 7000]
        t.ended(part, columns, np.arange(begin, begin + len(part), dtype=np.float64) + 8.0, delivered=True)
    assert list(t.of_request("1499")) == []  # forgotten
    for i in (1500, TRANSFERS_KEPT - 1, TRANSFERS_KEPT, TRANSFERS_KEPT + 1499):
        (one,) = t.of_request(str(i))
        assert (one.id, one.session, one.size, one.ended) == (str(i), "s", i, 8.0 + i)
    assert sum(t.histograms()["wire"]["p2d"].counts) == len(every)


def test_those_of_whom_nothing_is_known_are_left_out() -> None:
    t, session = Tally(), Session("s")
    stream = Streams().open(session, CookieSelector(1), None)
    columns: Deferred[Transfer] = Deferred(TRANSFER_COLUMNS)
    every = [Transfer(n, session, Stage.P2D, None, None, stream) for n in "abc"]
    columns.add(every[0], created=1.0)
    columns.add(every[2], created=3.0)
    assert columns.n == 2
    columns.add(every[1], created=2.0)  # not written yet
    t.ended(every, columns, np.array([10.0, 20.0, 30.0]), delivered=True)
    assert [(x.id, x.created, x.ended) for x in t.of_request("")] == [("a", 1.0, 10.0), ("c", 3.0, 30.0)]
