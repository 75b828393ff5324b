# SPDX-License-Identifier: Apache-2.0
"""What keeps the event loop waiting inside the interpreter, made short.

Two things do. Whoever computes in another thread (care for the devices, a listing of sockets) keeps the interpreter for
a turn, by default 5 ms, and the loop gives it up at each system call: several times a tick. And a collection of
garbage goes through all objects that there are: tens of milliseconds. Most are modules, which never go; but somebody
who announces tens of thousands of transfers makes as many, and has others wait for each look through them. What Python
does by itself is therefore the younger objects only. The old ones have their turn while there is nothing to schedule,
or when there may be very much garbage among them.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import TYPE_CHECKING, Final

import numpy.ma  # noqa: F401 - 40 ms, which numpy.unique would take when it is first called

if TYPE_CHECKING:
    from collections.abc import Callable

TURN_S: Final = 0.0005
"""A turn of one thread while another one waits."""
NEVER: Final = 1 << 30
LOOK_S: Final = 1.0
QUIET: Final = 10
"""Collections among the younger objects before one of all, while there is nothing to schedule: Python's own number."""
BUSY: Final = 100
"""The same while there is: 700,000 objects more than there were, at most, by Python's other thresholds."""


def keep_turns_short() -> None:
    """For the whole process; call once everything is imported."""
    sys.setswitchinterval(TURN_S)
    gc.collect()
    gc.freeze()  # what is there now is not looked at again
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)


async def collect(idle: Callable[[], bool]) -> None:
    """Collect garbage among the old objects when it is time, until cancelled; ``idle``: nobody would wait for it."""
    while True:
        await asyncio.sleep(LOOK_S)
        if gc.get_count()[2] > (QUIET if idle() else BUSY):
            gc.collect()
