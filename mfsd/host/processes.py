# SPDX-License-Identifier: Apache-2.0
"""Whether the processes behind hints still live, safe against reused pids and stepped clocks.

A process is its pid and its start time in seconds since boot (field 22 of /proc/<pid>/stat, proc(5)). psutil's
``create_time`` adds the wall clock's idea of the boot time to the same field, so that a step of the clock would make
every client look like another process.
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_DEAD_STATES: Final = "ZXx"
_POLL_S: Final = 1.0
_NO_PIDFD: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EINVAL, errno.ENOENT})
"""Reasons to poll instead: kernel < 5.3, a seccomp filter, no descriptors left; EINVAL, ENOENT: a thread's id."""


class ProcessGoneError(LookupError):
    """There is no such process (any more) in the daemon's pid namespace."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"there is no process {pid}")
        self.pid = pid


def start_time(pid: int) -> float:
    """Seconds since boot at which a live process started. Raises ProcessGoneError, also for a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGoneError(pid) from None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name may hold spaces and parentheses
    if fields[0] in _DEAD_STATES:
        raise ProcessGoneError(pid)
    return int(fields[19]) / _TICKS


def alive(pid: int, started: float) -> bool:
    """True while the process that had this pid and `start_time` lives; a zombie doesn't."""
    try:
        return start_time(pid) == started
    except ProcessGoneError:
        return False


class Families:
    """Descendants of some processes: forked, spawned, and those that have lost the process between."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, float]] = {}
        """Descendants' start times by ancestor."""

    def look(self, ancestors: Iterable[int]) -> dict[int, frozenset[int]]:
        """Descendants by ancestor, those of living ones only. One pass over all processes, some 10 us each."""
        parents: dict[int, int] = {p.pid: p.info["ppid"] for p in psutil.process_iter(["ppid"])}
        children: dict[int, list[int]] = {}
        for pid, parent in parents.items():
            children.setdefault(parent, []).append(pid)
        before, self._known = self._known, {}
        for ancestor in ancestors:
            # A child whose parent has ended belongs to init now, but it is still one of the family.
            found = {pid: t for pid, t in before.get(ancestor, {}).items() if pid in parents and alive(pid, t)}
            todo = [ancestor, *found] if ancestor in parents else list(found)
            while todo:
                for pid in children.get(todo.pop(), ()):
                    if pid not in found:
                        try:
                            found[pid] = start_time(pid)
                        except ProcessGoneError:
                            continue
                        todo.append(pid)
            self._known[ancestor] = found
        return {ancestor: frozenset(found) for ancestor, found in self._known.items()}


@dataclass(slots=True)
class _Watched:
    started: float
    pidfd: int | None
    callbacks: dict[int, Callable[[], None]] = field(default_factory=dict)


class ProcessWatch:
    """Calls back when processes end. One descriptor per process, however many watch it; for one event loop only.

    Where there is no pidfd for a process it is polled every second. Use it inside the running loop, and `close` it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self._watched: dict[int, _Watched] = {}
        self._next = 0
        self._poll: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Processes watched."""
        return len(self._watched)

    def add(self, pid: int, callback: Callable[[], None]) -> tuple[int, int]:
        """Have ``callback()`` called once, from the loop, when the process ends; returns a handle for `remove`.

        Raises ProcessGoneError if it has ended already.
        """
        started = start_time(pid)
        watched = self._watched.get(pid)
        if watched is not None and watched.started != started:  # reused before the loop could see the end
            self._end(pid)
            watched = None
        if watched is None:
            watched = self._open(pid, started)
        self._next += 1
        watched.callbacks[self._next] = callback
        return pid, self._next

    def remove(self, handle: tuple[int, int]) -> None:
        """Don't call back any more. Unknown and ended handles are ignored."""
        pid, number = handle
        watched = self._watched.get(pid)
        if watched is None or watched.callbacks.pop(number, None) is None or watched.callbacks:
            return
        self._forget(pid)

    def close(self) -> None:
        """Forget everything and give the descriptors back. Idempotent."""
        for pid in list(self._watched):
            self._forget(pid)

    def _open(self, pid: int, started: float) -> _Watched:
        pidfd: int | None
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ProcessGoneError(pid) from None
        except OSError as e:
            if e.errno not in _NO_PIDFD:
                raise
            pidfd = None
        watched = _Watched(started, pidfd)
        if pidfd is None:
            self._watched[pid] = watched
            self._schedule()
            return watched
        try:
            same = alive(pid, started)
            if same:
                self._loop.add_reader(pidfd, self._end, pid)
                self._watched[pid] = watched
        except BaseException:
            os.close(pidfd)
            raise
        if not same:  # the pid was reused between the two calls
            os.close(pidfd)
            raise ProcessGoneError(pid)
        return watched

    def _forget(self, pid: int) -> _Watched:
        watched = self._watched.pop(pid)
        if watched.pidfd is not None:
            self._loop.remove_reader(watched.pidfd)
            os.close(watched.pidfd)
        elif self._poll is not None and all(w.pidfd is not None for w in self._watched.values()):
            self._poll.cancel()
            self._poll = None
        return watched

    def _end(self, pid: int) -> None:
        for callback in self._forget(pid).callbacks.values():
            # Not called directly: one that raises must not keep the others from being called.
            self._loop.call_soon(callback)

    def _schedule(self) -> None:
        if self._poll is None:
            self._poll = self._loop.call_later(_POLL_S, self._look)

    def _look(self) -> None:
        self._poll = None
        for pid, watched in list(self._watched.items()):
            if watched.pidfd is None and not alive(pid, watched.started):
                self._end(pid)
        if any(w.pidfd is None for w in self._watched.values()):
            self._schedule()
