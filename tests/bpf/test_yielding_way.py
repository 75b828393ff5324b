# SPDX-License-Identifier: Apache-2.0
"""What connections that yield make of the way there and of the way back."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Final

import pytest
from support.yielders import CHUNK, FAMILIES, FIRST, RATE, URGENT, acked, filled, needs_it, part, rtt_us, settles, share

from mfsd.datapath import _abi
from mfsd.lab.hosts.tcp import algorithm_of, tcp_info

if TYPE_CHECKING:
    from support.yielders import Bench

LINK: Final = "root tbf rate 100mbit burst 20kb latency 50ms"
IN_A_BAND: Final = 1 << 16 | 1
"""A packet's priority once the classifier has chosen a band: the class of a qdisc, not one of 0 to 15."""
BACK: Final = 4
"""Connections on the way back."""
FULL_US: Final = 10_000
"""A round trip that long has met a queue."""


def two_behind_a_fifo(bench: Bench, family: int) -> tuple[socket.socket, socket.socket]:
    """Connections that run cubic, which a hint may replace."""
    bench.yielding.settings["flags"] = _abi.YIELD_REPLACE
    bench.pair.run(bench.pair.a, f"tc qdisc add dev {bench.pair.dev_a} {LINK}")
    return bench.connect(family, "cubic"), bench.connect(family, "cubic")


@needs_it
@pytest.mark.bpf
@pytest.mark.parametrize("family", FAMILIES)
def test_behind_a_fifo_the_deferred_one_yields(bench: Bench, family: int) -> None:
    one, other = two_behind_a_fifo(bench, family)
    plain = share(one, other)
    bench.hint(other, FIRST)
    bench.hint(one, URGENT)
    settles(lambda: share(one, other), lambda got: got > max(0.85, plain))
    assert algorithm_of(other) == bench.yielding.name
    bench.hint(other, URGENT)  # both are cubic again
    bench.hint(one, FIRST)
    settles(lambda: share(one, other), lambda got: got < 0.15)
    left = tcp_info(one).acked
    bench.sends_until(one, lambda: tcp_info(one).acked > left + 20 * len(CHUNK))  # with nobody about it has the link


@needs_it
@pytest.mark.bpf
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_way_does_not_hide_how_long_it_is_without_queue(bench: Bench, family: int) -> None:
    """It is deferred when others have filled the queue already, and has had a round trip before that."""
    other, late = two_behind_a_fifo(bench, family)
    with filled(other):
        bench.sends_until(late, lambda: rtt_us(late) > FULL_US)
        bench.hint(late, FIRST)
        bench.sends_until(late, lambda: bool(bench.yielding.paths()[1]["samples"].any()))
        (path,) = bench.yielding.paths()[1]
    assert path["base_us"] < FULL_US


@needs_it
@pytest.mark.bpf
@pytest.mark.parametrize("family", FAMILIES)
def test_what_waits_in_a_band_of_this_host_has_met_no_queue(bench: Bench, family: int) -> None:
    other, late = two_behind_a_fifo(bench, family)
    late.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, IN_A_BAND)
    with filled(other):
        bench.sends_until(late, lambda: rtt_us(late) > FULL_US)
        bench.hint(late, FIRST)
        bench.becomes(late, bench.yielding.name)
        bench.sends_until(late, lambda: bool(bench.yielding.paths()[1]["samples"].any()))
        for _ in range(2):  # what left before it was deferred is not known
            (before,) = bench.yielding.paths()[1]
            trips, sent = [], tcp_info(late).acked
            while tcp_info(late).acked < sent + 20 * len(CHUNK):
                late.sendall(CHUNK)
                trips.append(rtt_us(late))
        (path,) = bench.yielding.paths()[1]
    trip = sum(trips) / len(trips)
    assert trip > FULL_US / 2, "the queue is long"
    assert path["delay_sum"] - before["delay_sum"] < trip / 4 * (path["samples"] - before["samples"])


@needs_it
@pytest.mark.bpf
@pytest.mark.parametrize("family", FAMILIES)
def test_a_busy_way_back_is_no_queue_and_hides_none(bench: Bench, family: int) -> None:
    bench.yielding.settings["flags"] = _abi.YIELD_REPLACE
    for name, device in ((bench.pair.a, bench.pair.dev_a), (bench.pair.b, bench.pair.dev_b)):
        bench.pair.run(name, f"tc qdisc add dev {device} {LINK}")
    one, other = bench.connect(family, "cubic"), bench.connect(family, "cubic")
    bench.hint(one, FIRST)
    with filled(one):
        alone = acked(one)[0] / 1.5
        with filled(*(bench.connect(family, "cubic", back=True) for _ in range(BACK))):
            # As long as no clock's error may add up, and where ACKs are late, cubic takes as long to get its part.
            settles(lambda: acked(one, seconds=4.0)[0] / 4.0, lambda beside: beside > 0.6 * alone)
            assert rtt_us(one) > FULL_US, "the way back is full"
            with filled(other):
                settles(lambda: part(acked(one, other, seconds=4.0)), lambda got: got < 0.3)  # it yields all the same
    assert algorithm_of(one) == bench.yielding.name


@needs_it
@pytest.mark.bpf
def test_floors_are_shares_of_the_slower_link(bench: Bench) -> None:
    one, other = two_behind_a_fifo(bench, socket.AF_INET)
    peer = ipaddress.ip_address(bench.pair.addr_b)
    bench.hint(one, FIRST)
    bench.hint(other, URGENT)
    bench.yielding.settings["floor"][0, FIRST] = RATE // 2
    settles(lambda: share(one, other), lambda got: got > 0.35)
    bench.yielding.tell_far(peer, RATE / 5, 0.004)
    settles(lambda: share(one, other), lambda got: got < 0.25)
    (path,) = bench.yielding.paths()[1]
    assert (path["far_rate"], path["far_target_us"]) == (RATE // 5, 4000)
    bench.yielding.tell_far(peer, 0.0, 0.0)
    bench.yielding.tell_far(peer, 0.0, 0.0)
    settles(lambda: share(one, other), lambda got: got > 0.35)
