# SPDX-License-Identifier: Apache-2.0
"""Very many transfers, and what work on them takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.engine.endings import ROOM
from mfsd.engine.settings import LimitsConfig
from support.harness import FakeSocket, Host
from support.work import steps

if TYPE_CHECKING:
    from collections.abc import Callable

MANY = 8 * ROOM
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


def is_one_pass(work: Callable[[], object], over: int = MANY) -> bool:
    """It costs so much for each at most; how long that takes: python -m bench.hostile."""
    return steps(work) < 64 * over
