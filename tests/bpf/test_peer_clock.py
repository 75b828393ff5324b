# SPDX-License-Identifier: Apache-2.0
"""How long ACKs have waited on their way back, by the peer's clock: bpf/yield_clock.h, compiled for this machine."""

from __future__ import annotations

import ctypes
import math
from typing import Final

import pytest
from support.native import library

SOURCE: Final = """
#include "yield_clock.h"
__u32 acked(struct mfsd_peer_clock *c, __u32 period, __u32 now, __u32 behind, __u32 delay, __u32 tick)
{
	return waited(c, period, now, behind, delay, tick);
}
"""
TICK: Final = 1000
NEVER: Final = 2**32 - 1
PERIOD: Final = 30_000_000
"""Microseconds after which the base is the least of what came since: BASE_US."""


class Clock(ctypes.Structure):
    """struct mfsd_peer_clock."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("behind_us", "next_us", "since", "raised_at"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The header as a library."""
    out = library(SOURCE, tmp_path_factory.mktemp("clock"))
    out.acked.restype = ctypes.c_uint32
    return out


class Peer:
    """One whose clock is ``apart`` from ours, drifts by ``drift`` and ticks every ``tick`` us of its own."""

    def __init__(self, lib: ctypes.CDLL, apart: int = 0, drift: float = 0.0, tick: float = TICK) -> None:
        self._lib, self._apart, self._drift, self._tick = lib, apart, drift, tick
        self._clock = Clock()
        self.now = 2**32 - 5_000_000  # it wraps meanwhile

    def acks(self, seconds: float, back: int = 0, there: int = 0, step: int = 100) -> list[int]:
        """What each ACK of so many seconds is said to have waited, with these queues on the way back and there."""
        out = []
        for _ in range(int(seconds * 1e6) // step):
            self.now += step
            sent = (self.now - back) * (1 + self._drift) + self._apart
            behind = self.now - math.floor(sent / self._tick) * TICK
            args = (self.now // PERIOD * PERIOD, self.now, behind, back + there, TICK)
            out.append(self._lib.acked(ctypes.byref(self._clock), *(ctypes.c_uint32(a % 2**32) for a in args)))
        return out


def test_what_acks_have_waited_is_known_to_a_tick_and_never_too_much(compiled: ctypes.CDLL) -> None:
    peer = Peer(compiled, apart=-123_456_789)
    assert set(peer.acks(0.5)) == {0}
    assert set(peer.acks(0.5, there=50_000)) == {0}, "a queue on the way there is none of it"
    for back in (2_000, 20_000, 50_000):
        found = peer.acks(1.0, back=back, there=3_000)
        assert max(found) <= back
        assert min(found) >= back - TICK
        assert max(found) > back - TICK // 5, "once in a tick it is known better"


@pytest.mark.parametrize("drift", [-100e-6, 100e-6])
def test_a_clock_that_drifts_is_no_queue(compiled: ctypes.CDLL, drift: float) -> None:
    peer = Peer(compiled, drift=drift)
    for _ in range(4):
        assert max(peer.acks(20.0, there=100, step=500)) <= 100, "what the round trip has room for"
    assert max(peer.acks(0.5, back=10_000)) <= 10_000 + TICK // 5


@pytest.mark.parametrize("drift", [-100e-6, 100e-6])
def test_while_the_way_back_is_never_free_it_is_off_by_no_more_than_the_drift(
    compiled: ctypes.CDLL, drift: float
) -> None:
    peer = Peer(compiled, drift=drift)
    peer.acks(1.0)
    start = peer.now
    found = peer.acks(10.0, back=20_000, there=30_000)
    off = abs(drift) * (peer.now - start)
    assert 20_000 - TICK - off <= min(found)
    assert max(found) <= 20_000 + off


def test_what_has_been_on_the_way_all_the_time_is_forgotten_like_the_base(compiled: ctypes.CDLL) -> None:
    peer = Peer(compiled)
    peer.acks(1.0)
    peer.acks(3 * PERIOD / 1e6, back=20_000, step=1000)
    assert set(peer.acks(1.0, back=20_000)) == {0}
    assert min(peer.acks(1.0, back=25_000)) >= 5_000 - TICK


def test_long_silence_is_forgotten(compiled: ctypes.CDLL) -> None:
    peer = Peer(compiled, drift=-100e-6)
    peer.acks(1.0)
    peer.now += 3600 * 10**6
    assert peer.acks(0.01, back=50_000, there=50_000)[0] == 0, "nothing is known of a clock after an hour"


@pytest.mark.parametrize("tick", [10_000.0, 100.0])
def test_clocks_with_other_ticks_are_not_gone_by(compiled: ctypes.CDLL, tick: float) -> None:
    """A count of 10 ms, say, read as one of 1 ms, runs away; one that is too quick is never late."""
    found = Peer(compiled, tick=tick).acks(1.0, there=5_000)
    assert NEVER in found if tick > TICK else set(found) == {0}
