# SPDX-License-Identifier: Apache-2.0
"""How a link gets to a daemon, and how often it tries."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.ground.model import Hint

for _later in ("grpc._channel", "grpc.experimental"):
    # What gRPC imports when the first channel is made: by then a worker that has given up its rights may not be able to
    # read its own environment any more.
    with contextlib.suppress(ImportError):
        import_module(_later)

BACKOFF_S: Final = (0.05, 5.0)
"""First and longest time between attempts to connect."""
CHANNEL_BACKOFF_S: Final = (0.05, 1.0)
"""The same of gRPC within an attempt at a socket of this host, where one costs next to nothing."""

log = logging.getLogger("mfsd.client")


def where(target: str | os.PathLike[str]) -> str:
    """A target as gRPC takes it. Raises TypeError; what gRPC will look for in vain is warned of."""
    if not isinstance(target, str | os.PathLike):
        raise TypeError(f"target: {target!r} is neither a path nor an address; give the path of the daemon's socket")
    text = os.fspath(target)
    if text.startswith("/"):
        return f"unix:{text}"
    if text and not text.startswith("unix") and (":" not in text or "://" in text.removeprefix("dns://")):
        log.warning(
            "mfsd: target %r is no absolute path and no address with a port; give one, or no hints will arrive", text
        )
    return text


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


@dataclass(slots=True, eq=False)
class Held:
    """One channel for all attempts, since it waits longer each time for who is slow; a new one for new credentials."""

    way: Way
    target: str
    _channel: grpc.Channel | None = None
    _shown: grpc.ChannelCredentials | None = None

    def channel(self) -> grpc.Channel:
        """The channel to use now."""
        credentials = None if self.way.credentials is None else self.way.credentials()
        if self._channel is not None and credentials is not self._shown:
            self.close()
        if self._channel is None:
            self._channel, self._shown = self.way.channel(self.target, credentials), credentials
        return self._channel

    def close(self) -> None:
        """Idempotent."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


def pause(away: float) -> float:
    """Longest time until the next attempt, after ``away`` seconds without a daemon: a quarter of them.

    A daemon that takes over from another waits for clients for twice the time that they have been without one
    (mfsd/daemon/predecessor.py). An attempt that finds the socket beside gRPC's before that one is in vain; the next is
    early enough all the same.
    """
    return min(max(away / 4, BACKOFF_S[0]), BACKOFF_S[1])
