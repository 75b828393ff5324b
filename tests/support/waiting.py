# SPDX-License-Identifier: Apache-2.0
"""Waiting for what must happen: long enough for any machine, since nothing is measured with it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
WAIT_FACTOR: Final = float(os.environ.get("MFSD_WAIT_FACTOR", "1"))
"""How much slower than usual this machine is taken to be: emulated ones are."""
WAIT_S: Final = 20.0 * WAIT_FACTOR
POLL_S: Final = 0.005 if WAIT_FACTOR == 1 else 0.1
"""Between two looks. A look at a daemon is a call, which an emulated processor takes tens of milliseconds for."""


def wait_for(condition: Callable[[], T | None], what: str = "what must happen", timeout: float = WAIT_S) -> T:
    """Poll until the condition is true; returns its value."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(POLL_S)
    return value
