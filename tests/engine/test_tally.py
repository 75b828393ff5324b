# SPDX-License-Identifier: Apache-2.0
"""Distributions of what has ended, and what is remembered of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfsd.engine import tally
from mfsd.engine.columns import Deferred
from mfsd.engine.records import TRANSFER_COLUMNS, Request, Session, Transfer
from mfsd.engine.streams import Streams
from mfsd.engine.tally import SECONDS, Histogram, Tally, spent
from mfsd.model import INF, CookieSelector, Stage


def ended(t: Tally, name: str, now: float, *, delivered: bool = True, owner: str = "r", **values: float) -> None:
    """A transfer of which the columns say this, struck out."""
    session = Session("s")
    request = Request(owner, session)
    stream = Streams().open(session, CookieSelector(1), None)
    transfer = Transfer(name, session, Stage.P2D, request, None, stream)
    columns: Deferred[Transfer] = Deferred(TRANSFER_COLUMNS)
    columns.add(transfer, **values)
    assert columns.n == 1  # written
    t.ended([transfer], columns, now, now if delivered else None)


@given(st.lists(st.floats(0, 100, allow_nan=False)))
def test_each_value_is_in_the_first_bucket_that_reaches_it(values: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.add(value)
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    for i, bound in enumerate((*SECONDS, INF)):
        assert sum(histogram.counts[: i + 1]) == sum(v <= bound for v in values)


def test_times_without_end_are_not_counted() -> None:
    histogram = Histogram(SECONDS)
    histogram.add(math.inf)
    assert sum(histogram.counts) == 0


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
        assert len(t._ended) < 10
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
