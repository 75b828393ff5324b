# SPDX-License-Identifier: Apache-2.0
"""Where a stream stands, read from packets that have no socket at hand (tests/bpf/test_teller.py: from the socket)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.frames import ACK, FIN, RST, SYN, TCP, TYPE_IP4, TYPE_IP6, UDP, eth, ip4, ip6, key4, key6, tcp, udp

if TYPE_CHECKING:
    from support.bpf_rig import Rig

pytestmark = pytest.mark.bpf

FIRST = 2**32 - 2000
"""Sequence numbers wrap early in every test."""


def sent(rig: Rig, payload: int, at: int, *, flags: int = ACK, options: int = 0, v6: bool = False) -> int:
    """What the slot says after a segment whose payload begins ``at`` bytes after FIRST."""
    segment = tcp(bytes(payload), flags=flags, options=bytes(options), seq=FIRST + at)
    rig.run(eth(TYPE_IP6, ip6(TCP, segment)) if v6 else eth(TYPE_IP4, ip4(TCP, segment)))
    return int(rig.classifier.slots["sent"][7])


@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
def test_payload_counts_once_however_often_it_is_sent(rig: Rig, *, v6: bool) -> None:
    rig.add_tuple(key6() if v6 else key4())
    assert sent(rig, 1000, 0, v6=v6) == 1000
    assert sent(rig, 1000, 1000, options=12, v6=v6) == 2000
    assert sent(rig, 1000, 1000, options=12, v6=v6) == 2000, "a retransmission"
    assert sent(rig, 300, 100, v6=v6) == 2000, "an old one, cut otherwise"
    assert sent(rig, 1000, 1500, v6=v6) == 2500, "half of it is new"
    assert sent(rig, 0, 2500, v6=v6) == 2500, "a pure ACK"
    assert sent(rig, 500, 2500, flags=FIN | ACK, v6=v6) == 3000
    assert sent(rig, 0, 3001, flags=RST, v6=v6) <= 3001


def test_a_stream_that_begins_under_way_begins_at_nought(rig: Rig) -> None:
    rig.add_tuple(key4())
    assert sent(rig, 0, 123_456) == 0
    assert sent(rig, 10, 123_456) == 10


def test_a_syn_is_no_payload(rig: Rig) -> None:
    rig.add_tuple(key4())
    assert sent(rig, 0, 0, flags=SYN) == 0
    assert sent(rig, 100, 1) == 100


def test_padding_of_the_frame_is_no_payload(rig: Rig) -> None:
    rig.add_tuple(key4())
    rig.run(eth(TYPE_IP4, ip4(TCP, tcp(b"x"))).ljust(60, b"\0"))
    assert int(rig.classifier.slots["sent"][7]) == 1


@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
def test_datagrams_add_up(rig: Rig, *, v6: bool) -> None:
    rig.add_tuple(key6(UDP) if v6 else key4(UDP))
    for n in (1000, 0, 24):
        rig.run(eth(TYPE_IP6, ip6(UDP, udp(bytes(n)))) if v6 else eth(TYPE_IP4, ip4(UDP, udp(bytes(n)))))
    assert int(rig.classifier.slots["sent"][7]) == 1024


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 1400), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
    repeats=st.integers(0, 8),
)
def test_in_whatever_order_and_however_often(rig: Rig, lengths: list[int], order: object, repeats: int) -> None:
    """The furthest byte that has passed, once all have."""
    rig.reset()
    rig.add_tuple(key4())
    segments, at = [], 0
    for n in lengths:
        segments.append((n, at))
        at += n
    first, rest = segments[0], segments[1:]
    again = [order.choice(segments) for _ in range(repeats)]  # type: ignore[attr-defined]
    rest += again
    order.shuffle(rest)  # type: ignore[attr-defined]
    for n, where in [first, *rest]:
        sent(rig, n, where)
    assert int(rig.classifier.slots["sent"][7]) == sum(lengths)
