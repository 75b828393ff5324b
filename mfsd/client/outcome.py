# SPDX-License-Identifier: Apache-2.0
"""What has become of hints, and how a worker is told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.ground.model import Hint

log = logging.getLogger("mfsd.client")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A hint that the daemon did not take, and why (field, problem, fix)."""

    hint: Hint
    message: str


@dataclass(slots=True)
class Stats:
    """Counts since the client was made."""

    connected: bool = False
    queued: int = 0
    """Waiting now."""
    sent: int = 0
    accepted: int = 0
    rejected: int = 0
    dropped: int = 0
    """Gave way to newer ones because the queue (or the list of what is alive) was full."""
    announced_again: int = 0
    """Said to a daemon that had lost them."""
    connects: int = 0


def call_back(
    callback: Callable[[Any], None] | None, argument: object, suppressed: type[BaseException] = Exception
) -> None:
    """A faulty callback must not end our thread, not even by SystemExit; nor raise in a caller's, but for those."""
    if callback is not None:
        try:
            callback(argument)
        except suppressed:
            log.exception("callback of the mfsd client failed")
