# SPDX-License-Identifier: Apache-2.0
"""Which processes descend from which, safe against reused pids and stepped clocks.

A process is its pid and its start time in seconds since boot (field 22 of /proc/<pid>/stat, proc(5)). psutil's
``create_time`` adds the wall clock's idea of the boot time to the same field, so that a step of the clock would make
every client look like another process.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from mfsd.host.forks import Forks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_DEAD_STATES: Final = "ZXx"
_LOOK_AGAIN_S: Final = 1.0
"""How often all processes are asked what they are called in namespaces of their own: some 20 us each."""


class ProcessGoneError(LookupError):
    """There is no such process (any more) in the daemon's pid namespace."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"there is no process {pid}")
        self.pid = pid


def _stat(pid: int) -> tuple[int, float]:
    """(parent, seconds since boot at its start) of a live process. Raises ProcessGoneError, also for a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat[stat.rindex(")") + 2 :].split()  # the name may hold spaces and parentheses
        state, parent, started = fields[0], int(fields[1]), int(fields[19])
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):  # one that is ending may read as nothing
        raise ProcessGoneError(pid) from None
    if state in _DEAD_STATES:
        raise ProcessGoneError(pid)
    return parent, started / _TICKS


def start_time(pid: int) -> float:
    """Seconds since boot at which a live process started. Raises ProcessGoneError, also for a zombie."""
    return _stat(pid)[1]


def alive(pid: int, started: float) -> bool:
    """True while the process that had this pid and `start_time` lives; a zombie doesn't."""
    try:
        return start_time(pid) == started
    except ProcessGoneError:
        return False


class Numbers:
    """What processes are called in pid namespaces of their own, as in containers: 1, often, where we count on."""

    def __init__(self) -> None:
        self._looked = -math.inf
        self._known: dict[int, tuple[int, ...]] = {}
        """By pid: what those are called that have several numbers, from our namespace down to their own."""

    def ours(self, number: int, teller: int) -> int:
        """The process that another one calls by this number; the number itself where nobody there has it."""
        own = _numbers(teller)
        if len(own) < 2 or number == own[-1]:
            return teller if own and number == own[-1] else number
        if time.monotonic() > self._looked + _LOOK_AGAIN_S:
            self._known = {pid: several for pid in psutil.pids() if len(several := _numbers(pid)) > 1}
            self._looked = time.monotonic()
        depth = len(own) - 1
        called = [pid for pid, several in self._known.items() if several[depth : depth + 1] == (number,)]
        first = self._first(teller, own, depth)
        return next((pid for pid in called if first and self._first(pid, _numbers(pid), depth) == first), number)

    @staticmethod
    def _first(pid: int, numbers: tuple[int, ...], depth: int) -> int:
        """The first process of its namespace, which all others descend from; 0: it has come in from outside."""
        while len(numbers) > depth and numbers[depth] != 1:
            try:
                pid = _stat(pid)[0]
            except ProcessGoneError:
                return 0
            numbers = _numbers(pid)
        return pid if len(numbers) > depth else 0


def _numbers(pid: int) -> tuple[int, ...]:
    """What a process is called, from our pid namespace down to its own; empty: nobody can tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = (line for line in status.splitlines() if line.startswith("NSpid:"))
    return tuple(map(int, next(found, "").split()[1:]))


class Families:
    """Descendants of some processes: forked, spawned, and those that have lost the process between."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, float]] = {}
        """Descendants' start times by ancestor."""
        self.living: Mapping[int, float] = {}
        """All processes, at the last look, and their start times."""
        self._forks = Forks()
        self._born: dict[int, int] = {}
        """Parent by child of what has been forked lately."""

    def close(self) -> None:
        """Idempotent."""
        self._forks.close()

    def look(self, ancestors: Iterable[int]) -> dict[int, frozenset[int]]:
        """Descendants by ancestor, those of living ones only. One pass over all processes, some 10 us each."""
        ancestors = frozenset(ancestors)
        if not ancestors:
            self._known, self.living = {}, {}
            self._forks.close()
            return {}
        self._forks.open()
        # What was forked between the last reading and the last pass over /proc is in this reading.
        earlier, self._born = self._born, self._forks.read()
        born = earlier | self._born
        living: dict[int, float] = {}
        children: dict[int, list[int]] = {}
        for pid in psutil.pids():
            try:
                parent, living[pid] = _stat(pid)
            except ProcessGoneError:
                continue
            children.setdefault(parent, []).append(pid)
        self.living = living
        before, self._known = self._known, {}
        for ancestor in ancestors:
            # A child whose parent has ended belongs to init now, but it is still one of the family.
            found = {pid: t for pid, t in before.get(ancestor, {}).items() if living.get(pid) == t}
            # So is one that was forked by somebody who ended before anybody looked.
            kin = {ancestor, *before.get(ancestor, ())}
            found |= {pid: living[pid] for pid in born if pid in living and _leads_to(pid, born, kin)}
            todo = [ancestor, *found] if ancestor in living else list(found)
            while todo:
                for pid in children.get(todo.pop(), ()):
                    if pid not in found:
                        found[pid] = living[pid]
                        todo.append(pid)
            self._known[ancestor] = found
        return {ancestor: frozenset(found) for ancestor, found in self._known.items()}


def _leads_to(pid: int, born: Mapping[int, int], kin: Collection[int]) -> bool:
    """Whether one of a family has forked a process, or the one that has forked it, and so on."""
    seen: set[int] = set()
    while pid in born and pid not in seen:
        seen.add(pid)
        pid = born[pid]
        if pid in kin:
            return True
    return False
