# SPDX-License-Identifier: Apache-2.0
"""What connections to a peer learn of their way from what its ACKs say: bpf/yield.h, compiled for this machine."""

from __future__ import annotations

import ctypes
from typing import Final

import pytest
from support.native import library

SOURCE: Final = """
#include "yield.h"
static struct mfsd_path p;
void begin(__u64 now)
{
	p = (struct mfsd_path){ .share = UNIT, .part = UNIT, .least_us = NEVER, .slice_at = now, .empty_at = now,
				.paired_at = now };
}
void acked(__u64 now, __u32 delay, int lone, int held, __u32 back)
{
	p.held += held;
	heard(&p, now, delay, back, 1, lone, 2000);
}
__u32 queue(void) { return p.delay_us; }
__u32 share(void) { return p.share; }
int room(void) { return p.room_since > 0; }
void known(__u32 share, __u32 back) { p.share = share, p.base_us = 100, p.target_us = 900, p.back_us = back; }
__u64 window(__u64 now, __u64 rate, __u32 mss) { return window_of(&p, now, rate, mss); }
"""
QUEUE_US: Final = 5000
UNIT: Final = 1024
BACK_MS: Final = 50


class Way:
    """One of which nothing is known yet, with a target of 2 ms; an ACK every ms."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        self.now = 10_000_000
        lib.begin(ctypes.c_uint64(self.now))

    def acks(self, ms: int, delay: int, *, lone: bool = False, held: bool = True, back: int = 0) -> int:
        """For how many of so many milliseconds room was made."""
        made = 0
        for _ in range(ms):
            self.now += 1000
            self._lib.acked(
                ctypes.c_uint64(self.now), ctypes.c_uint32(delay), int(lone), int(held), ctypes.c_uint32(back)
            )
            made += self._lib.room()
        return made

    def window(self, share: int, back: int, rate: int) -> int:
        """Packets of 1250 bytes that one may have in flight whose share in a round trip of 1 ms is so many."""
        self._lib.known(ctypes.c_uint32(share * UNIT), ctypes.c_uint32(back))
        found: int = self._lib.window(ctypes.c_uint64(self.now), ctypes.c_uint64(rate), ctypes.c_uint32(1250))
        return found

    @property
    def queue(self) -> int:
        """Microseconds."""
        return int(self._lib.queue())

    @property
    def share(self) -> int:
        return int(self._lib.share())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The header as a library."""
    built = library(SOURCE, tmp_path_factory.mktemp("path"))
    built.window.restype = ctypes.c_uint64
    return built


def test_acks_of_one_packet_count_where_there_are_no_others(compiled: ctypes.CDLL) -> None:
    way = Way(compiled)
    way.acks(40, QUEUE_US, lone=True)
    assert way.queue == 0, "the receiver may have kept them to itself"
    way.acks(40, QUEUE_US, lone=True)
    assert way.queue == QUEUE_US, "all of them, for longer than any receiver does"
    way.acks(8, 1000)
    way.acks(40, QUEUE_US, lone=True)
    assert way.queue == 1000


def test_only_who_has_more_to_send_learns_that_it_might(compiled: ctypes.CDLL) -> None:
    way = Way(compiled)
    began = way.share
    way.acks(200, 0, held=False)
    assert way.share == began
    way.acks(200, 0)
    assert way.share > 2 * began


def test_room_is_made_for_long_enough_to_see_it_and_no_longer(compiled: ctypes.CDLL) -> None:
    """The queue is never gone otherwise, so it is made every five seconds."""
    way = Way(compiled)
    alone = way.acks(5500, 1000)
    assert 5 < alone < 100
    way = Way(compiled)
    beside = way.acks(5500, 1000, back=BACK_MS * 1000)
    assert 2 * BACK_MS < beside < 2 * BACK_MS + 100, "until what is under way has come, and what is sent then"


def test_while_acks_are_late_no_more_is_in_flight_than_the_link_carries_meanwhile(compiled: ctypes.CDLL) -> None:
    way = Way(compiled)
    packets = 10  # per millisecond, of the link
    rate = packets * 1_250_000
    assert way.window(packets // 2, 0, rate) == packets // 2
    assert way.window(packets // 2, BACK_MS * 1000, rate) == pytest.approx(packets // 2 * (1 + BACK_MS), abs=1)
    assert way.window(2 * packets, BACK_MS * 1000, rate) == 2 * packets + packets * BACK_MS, (
        "its share seems twice the link"
    )
