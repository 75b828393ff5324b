# SPDX-License-Identifier: Apache-2.0
"""What is still at work of the daemon before this one, so that a restart is not felt on the wire.

A classifier lives on in the kernel while somebody holds its link (or, with clsact, its filter is there), and obeys its
table while somebody gives the sign of life. The service manager holds the descriptors over a restart or a crash
(``supervisor.py``); this module gives the sign of life from the first millisecond of a process on, long before the
daemon's modules are imported: so it imports next to nothing itself, and knows no layout but the first two words
of ``struct mfsd_host`` (bpf/mfsd.h), which every version keeps.

Meanwhile the clients announce again to the new daemon what is alive, and its table fills without being obeyed.
``Devices`` then puts its own classifiers into the old links, in one step for each device.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

from mfsd.daemon.supervisor import handed_over
from mfsd.host import clock

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HOST: Final = "mfsd_host"
"""Name of the descriptor of the map of the same name; links are named ``link_name(ifindex)``."""
_WORDS: Final = struct.Struct("=QQ")
"""heartbeat_ns, timeout_ns."""
_BEAT_S: Final = 0.02
HAND_OVER_S: Final = 10.0
"""For so long the classifiers of a daemon that hands over wait for the next one's sign of life: systemd has to notice
the end of the one and start the other, and Python with it. After a crash they wait for daemon.heartbeat_timeout_ms."""
LIMIT_S: Final = 20.0
"""A daemon that takes longer to start lets go: its predecessor's levels are old by then."""
SETTLE_S: Final = (0.5, 5.0)
"""Least and longest time for clients to come back. Between two attempts they let a quarter of the time pass that they
have been without a daemon (mfsd/client/way.py); one that finds the socket that says who they are before gRPC's is in
vain. So long before twice the time that the daemon was away all have come."""


def link_name(ifindex: int) -> str:
    """Of the descriptor of a device's TCX link."""
    return f"tcx-{ifindex}"


class Predecessor:
    """Keeps the classifiers of the daemon before at work until :meth:`retire`."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        self.names = tuple(descriptors)
        """Of the descriptors that the service manager holds for it."""
        self._links = {name: fd for name, fd in descriptors.items() if name != HOST}
        self._pages: mmap.mmap | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._born = time.monotonic()
        self.away_s = 0.0
        """Between its last sign of life and our first."""
        host = descriptors.get(HOST, -1)
        if host >= 0:
            with contextlib.suppress(OSError, ValueError):  # it may be anything
                self._pages = mmap.mmap(host, mmap.PAGESIZE)
            os.close(host)
        if self._pages is not None and self._alive(self._pages):
            self._thread = threading.Thread(target=self._beat, args=(self._pages,), daemon=True)
            self._thread.start()
        else:
            self.retire()

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> Predecessor:
        """Of this process."""
        return cls(handed_over(environment, os.getpid()))

    @property
    def at_work(self) -> bool:
        """Its classifiers obey what it decided last."""
        return self._thread is not None and not self._over.is_set()

    @property
    def settle_s(self) -> float:
        """How long clients should get to announce everything again, from when the API is open."""
        least, most = SETTLE_S
        return min(least + 2 * (self.away_s + time.monotonic() - self._born), most)

    def link(self, ifindex: int) -> int:
        """The TCX link of a device, which is the caller's from now on; -1 if there is none."""
        return self._links.pop(link_name(ifindex), -1)

    def others(self, ours: Iterable[int]) -> list[int]:
        """The TCX links of all devices but these (by index), which are the caller's from now on."""
        names = {link_name(ifindex) for ifindex in ours}
        return [self._links.pop(name) for name in [n for n in self._links if n not in names]]

    def retire(self, *, lapse: bool = False) -> None:
        """No more signs of life; links that nobody took are closed, which detaches their classifiers. Idempotent.

        ``lapse``: connections that run its code (bpf/yield.bpf.c) find that out at once, not after the timeout.
        """
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._pages is not None:
            if lapse:
                _WORDS.pack_into(self._pages, 0, 0, 0)
            self._pages.close()
            self._pages = None
        for fd in self._links.values():
            os.close(fd)
        self._links.clear()

    def _alive(self, pages: mmap.mmap) -> bool:
        """Whether it is obeyed still. What has lapsed stays so: traffic has been default traffic since."""
        beat, timeout = _WORDS.unpack_from(pages)
        away = clock.monotonic_ns() - beat
        if beat == 0 or away > timeout:
            return False
        self.away_s = max(away, 0) / 1e9
        return True

    def _beat(self, pages: mmap.mmap) -> None:
        with memoryview(pages) as raw, raw.cast("Q") as words:
            while time.monotonic() - self._born < LIMIT_S:
                words[0] = clock.monotonic_ns()  # one store: the kernel never sees half of it
                if self._over.wait(_BEAT_S):
                    return
        self._over.set()
