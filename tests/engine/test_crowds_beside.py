# SPDX-License-Identifier: Apache-2.0
"""What ends, or is said again, beside very many transfers: right, and without a pass over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.crowds import MANY, crowd
from support.harness import Host
from support.work import steps

from mfsd.ground.model import BatchHint, CookieSelector, EndHint, RequestHint, What

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.ground.model import Hint


@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 300),
)
def test_those_behind_what_will_not_come_move_forward(announced: list[tuple[int, bool]], offset: int) -> None:
    h = Host()
    sock = h.socket(1)
    h.request("r", 20.0)
    for i, (size, _) in enumerate(announced):
        h.transfer(str(i), sock, size)
    h.tick()
    stream = h.session.streams[CookieSelector(1)]
    h.send(sock, offset, acked=False)
    want, gap, end = {}, 0.0, 0.0
    for i, (size, over) in enumerate(announced):
        start, end = end, end + size
        if over:
            gap += max(end - max(start, offset), 0.0)
        else:
            want[str(i)] = start - gap, end - gap
    h.engine.endings.end([x for x in stream.queue if str(x.id) not in want], h.now)
    t = h.engine.books.transfers
    assert {x.id: (t.get(x, "start"), t.get(x, "end")) for x in stream.queue} == want
    assert [x.id for x in stream.queue] == list(want)
    assert stream.announced == end - gap


@pytest.mark.parametrize("moved", [0, 1 << 20])
def test_interleaved_bytes_that_will_not_come_were_not_moved_by_the_others(moved: int) -> None:
    h = Host()
    sock = h.socket(1)
    h.request("r", 20.0)
    for i in range(4):
        h.transfer(str(i), sock, 1 << 20, ordered=False)
    h.send(sock, moved)
    for i in range(1, 4):
        h.engine.apply(h.session, EndHint(What.TRANSFER, str(i), cancelled=True), h.now)
    h.tick(0.3)
    h.tick(0.3)
    assert list(h.session.transfers) == ["0"]
    left = h.engine.steering.views(h.now).transfers.left
    assert left == pytest.approx([(1 << 20) - moved / 4], abs=1)
    h.send(sock, (1 << 20) - moved // 4)
    h.tick(0.3)
    h.tick(0.3)
    assert not h.session.transfers


@pytest.mark.parametrize(
    "hints",
    [
        lambda _: [RequestHint("r", 1010.0)],
        lambda _: [BatchHint("b", ["r"]), BatchHint("b", [])],
        lambda i: [EndHint(What.TRANSFER, str(2 * i), cancelled=True)],
    ],
    ids=["its request is announced again", "its request comes and goes", "holes"],
)
def test_what_is_said_of_very_many_transfers_costs_little(hints: Callable[[int], list[Hint]]) -> None:
    """Each of these took a pass in Python over all of them."""
    h, _ = crowd(MANY)

    def say() -> None:
        for i in range(300):
            for hint in hints(i):
                h.engine.apply(h.session, hint, h.now)

    assert steps(say) < 300 * MANY / 16
