# SPDX-License-Identifier: Apache-2.0
"""Which processes descend from which, safe against reused pids and stepped clocks.

A process is its pid and its start time in seconds since boot (field 22 of /proc/<pid>/stat, proc(5)). psutil's
``create_time`` adds the wall clock's idea of the boot time to the same field, so that a step of the clock would make
every client look like another process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_DEAD_STATES: Final = "ZXx"


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
