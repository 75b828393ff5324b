# SPDX-License-Identifier: Apache-2.0
"""What a connection sends beyond what was announced is seen until that is due: sizes may be too small."""

from __future__ import annotations

from support.harness import MSS, FakeSocket, Host

SIZE = 100 * MSS
MORE = 60 * MSS


def beyond(h: Host) -> int:
    return int(h.engine.steering.views(h.now).link.beyond.sum())


def announced(h: Host, *names: str) -> FakeSocket:
    """Transfers that are due in 5 s."""
    s = h.socket(1)
    h.request("r", 5.0)
    for name in names:
        h.transfer(name, s, SIZE)
    h.tick()
    return s


def arrived(h: Host, *, more: int = MORE) -> FakeSocket:
    """One that has arrived, and what goes behind it."""
    s = announced(h, "t")
    h.send(s, SIZE)
    h.tick(0.01)
    assert not h.session.transfers
    assert beyond(h) == 0
    h.send(s, more, acked=False)
    h.tick(0.01)
    return s


def test_it_is_seen_until_it_is_due() -> None:
    h = Host()
    arrived(h)
    assert beyond(h) == 1
    h.tick(4.0)
    assert beyond(h) == 1
    h.tick(1.1)
    assert beyond(h) == 0


def test_a_few_bytes_more_are_none() -> None:
    h = Host()
    arrived(h, more=5 * MSS)
    assert beyond(h) == 0


def test_what_is_announced_is_not_beyond() -> None:
    h = Host()
    s = arrived(h)
    h.request("q", 5.0)
    h.transfer("u", s, SIZE)
    h.tick(0.01)
    assert beyond(h) == 0


def test_whoever_says_that_it_was_all_sends_something_else_behind_it() -> None:
    h = Host()
    s = announced(h, "t")
    h.send(s, SIZE, acked=False)
    h.done("t")
    h.ack(s, SIZE)
    h.tick(0.01)
    assert not h.session.transfers
    h.send(s, MORE, acked=False)
    h.tick(0.01)
    assert beyond(h) == 0


def test_one_with_more_behind_it_is_not_the_last() -> None:
    h = Host()
    s = announced(h, "a", "b")
    h.send(s, SIZE)
    h.tick(0.01)
    h.send(s, MORE, acked=False)
    h.tick(0.01)
    assert list(h.session.transfers) == ["b"]
    assert beyond(h) == 0
