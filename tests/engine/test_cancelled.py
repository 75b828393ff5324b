# SPDX-License-Identifier: Apache-2.0
"""What a worker takes back is heard later: bytes that went meanwhile belong to those behind.

The same on real sockets: tests/e2e/test_habits_times.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.harness import MSS, FakeSocket, Host

from mfsd.ground.model import BatchHint, CookieSelector, EndHint, EventKind, Stage, TransferHint, What

if TYPE_CHECKING:
    from collections.abc import Iterable

SIZE = 40 * MSS


def announced(*names: str) -> tuple[Host, FakeSocket]:
    """Transfers of a request of the same name each, one behind the other on a socket that stands at 1."""
    h = Host()
    s = h.socket(1)
    for name in names:
        h.request(name, 60.0)
        h.transfer(name, s, SIZE, request=name, position=1)
    return h, s


@pytest.mark.parametrize("what", [What.TRANSFER, What.REQUEST])
@pytest.mark.parametrize("moved", [SIZE // 2, SIZE, SIZE + SIZE // 2, 2 * SIZE])
def test_what_is_taken_back_unwritten_leaves_its_place(what: What, moved: int) -> None:
    """However far the two behind it have come, and whether it is still there."""
    for seen in (False, True):
        h, s = announced("a", "b", "c")
        h.tick(0.001)
        h.send(s, moved)
        if seen:
            h.tick(0.001)
        h.cancel("a", s, 1, what)
        h.tick(0.001)
        assert sorted(h.session.transfers) == ["b", "c"][moved // SIZE :]
        h.send(s, 2 * SIZE - moved)
        h.tick(0.001)
        assert not h.session.transfers
        assert h.counted[0] == 2


def test_what_had_been_written_of_it_still_goes_first() -> None:
    h, s = announced("a", "b")
    h.tick(0.001)
    h.send(s, SIZE // 4 + SIZE - 1)  # of it a quarter, then nearly all of the next one
    h.tick(0.001)
    h.cancel("a", s, 1 + SIZE // 4)
    h.tick(0.001)
    assert list(h.session.transfers) == ["b"]
    h.send(s, 1)
    h.tick(0.001)
    assert h.counted[0] == 1


def test_one_that_was_written_as_a_whole_has_arrived() -> None:
    h, s = announced("a", "b")
    h.tick(0.001)
    h.send(s, SIZE)
    h.tick(0.001)
    h.cancel("a", s, 1 + SIZE)
    h.tick(0.001)
    assert list(h.session.transfers) == ["b"]
    h.send(s, SIZE)
    h.tick(0.001)
    assert h.counted[0] == 2


def test_one_after_the_other_is_taken_back_with_bytes_in_between() -> None:
    """In one message, as a worker's thread gathers them."""
    h, s = announced("a", "b", "c", "d")
    h.tick(0.001)
    h.engine.gather(h.now, on=True)
    h.send(s, 2 * SIZE)
    h.cancel("a", s, 1)
    h.cancel("c", s, 1 + SIZE)  # b has been written
    h.engine.gather(h.now, on=False)
    h.tick(0.001)
    assert not h.session.transfers
    assert h.counted[0] == 2


def test_what_arrived_long_before_that_was_heard_is_dated_right() -> None:
    h = Host()
    s = h.socket(1)
    for name, left in (("a", 60.0), ("b", 1.0)):
        h.request(name, left)
        h.transfer(name, s, SIZE, request=name, position=1)
    h.tick(0.001)
    h.send(s, SIZE)
    h.tick(0.001)
    for _ in range(3):
        h.tick(0.5)
    s.last_ack_ms = 1500
    h.cancel("a", s, 1)
    h.done("b", What.REQUEST)
    h.tick(0.001)
    h.tick(0.001)
    assert h.counted == (1, 1, 0)


def test_a_batch_is_taken_back() -> None:
    h, s = announced("b")
    h.engine.apply(h.session, BatchHint("x"), h.now)
    a = TransferHint("a", "", "x", Stage.KV_REUSE, 0, SIZE, CookieSelector(s.cookie), position=1)
    h.engine.apply(h.session, a, h.now)
    h.transfer("c", s, SIZE, request="b", position=1)
    h.tick(0.001)
    h.send(s, 2 * SIZE)
    h.tick(0.001)
    h.cancel("x", s, 1 + SIZE, What.BATCH)
    h.tick(0.001)
    assert not h.session.transfers
    assert h.counted[0] == 2


def test_what_a_worker_says_of_sockets_that_it_has_not_named_is_nothing() -> None:
    h, s = announced("a", "b")
    h.tick(0.001)
    h.send(s, SIZE // 2)
    h.engine.apply(h.session, EndHint(What.TRANSFER, "a", True, ((77, 1), (s.cookie, 1 << 63))), h.now)
    h.tick(0.001)
    h.send(s, SIZE)
    h.tick(0.001)
    assert h.session.transfers.keys() <= {"b"}


@pytest.mark.parametrize("after", [0.0, 0.1])
def test_words_that_come_behind_the_end_of_the_connection(after: float) -> None:
    """Cancelled, done, though its size was an upper bound, or nothing."""
    h, s = announced("a", "b", "c")
    h.tick(0.001)
    h.send(s, SIZE + SIZE // 2)
    h.kernel.close(s)
    h.tick(after)
    h.cancel("a", s, 1, What.REQUEST)
    h.done("b", What.REQUEST)
    h.tick(0.001)
    h.done("c", What.REQUEST)
    h.tick(0.001)
    assert h.counted == (2, 2, 0)
    assert not h.session.streams


def test_without_a_word_what_was_not_written_is_lost_soon() -> None:
    h, s = announced("a", "b")
    h.tick(0.001)
    h.send(s, SIZE)
    h.kernel.close(s)
    for _ in range(3):
        h.tick(0.2)
    assert [(e.kind, e.transfer_id) for e in h.session.events] == [(EventKind.CONNECTION_GONE, "b")]
    h.done("b", What.REQUEST)
    assert h.counted == (1, 0, 1)
    assert not h.session.transfers


@pytest.mark.parametrize("heard", range(7))
@pytest.mark.parametrize("ticks", [0, 1, 3])
@pytest.mark.parametrize("accepted", [False, True])
def test_a_connection_that_is_over_before_all_is_heard_of_it(heard: int, ticks: int, *, accepted: bool) -> None:
    """One is taken back before its bytes went, and the two behind it are written; so many words come in time."""
    h = Host()
    at = 0 if accepted else 1
    s = h.socket(1, bytes_acked=at, active=not accepted)

    def hear(words: Iterable[str]) -> None:
        for word in words:
            if word == "cancel":
                h.cancel("a", s, at, What.REQUEST)
            elif word in {"b is done", "c is done"}:
                h.done(word[0], What.REQUEST)
            else:
                h.request(word, 60.0)
                h.transfer(word, s, SIZE, request=word, position=at)
            for _ in range(ticks):
                h.tick(0.001)

    words = ["a", "b", "c", "cancel", "b is done", "c is done"]
    hear(words[:heard])
    for _ in range(2):
        h.send(s, SIZE)
        h.tick(0.001)
    h.kernel.close(s)
    h.tick(0.001)
    hear(words[heard:])
    for _ in range(3):
        h.tick(0.2)
    assert h.counted == (2, 2, 0)
    assert not h.session.transfers
    assert not h.session.streams


def test_bytes_count_once_when_more_is_announced_on_a_connection_that_is_over() -> None:
    h, s = announced("a")
    h.tick(0.001)
    h.send(s, SIZE)
    h.done("a", What.REQUEST)
    h.tick(0.001)
    h.kernel.close(s)
    h.tick(0.001)
    for name in ("b", "c"):
        h.request(name, 1.0)
        h.transfer(name, s, SIZE, request=name, position=1)
        for _ in range(3):
            h.tick(0.2)
    h.tick(5.0)
    assert h.counted[0] == 1


@pytest.mark.parametrize("before", [True, False], ids=["hinted before", "hinted then"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_socket_that_is_connected_once_more_begins_anew(*, whole: bool, before: bool) -> None:
    """By the same cookie another connection; of the first one all was written, or less than announced."""
    h, s = announced("a")
    h.tick(0.001)
    h.send(s, SIZE if whole else SIZE // 4)
    h.tick(0.001)
    h.kernel.close(s)
    h.tick(0.001)
    h.request("b", 60.0)
    if before:
        h.transfer("b", s, SIZE, request="b", position=0)  # of an unconnected socket nothing is known
        h.tick(0.001)
    once_more = h.socket(1, port=50_000)
    if not before:
        h.transfer("b", once_more, SIZE, request="b", position=1)
    h.tick(0.001)
    h.send(once_more, SIZE)
    h.tick(0.001)
    assert "b" not in h.session.transfers
    h.tick(0.3)
    assert h.counted[0] == 1 + whole
