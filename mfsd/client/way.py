# SPDX-License-Identifier: Apache-2.0
"""How a link gets to a daemon, and how often it tries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.ground.model import Hint

BACKOFF_S: Final = (0.05, 5.0)
"""First and longest time between attempts to connect."""
CHANNEL_BACKOFF_S: Final = (0.05, 1.0)
"""The same of gRPC within an attempt at a socket of this host, where one costs next to nothing."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a link gets to a daemon."""

    credentials: Callable[[], grpc.ChannelCredentials] | None = None
    """Asked before each attempt: others than before are shown from then on. None: a plain channel."""
    options: tuple[tuple[str, Any], ...] = ()
    """Of the channel, besides the usual ones."""
    correct: bool = False
    """Times are corrected by what messages take, half of the shortest of the latest round trips."""
    drops: Callable[[Hint, float], bool] | None = None
    """Hints that are not sent any more."""

    def channel(self, target: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        """A new one."""
        first, most = CHANNEL_BACKOFF_S if target.startswith("unix:") else BACKOFF_S
        options = [
            ("grpc.initial_reconnect_backoff_ms", int(first * 1000)),
            ("grpc.min_reconnect_backoff_ms", int(first * 1000)),
            ("grpc.max_reconnect_backoff_ms", int(most * 1000)),
            ("grpc.enable_http_proxy", 0),
            *self.options,
        ]
        if credentials is None:
            return grpc.insecure_channel(target, options)
        return grpc.secure_channel(target, credentials, options)


def pause(away: float) -> float:
    """Longest time until the next attempt, after ``away`` seconds without a daemon: a quarter of them.

    A daemon that takes over from another waits for clients for twice the time that they have been without one
    (mfsd/daemon/predecessor.py). An attempt that finds the socket beside gRPC's before that one is in vain; the next is
    early enough all the same.
    """
    return min(max(away / 4, BACKOFF_S[0]), BACKOFF_S[1])
