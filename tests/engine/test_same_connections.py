# SPDX-License-Identifier: Apache-2.0
"""What a session names in several ways: its bytes count for one of its transfers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.harness import MSS, Host, peer

from mfsd.ground.model import PortRange, TupleSelector, What


def wider(selector: TupleSelector) -> TupleSelector:
    """Another one that names the same connections."""
    return replace(selector, dport=PortRange(5000, 7000))


def left(h: Host) -> dict[str, float]:
    """Bytes that have not left, by transfer."""
    books, sent = h.engine.books, h.connections.positions.sent_by
    ends = {name: (x.stream, books.transfers.get(x, "end")) for name, x in h.session.transfers.items()}
    return {name: end - books.streams.offset(stream, sent) for name, (stream, end) in ends.items()}


def test_a_selector_of_several_and_behind_it_one_of_their_sockets() -> None:
    h = Host()
    one, two = h.socket(1), h.socket(2)
    h.request("r", 60.0)
    h.transfer("all", peer(one), 1000 * MSS)
    h.tick(0.01)
    h.send(one, 100 * MSS)
    h.send(two, 100 * MSS)
    h.tick(0.01)
    h.transfer("one", one, 200 * MSS, position=one.bytes_acked)
    h.send(one, 200 * MSS)
    h.tick(0.01)
    assert left(h) == {"all": 800 * MSS}
    h.transfer("again", one, 200 * MSS, position=one.bytes_acked)
    h.send(one, 200 * MSS)
    h.send(one, 100 * MSS)  # of the first one, between
    h.transfer("last", one, 50 * MSS, position=one.bytes_acked)
    h.send(one, 50 * MSS)
    h.tick(0.01)
    assert left(h) == {"all": 700 * MSS}
    h.send(two, 600 * MSS)
    h.tick(0.01)
    assert h.counted[0] == 3
    h.send(two, 100 * MSS)
    h.tick(0.01)
    assert h.counted[0] == 4
    h.transfer("after", peer(one), 10 * MSS)
    h.send(one, 9 * MSS)
    h.tick(0.01)
    assert h.counted[0] == 4
    h.send(one, MSS)
    h.tick(0.01)
    assert h.counted[0] == 5


@pytest.mark.parametrize("how", ["cancel", "done"])
def test_of_less_than_was_announced_by_the_socket_the_rest_is_theirs(how: str) -> None:
    h = Host()
    one, two = h.socket(1), h.socket(2)
    h.request("r", 60.0)
    h.transfer("all", peer(one), 100 * MSS)
    h.tick(0.01)
    h.transfer("one", one, 200 * MSS, position=one.bytes_acked)
    h.send(one, 50 * MSS)
    h.tick(0.01)
    if how == "done":
        h.done("one")
    else:
        h.cancel("one", one, one.bytes_acked)
    h.tick(0.01)
    assert left(h) == {"all": 100 * MSS}
    h.send(one, 40 * MSS)
    h.send(two, 59 * MSS)
    h.tick(0.01)
    assert left(h) == {"all": MSS}
    h.send(one, MSS)
    h.tick(0.01)
    assert not h.session.transfers


def test_the_connection_that_both_name_ends() -> None:
    h = Host()
    one, two = h.socket(1), h.socket(2)
    h.request("r", 60.0)
    h.transfer("all", peer(one), 300 * MSS)
    h.tick(0.01)
    h.transfer("one", one, 200 * MSS, position=one.bytes_acked)
    h.send(one, 300 * MSS)
    h.kernel.close(one)
    h.tick(0.01)
    assert left(h) == {"all": 200 * MSS}
    h.send(two, 200 * MSS)
    h.tick(0.01)
    assert not h.session.transfers


@pytest.mark.parametrize("connections", [1, 2])
@pytest.mark.parametrize("known", [True, False], ids=["connected before", "connected behind"])
def test_two_selectors_of_the_same_connections(connections: int, *, known: bool) -> None:
    """Pipelined: each is announced before the one before it is written."""
    h = Host()
    socks = [h.socket(i + 1) for i in range(connections)]
    first, second = peer(socks[0]), wider(peer(socks[0]))
    if not known:
        for s in socks:
            h.kernel.vanish(s)
    h.request("r", 60.0)
    h.transfer("a", first, 100 * MSS)
    h.transfer("b", second, 100 * MSS)
    h.tick(0.01)
    if not known:
        for s in socks:
            h.kernel.connect(s)
    h.tick(0.01)
    h.transfer("c", first, 100 * MSS)
    for i, name in enumerate("abc"):
        for k in range(20):
            assert h.counted[0] == i, (i, k)
            h.send(socks[k % connections], 5 * MSS)
            h.tick(0.01)
        assert h.counted[0] == i + 1
        assert name not in h.session.transfers
    h.transfer("d", second, 10 * MSS)
    h.send(socks[-1], 10 * MSS)
    h.tick(0.01)
    assert h.counted[0] == 4
    h.done("r", What.REQUEST)
    assert h.counted[1:] == (1, 0)
