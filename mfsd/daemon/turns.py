# SPDX-License-Identifier: Apache-2.0
"""What keeps the event loop waiting inside the interpreter, made short.

Two things do. Whoever computes in another thread (care for the devices, a listing of sockets) keeps the interpreter for
a turn, by default 5 ms, and the loop gives it up at each system call: several times a tick. And a collection of
garbage goes through all objects that there are, most of which are modules and never go: tens of milliseconds.
"""

from __future__ import annotations

import gc
import sys
from typing import Final

import numpy.ma  # noqa: F401 - 40 ms, which numpy.unique would take when it is first called

TURN_S: Final = 0.0005
"""A turn of one thread while another one waits."""


def keep_turns_short() -> None:
    """For the whole process; call once everything is imported."""
    sys.setswitchinterval(TURN_S)
    gc.collect()
    gc.freeze()  # what is there now is not looked at again
