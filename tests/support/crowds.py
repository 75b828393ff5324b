# SPDX-License-Identifier: Apache-2.0
"""Very many transfers, and what work on them takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mfsd.engine.settings import LimitsConfig
from support.harness import FakeSocket, Host

if TYPE_CHECKING:
    from collections.abc import Callable

MANY = 65_536
FEW = 4096
MORE = LimitsConfig(max_transfers_per_user=1 << 20, max_transfers=1 << 20, max_mb_per_user=60_000)


def crowd(count: int, *, ordered: bool = True) -> tuple[Host, FakeSocket]:
    """A host with so many transfers of one request on one connection."""
    h = Host(limits=MORE)
    sock = h.socket(1)
    h.request("r", 20.0)
    for i in range(count):
        h.transfer(str(i), sock, 1000, ordered=ordered)
    h.tick(0.01)
    return h, sock


def took(work: Callable[[], object]) -> float:
    """Seconds of processor, of which quadratic work on MANY takes minutes."""
    before = time.process_time()
    work()
    return time.process_time() - before
