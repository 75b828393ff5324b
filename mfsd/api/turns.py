# SPDX-License-Identifier: Apache-2.0
"""Turns on the event loop: whoever has much to say gives way to others."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from mfsd.api.answers import SETTLE_S

TURN_S: Final = 0.001
"""A batch is applied for so long before others have their turn."""
REST: Final = 3.0
"""So many times as long it waits then, if there are others: their calls take several rounds of the loop."""


class Turn:
    """Time that a batch may take at a stretch."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    @property
    def over(self) -> bool:
        """It has taken that long."""
        return time.perf_counter() - self._since > TURN_S

    async def give(self, *, contended: bool) -> None:
        """Let others have theirs."""
        took = time.perf_counter() - self._since
        await asyncio.sleep(min(REST * took, SETTLE_S) if contended else 0)
        self._since = time.perf_counter()
