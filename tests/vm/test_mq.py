# SPDX-License-Identifier: Apache-2.0
"""What strict priority means on a device with several transmit queues: one tree per queue (mq), or one above them all.

A device serves its queues in turns. In these tests each queue has a pace of its own, which is the same to the packets
in it: what goes out of one queue does not wait for another.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

import pytest
from support.benches import PAYLOAD, PORT, SNDBUFFORCE, plan
from support.prio_benches import LEVEL0, SCAVENGER, PrioBench

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.netns, pytest.mark.feature("many transmit queues: urgent packets overtaken by deferred ones")]

COUNT: Final = 300
URGENT, DEFERRED, SAME_QUEUE, FILLER = 1, 2, 3, 99
_QUEUE_OF: Final = {URGENT: 0, DEFERRED: 1, SAME_QUEUE: 1}


@pytest.fixture(autouse=True)
def _kernel(needs: Callable[..., None]) -> None:
    needs("prio", "tbf", "drr")


def by_queue(bench: PrioBench) -> None:
    """Two transmit queues for two sockets, as two CPUs would have: chosen by source port."""
    bench.tc("qdisc add dev DEV clsact")
    for tag, queue in _QUEUE_OF.items():
        bench.tc(
            f"filter add dev DEV egress protocol ip pref 1 u32 match ip sport {PORT + tag} 0xffff "
            f"action skbedit queue_mapping {queue}"
        )


def send(bench: PrioBench, tag: int, priority: int, count: int) -> None:
    """From the source port that stands for the tag."""
    s = bench.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    s.setsockopt(socket.SOL_SOCKET, SNDBUFFORCE, 64 << 20)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
    s.bind((bench.pair.addr_a, PORT + tag))
    for _ in range(count):
        s.sendto(struct.pack("=I", tag).ljust(PAYLOAD, b"."), (bench.pair.addr_b, PORT))


def between(arrived: list[int], urgent: int = URGENT) -> int:
    """Deferred packets that arrived between the first and the last urgent one."""
    last = len(arrived) - 1 - arrived[::-1].index(urgent)
    return arrived[arrived.index(urgent) : last].count(DEFERRED)


def test_one_tree_above_all_queues_is_strict(bench: PrioBench, record_property: Callable[[str, object], None]) -> None:
    """What mfsd's plan makes."""
    by_queue(bench)
    e = bench.applied("4mbit", 1)
    receiver = bench.receiver()
    maps = e.band_maps()
    bench.send(maps[0][0], COUNT, tag=FILLER)  # the link is busy until all others wait
    send(bench, DEFERRED, maps[SCAVENGER][0], COUNT)
    send(bench, URGENT, maps[LEVEL0][0], COUNT)
    got = [t for t in bench.tags(receiver, 3 * COUNT) if t != FILLER]
    record_property("overtaken by", between(got))
    assert between(got) == 0
    assert e.restore() == []


def test_a_tree_per_queue_is_strict_within_each_queue_only(
    bench: PrioBench, record_property: Callable[[str, object], None]
) -> None:
    """Why mfsd does not do that. Were this test to fail, one tree per queue would do, without a common lock."""
    by_queue(bench)
    bench.tc("qdisc add dev DEV root handle 1: mq")
    for q in (1, 2):
        bench.tc(f"qdisc add dev DEV parent 1:{q} handle {q}0: tbf rate 2mbit burst 4kb limit 4mb")
        bench.tc(f"qdisc add dev DEV parent {q}0:1 handle {q}1: prio bands 3")
    receiver = bench.receiver()
    high, low = 1, 3
    send(bench, DEFERRED, 0x210000 + low, COUNT)
    send(bench, URGENT, 0x110000 + high, COUNT)
    send(bench, SAME_QUEUE, 0x210000 + high, 50)
    got = bench.tags(receiver, 2 * COUNT + 50)
    record_property("overtaken by", between(got))
    assert between(got) >= COUNT // 2
    # A few may slip through when sending is slower than the pace.
    assert between(got, SAME_QUEUE) <= 5


def test_the_plan_takes_one_tree_and_says_why(bench: PrioBench) -> None:
    for rate, backend in ((None, "prio"), ("100mbit", "htb")):
        dry = bench.enforcer(rate, "auto", plan()).plan()
        assert dry.backend == backend
        assert sum("root" in step.command for step in dry.steps) == 1
        assert not any(" mq" in step.command for step in dry.steps)
        (why,) = (reason for reason in dry.reasons if "4 transmit queues" in reason)
        assert "one tree per queue (mq) would be strict only within each queue" in why
