# SPDX-License-Identifier: Apache-2.0
"""Exact sleeps in an event loop: for emulated GPUs, whose kernels end on time."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import time
from typing import Final

CLOCK_MONOTONIC: Final = 1
"""include/uapi/linux/time.h"""
TFD_TIMER_ABSTIME: Final = 1
"""include/uapi/linux/timerfd.h"""
_ITIMERSPEC: Final = struct.Struct("=4q")
"""Interval and value, seconds and nanoseconds each, where time_t and long have 64 bits."""
_libc = ctypes.CDLL(None, use_errno=True)


class Alarm:
    """A timerfd (timerfd_create(2)), for one sleeper at a time. To be made inside a running event loop.

    The loop's own timers are rounded up to whole milliseconds, as epoll_wait's are.
    """

    def __init__(self) -> None:
        self._fd = _libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._rings)
        self._rung: asyncio.Future[None] | None = None

    def _rings(self) -> None:
        os.read(self._fd, 8)
        if self._rung is not None and not self._rung.done():
            self._rung.set_result(None)

    async def sleep(self, seconds: float) -> float:
        """Sleep; returns the seconds by which it took longer."""
        until = time.monotonic() + max(seconds, 1e-9)  # 0 would disarm it
        whole, ns = divmod(int(until * 1e9), 1_000_000_000)
        if _libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, _ITIMERSPEC.pack(0, 0, whole, ns), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        self._rung = self._loop.create_future()
        await self._rung
        return time.monotonic() - until

    def close(self) -> None:
        """Nobody may be sleeping."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
