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
void acked(__u64 now, __u32 delay, int lone, int held)
{
	p.held += held;
	heard(&p, now, delay, 0, 1, lone, 2000);
}
__u32 queue(void) { return p.delay_us; }
__u32 share(void) { return p.share; }
"""
QUEUE_US: Final = 5000


class Way:
    """One of which nothing is known yet, with a target of 2 ms; an ACK every ms."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        self.now = 10_000_000
        lib.begin(ctypes.c_uint64(self.now))

    def acks(self, ms: int, delay: int, *, lone: bool = False, held: bool = True) -> None:
        for _ in range(ms):
            self.now += 1000
            self._lib.acked(ctypes.c_uint64(self.now), ctypes.c_uint32(delay), int(lone), int(held))

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
    return library(SOURCE, tmp_path_factory.mktemp("path"))


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
