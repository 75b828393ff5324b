# SPDX-License-Identifier: Apache-2.0
"""Connections of other network namespaces, tuples that are used again at once, and streams that stand still."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.harness import MSS, FakeSocket, Host, exact_tuple, peer

from mfsd.engine.slots import QUIET, WAITS
from mfsd.ground.model import MarkHint, PortRange, Stage, TupleSelector, What

RANGE = PortRange(6000, 6000)
SIZE = 40 * MSS


def forwarded(h: Host, sock: FakeSocket, payload: int, *, acked: bool = True) -> None:
    """Let payload of a connection pass the classifier that has lost its socket: matched by addresses alone."""
    row = h.table.rows[h.keys.tuples[sock.endpoints]]
    row["flags"] = QUIET if acked else 0
    row["sent"] += payload
    row["packets"] += 1
    row["last_ns"] = int(h.now * 1e9)


def test_a_mark_by_addresses_on_a_routed_pod() -> None:
    """Its socket is in another namespace, and its packets have none when they leave."""
    for when in ("before", "after"):
        for exact in (False, True):
            h = Host()
            sock = FakeSocket(7, h.socket(1).endpoints, here=False)
            sock.endpoints = replace(sock.endpoints, sport=41_001)
            selector = exact_tuple(sock.endpoints)
            if not exact:
                selector = TupleSelector(None, sock.endpoints.dst, PortRange(41_001, 41_001), RANGE, 6)
            if when == "before":
                h.kernel.connect(sock)
            h.engine.apply(h.session, MarkHint(selector, Stage.COLLECTIVE), h.now)
            if when == "after":
                h.kernel.connect(sock)
            h.tick()
            assert h.band(sock) == "level 0"
            assert h.keys.tuples[sock.endpoints] == h.keys.cookies[7]
            h.kernel.close(sock)
            h.tick()
            assert sock.endpoints not in h.keys.tuples
            assert h.table.taken == 0


def test_a_transfer_of_a_routed_pod_by_addresses() -> None:
    h = Host()
    sock = FakeSocket(7, replace(h.socket(1).endpoints, sport=41_001), here=False)
    h.kernel.connect(sock)
    h.request("r", 60.0)
    for i in range(3):
        h.transfer(f"t{i}", exact_tuple(sock.endpoints), 100 * MSS)
        h.tick()
        assert h.table.taken == 1, "it has one slot, whatever names it"
        forwarded(h, sock, 100 * MSS)
        h.tick(0.001)
        h.tick(0.2)
        assert h.engine.books.counters.transfers_completed == i + 1


@pytest.mark.parametrize("routed", [False, True])
def test_what_has_left_a_pod_is_done_when_it_is_acknowledged(*, routed: bool) -> None:
    """TCP can't be asked about it, and an empty queue says nothing of the path."""
    h = Host()
    sock = FakeSocket(7, replace(h.socket(1).endpoints, sport=41_001), here=False)
    h.kernel.connect(sock)
    h.request("r", 60.0)
    h.transfer("t", exact_tuple(sock.endpoints) if routed else sock, 100 * MSS)
    h.tick()
    if routed:
        forwarded(h, sock, 100 * MSS, acked=False)
    else:
        h.send(sock, 100 * MSS, acked=False)
    for _ in range(20):
        h.tick(0.1)
    assert h.counted[0] == 0
    h.table.flags[h.keys.cookies[7]] = QUIET
    h.tick(0.01)
    assert h.counted[0] == 1


@pytest.mark.parametrize(("written", "waits", "done_s"), [(90, False, 0.1), (50, False, 2.0), (50, True, None)])
def test_what_a_pod_has_written_of_a_transfer_that_is_done(written: int, done_s: float | None, *, waits: bool) -> None:
    """Less than was announced; where that is much, it may wait in the socket for a peer that does not read."""
    h = Host()
    sock = FakeSocket(7, h.socket(1).endpoints, here=False)
    h.kernel.connect(sock)
    h.request("r", 60.0)
    h.transfer("t", sock, 100 * MSS)
    h.tick()
    h.send(sock, written * MSS)
    h.table.flags[h.keys.cookies[7]] = QUIET | (WAITS if waits else 0)
    h.done("r", What.REQUEST)
    took = 0.0
    while took < 3.0 and not h.counted[0]:
        h.tick(0.1)
        took += 0.1
    assert h.counted[0] == (done_s is not None)
    assert done_s is None or took <= done_s


def test_those_who_may_name_only_their_own_get_nothing_by_addresses() -> None:
    """Anybody can make a namespace with a connection of the same addresses as somebody else's."""
    h = Host()
    mine = h.engine.session("mine", h.now, uid=1000, only=1000)
    sock = FakeSocket(7, h.socket(1).endpoints, here=False, uid=1000)
    h.kernel.connect(sock)
    h.engine.apply(mine, MarkHint(exact_tuple(sock.endpoints), Stage.COLLECTIVE), h.now)
    h.tick()
    assert h.band(sock) == "level 0"
    assert not h.keys.tuples


def test_the_same_addresses_again_before_anybody_has_heard_of_the_end() -> None:
    """The kernel still finds the slot of the one before, which is over: nobody shares a slot with it."""
    h = Host()
    first = h.socket(1)
    h.kernel.close(first)
    h.request("r", 60.0)
    h.transfer("t", exact_tuple(first.endpoints), 2 * MSS)
    h.tick()
    sock = FakeSocket(2, first.endpoints)
    h.kernel.connect(sock)
    h.send(sock, 2 * MSS)
    h.kernel.close(sock)
    stranger = FakeSocket(3, first.endpoints)
    h.kernel.connect(stranger)
    h.tick()
    assert h.engine.books.counters.transfers_completed == 1
    others = [h.socket(i) for i in range(10, 40)]
    for s in others:
        h.transfer(f"t{s.cookie}", s, MSS)
    slots = [conn.slot for conn in h.connections.by_slot.values()]
    assert len(slots) == len(set(slots)) == h.table.taken
    taken = [h.keys.cookies[s.cookie] for s in others]
    assert h.keys.cookies.get(stranger.cookie) not in taken
    for s in others:
        h.kernel.close(s)
    h.kernel.close(stranger)
    h.tick(20.0)
    h.tick(20.0)
    assert h.table.taken == 0
    assert not h.keys.cookies


def test_what_is_left_is_exact_at_rest() -> None:
    """Far from the end of a transfer, and after its last packet nothing tells of acknowledgements by itself."""
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    h.transfer("t", s, 1000 * MSS)
    h.send(s, 400 * MSS, acked=False)
    h.tick(0.001)
    h.ack(s, 400 * MSS)
    for _ in range(4):
        h.tick(0.2)
    left = h.engine.steering.views(h.now).transfers.left
    assert left.tolist() == [600 * MSS]
    asked = h.kernel.asked
    for _ in range(10):
        h.tick(0.2)
    assert h.kernel.asked - asked <= 2, "TCP is asked once, and now and then whether the connection still exists"


def both(*order: str) -> tuple[Host, FakeSocket]:
    """Transfers announced on one connection, by its socket or by addresses as their names say."""
    h = Host()
    s = h.socket(1)
    h.request("r", 60.0)
    by: dict[str, FakeSocket | TupleSelector] = {"sock": s, "exact": exact_tuple(s.endpoints), "range": peer(s)}
    for i, how in enumerate(order):
        h.transfer(f"{i}", by[how], SIZE, position=1 if how == "sock" else 0)
        h.tick(0.001)
        h.tick(0.3)
    return h, s


@pytest.mark.parametrize("other", ["exact", "range"])
@pytest.mark.parametrize("order", ["sa", "as", "sas", "asa", "ssaa", "aass", "saas"])
def test_one_connection_by_its_socket_and_by_addresses_carries_one_after_the_other(other: str, order: str) -> None:
    h, s = both(*("sock" if how == "s" else other for how in order))
    for i in range(len(order)):
        h.send(s, SIZE - 1)
        h.tick(0.001)
        assert sorted(h.session.transfers) == [str(k) for k in range(i, len(order))]
        h.send(s, 1)
        h.tick(0.001)
    assert not h.session.transfers


@pytest.mark.parametrize("other", ["exact", "range"])
def test_and_so_it_does_later(other: str) -> None:
    """Streams that have carried something are at an offset of their own."""
    h, s = both("sock", other)
    h.send(s, 2 * SIZE)
    h.tick(0.001)
    assert not h.session.transfers
    by: dict[str, FakeSocket | TupleSelector] = {"sock": s, "exact": exact_tuple(s.endpoints), "range": peer(s)}
    for i, how in enumerate(("sock", other, "sock", other)):
        h.transfer(f"{i}", by[how], SIZE, position=1 + 2 * SIZE if how == "sock" else 0)
    for i in range(4):
        h.send(s, SIZE - 1)
        h.tick(0.001)
        assert sorted(h.session.transfers) == [str(k) for k in range(i, 4)]
        h.send(s, 1)
        h.tick(0.001)
