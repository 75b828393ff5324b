# SPDX-License-Identifier: Apache-2.0
"""Transfers that take longer than their time to live: as long as they move, they live."""

from __future__ import annotations

import pytest
from support.harness import MSS, Host, peer

from mfsd.ground.model import EventKind, Stage, What

MB = 1_000_000
TTL_S = 30.0


@pytest.mark.parametrize("by", ["socket", "addresses"])
def test_weights_that_take_minutes(by: str) -> None:
    h = Host()
    s = h.socket(1)
    for name in ("weights", "more"):
        h.transfer(name, s if by == "socket" else peer(s), 100 * MB, Stage.BACKGROUND, request="")
    h.tick(0.01)
    for i in range(200):
        h.send(s, MB)
        h.tick(0.5)
        if i < 199:
            assert list(h.session.transfers) == ["weights", "more"][i >= 99 :]
            assert h.band(s) == "background"
    h.tick(0.01)
    assert h.counted[0] == 2
    assert not h.session.events


def test_a_request_that_is_late_lives_with_its_bytes() -> None:
    h = Host()
    s = h.socket(1)
    h.request("q", 1.0)
    h.transfer("t", s, 100 * MB, request="q")
    for _ in range(100):
        h.send(s, MB)
        h.tick(0.5)
    h.done("q", What.REQUEST)
    h.tick(0.1)
    assert h.counted == (1, 0, 1)
    assert EventKind.EXPIRED not in {e.kind for e in h.session.events}


@pytest.mark.parametrize("words", [0, 100], ids=["nothing", "a word now and then"])
def test_what_does_not_move_is_forgotten(words: int) -> None:
    h = Host()
    s = h.socket(1)
    h.request("q", 1.0)
    h.transfer("t", s, 100 * MB, request="q")
    for _ in range(10):
        h.send(s, MB)
        h.tick(0.1)
    for _ in range(70):
        if words:
            h.send(s, words)
        h.tick(0.5)
    assert [(e.kind, e.transfer_id) for e in h.session.events if e.kind is EventKind.EXPIRED] == [
        (EventKind.EXPIRED, "t")
    ]
    assert h.counted == (0, 0, 1)


def test_nor_does_one_live_by_the_bytes_of_others() -> None:
    """On another connection."""
    h = Host()
    s, other = h.socket(1), h.socket(2)
    h.send(s, MSS)
    h.transfer("t", s, MB, Stage.BACKGROUND, request="")
    h.transfer("u", other, 1000 * MB, Stage.BACKGROUND, request="")
    for _ in range(70):
        h.send(other, MB)
        h.tick(0.5)
    assert list(h.session.transfers) == ["u"]


def test_the_kernel_obeys_all_the_while() -> None:
    """Who looks comes every 0.1 s only, and past its slot's expiry a connection would be unhinted until then."""
    h = Host()
    s = h.socket(1)
    h.transfer("weights", s, 100 * MB, Stage.BACKGROUND, request="")
    h.tick(0.01)
    for _ in range(500):
        h.send(s, MB // 10)
        h.tick(0.1)
        assert h.table.expires_ns[h.keys.cookies[1]] > (h.now + 0.1) * 1e9
