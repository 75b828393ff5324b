# SPDX-License-Identifier: Apache-2.0
"""Which processes, threads and cgroups of this host are meant by descriptions (model.Maker).

The kernel can compare numbers only: a process, a thread, a cgroup. So descriptions are looked up again and again, and
what they mean now is what is compared. Everything comes from /proc and from the cgroup v2 hierarchy, in the thread of
the caller: some 10 us per process, and as much per thread of those whose threads matter.
"""

from __future__ import annotations

import fnmatch
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mfsd.host.processes import Families

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from mfsd.ground.model import Maker

SETTLED_S: Final = 5.0
"""A thread's name is read again until it is so old: runtimes name their threads after they have started them."""


@dataclass(frozen=True, slots=True)
class Makers:
    """What a description means now. None: it says nothing of that kind."""

    pids: frozenset[int] | None = None
    tids: frozenset[int] | None = None
    cgroups: frozenset[int] | None = None
    """Ids."""


@dataclass(slots=True)
class _Thread:
    name: str
    since: float


@dataclass(frozen=True, slots=True)
class Met:
    """Who was there when descriptions were looked up last. None: that did not matter."""

    pids: Collection[int] | None = None
    tids: Collection[tuple[int, int]] | None = None
    """With their processes: threads whose names are not read again."""
    cgroups: Collection[int] | None = None

    def stranger(self, pid: int, tid: int, cgroup: int) -> bool:
        """A thread may be meant, and nobody has looked."""
        return (
            (self.pids is not None and pid not in self.pids)
            or (self.tids is not None and (pid, tid) not in self.tids)
            or (self.cgroups is not None and cgroup not in self.cgroups)
        )


@dataclass(slots=True)
class Census:
    """Looks descriptions up. For one thread at a time; ``cgroups`` is the root of cgroup v2, None: there is none."""

    cgroups: Path | None = None
    clock: Callable[[], float] = time.monotonic
    met: Met = field(default_factory=Met)
    _families: Families = field(default_factory=Families)
    _threads: dict[tuple[int, int], _Thread] = field(default_factory=dict)
    """By process and thread."""

    def close(self) -> None:
        """Idempotent."""
        self._families.close()

    def look(self, makers: Collection[Maker]) -> dict[Maker, Makers]:
        """What each description means now."""
        groups, all_groups = self._groups({m.cgroup for m in makers if m.cgroup})
        families = self._families.look({m.pid for m in makers if m.pid})
        every = _processes() if any(m.executable or m.thread for m in makers) else {}
        before, self._threads = self._threads, {}
        found = {m: self._one(m, groups.get(m.cgroup, {}), families, every, before) for m in makers}
        self.met = Met(
            {*every, *self._families.living} if any(m.pid or m.executable for m in makers) else None,
            self._settled() if any(m.thread for m in makers) else None,
            all_groups if self.cgroups is not None and any(m.cgroup for m in makers) else None,
        )
        return found

    def _settled(self) -> set[tuple[int, int]]:
        now = self.clock()
        return {one for one, thread in self._threads.items() if now - thread.since >= SETTLED_S}

    def _one(
        self,
        maker: Maker,
        groups: dict[int, str],
        families: dict[int, frozenset[int]],
        every: dict[int, int],
        before: dict[tuple[int, int], _Thread],
    ) -> Makers:
        pids: set[int] | None = None
        if maker.pid:
            pids = {maker.pid, *families[maker.pid]}
        if maker.executable:
            pids = {p for p in (every if pids is None else pids) if _runs(p, maker.executable)}
        cgroups = frozenset(groups) if maker.cgroup else None
        if not maker.thread:
            return Makers(None if pids is None else frozenset(pids), None, cgroups)
        among = set(every) if pids is None else pids
        if maker.cgroup:
            among &= set(members(groups.values()))
        if maker.uid >= 0:
            among = {p for p in among if every.get(p) == maker.uid}
        tids = frozenset(t for p in among for t in self._named(p, maker.thread, before))
        return Makers(None if pids is None else frozenset(among), tids, cgroups)

    def _named(self, pid: int, pattern: str, before: dict[tuple[int, int], _Thread]) -> Iterator[int]:
        """Threads of a process whose names match."""
        now = self.clock()
        try:
            tids = [int(t) for t in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - there are many of them
        except OSError:
            return
        for tid in tids:
            known = self._threads.get((pid, tid)) or before.get((pid, tid))
            if known is None or now - known.since < SETTLED_S:
                try:
                    comm = f"/proc/{pid}/task/{tid}/comm"
                    with open(comm, encoding="utf-8", errors="replace") as f:  # noqa: PTH123 - as above
                        known = _Thread(f.read().rstrip("\n"), now if known is None else known.since)
                except OSError:
                    continue
            self._threads[pid, tid] = known
            if fnmatch.fnmatchcase(known.name, pattern):
                yield tid

    def _groups(self, patterns: Collection[str]) -> tuple[dict[str, dict[int, str]], set[int]]:
        """Cgroups by pattern: paths by id; and the ids of all."""
        out: dict[str, dict[int, str]] = {p: {} for p in patterns}
        every: set[int] = set()
        if self.cgroups is None or not patterns:
            return out, every
        todo = [(str(self.cgroups), "", frozenset[str]())]
        while todo:
            path, name, above = todo.pop()
            try:
                info = os.stat(path)  # noqa: PTH116 - there are many of them
                # A folder has as many links as it has folders inside, and two: most have none, and aren't listed.
                inside = (
                    [e.name for e in os.scandir(path) if e.is_dir(follow_symlinks=False)] if info.st_nlink != 2 else []
                )
            except OSError:
                continue  # removed meanwhile
            every.add(info.st_ino)
            matching = above | {p for p in patterns if p not in above and fnmatch.fnmatchcase(name or "/", p)}
            for pattern in matching:
                out[pattern][info.st_ino] = path  # a cgroup's id is its inode
            todo += [(f"{path}/{one}", f"{name}/{one}", frozenset(matching)) for one in inside]
        return out, every


def _processes() -> dict[int, int]:
    """All processes, and their users."""
    out = {}
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal():
                try:
                    out[int(entry.name)] = entry.stat().st_uid
                except OSError:
                    continue
    return out


def _runs(pid: int, pattern: str) -> bool:
    try:
        path = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")  # noqa: PTH115 - there are many of them
    except OSError:
        return False  # gone, a kernel thread, or not ours to see
    return fnmatch.fnmatchcase(path if "/" in pattern else path.rpartition("/")[2], pattern)


def members(paths: Iterable[str]) -> Iterator[int]:
    """Processes in cgroups."""
    for path in paths:
        try:
            text = Path(path, "cgroup.procs").read_text(encoding="ascii")
        except OSError:
            continue
        yield from map(int, text.split())
