# SPDX-License-Identifier: Apache-2.0
"""When the engine hears the kernel: as soon as that has told something; of very much, with rests for others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.daemon.ticker import Ticker
    from mfsd.datapath.bpf.teller import Teller
    from mfsd.engine.engine import Engine

REST: Final = 3.0
"""So many times as long as it has heard it rests when there is more: others' calls take several rounds of the loop."""


class Ear:
    """On the running event loop."""

    def __init__(self, engine: Engine, ticker: Ticker, teller: Teller | None, clock: Callable[[], float]) -> None:
        """``teller`` None: it hears the answers to searches only."""
        self._engine, self._ticker, self._clock = engine, ticker, clock
        self._fd = -1 if teller is None else teller.fd
        self._loop = asyncio.get_running_loop()
        self._rest: asyncio.TimerHandle | None = None
        self._open = False

    def start(self) -> None:
        """Listen from now on."""
        self._open = True
        self._listen()

    def stop(self) -> None:
        """Hear nothing any more. Idempotent."""
        self._open = False
        if self._rest is not None:
            self._rest.cancel()
        elif self._fd >= 0:
            self._loop.remove_reader(self._fd)

    def hear(self) -> None:
        """The kernel has told of connections, or a search for some is over."""
        if self._rest is not None or not self._open:
            return
        began = self._loop.time()
        self._engine.hear(self._clock())
        self._ticker.poke()
        if self._engine.hearing.more:
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
            self._rest = self._loop.call_later(REST * (self._loop.time() - began), self._go_on)

    def _listen(self) -> None:
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self.hear)

    def _go_on(self) -> None:
        self._rest = None
        self._listen()
        self.hear()
