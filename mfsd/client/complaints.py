# SPDX-License-Identifier: Apache-2.0
"""What the client logs of its daemon: little, because it is a guest in somebody else's log."""

from __future__ import annotations

import logging
import time
from typing import Final

WARN_S: Final = 10.0
"""Least time between two warnings about hints that are refused."""
CAUSES: Final = 64
"""Things warned of once that are remembered."""

log = logging.getLogger("mfsd.client")


class Complaints:
    """Of one link."""

    def __init__(self) -> None:
        self._next = 0.0
        self._said: set[str] = set()
        """What has been warned of since a daemon was reached last."""

    def seldom(self, text: str, *args: object) -> None:
        """Say it, unless something was said lately."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + WARN_S
            log.warning(text, *args)

    def once(self, cause: str, text: str, *args: object) -> None:
        """Say it once, and again after a daemon has been reached meanwhile."""
        if cause not in self._said:
            if len(self._said) < CAUSES:
                self._said.add(cause)
            log.warning(text, *args)

    def forget(self) -> None:
        """A daemon has been reached."""
        self._said.clear()
