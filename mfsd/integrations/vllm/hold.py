# SPDX-License-Identifier: Apache-2.0
"""Reads that wait for tighter ones: UCX brings those of a peer one after the other, so none passes one that began.

The scheduler's side sifts what it hands to the workers (NIXL's metadata, reqs_to_recv): a read starts when no read from
the same host that is due earlier is on its way, or when it can wait no longer. A read that has not started may still be
given up, which one that has may not: the workers then report its blocks as failed to load, and vLLM computes them.

Nothing here may lose a read: whatever fails, all of them start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_S: Final = 8.0
"""A read waits no longer than this: the lease on its blocks at the prefill host is 30 s."""
PATIENCE: Final = 2.0
"""It starts when only so many times what it takes alone is left."""
GIVEN_UP: Final = "mfsd_given_up"
"""Attribute of the metadata: blocks by request, for the workers to report."""


@dataclass(slots=True)
class Read:
    """One that waits or is on its way. Times are monotonic seconds."""

    peer: str
    deadline: float
    alone_s: float
    """What it takes with nothing before it; inf: nobody knows."""
    since: float
    start: Callable[[], None]
    """Tells the daemon."""
    entry: Any = None
    """Of reqs_to_recv."""

    def waits_for(self, other: Read, now: float) -> bool:
        """It may be held back for that one."""
        if self.peer != other.peer or other.deadline >= self.deadline or now - self.since > LONGEST_S:
            return False
        alone = self.alone_s if math.isfinite(self.alone_s) else 0.0
        return self.deadline - now > PATIENCE * alone


@dataclass(slots=True)
class Hold:
    """All reads of one decode engine."""

    give_up: bool = False
    """Reads that can't be in time any more are not started."""
    expected: dict[str, Read] = field(default_factory=dict)
    """Announced by the scheduler, not in the metadata yet."""
    waiting: dict[str, Read] = field(default_factory=dict)
    running: dict[str, Read] = field(default_factory=dict)
    aborted: dict[str, Read] = field(default_factory=dict)
    """They were waiting when their requests ended."""

    def sift(self, meta: Any, now: float) -> None:
        """Take what is to wait out of the metadata, and put in what may start."""
        mine = getattr(meta, "reqs_to_recv", None)
        if mine is None:
            return
        ours = {name: mine[name] for name in mine if name in self.expected}
        for name, entry in ours.items():
            read = self.waiting[name] = self.expected.pop(name)
            read.entry = entry
        starting, told, blocks = dict(self.waiting), {}, {}
        try:
            starting, given_up = self._choose(now)
            blocks = {name: _blocks(read.entry) for name, read in given_up.items()}
            told = {name: _notice(read.entry) for name, read in given_up.items()}
        finally:
            for name in ours:
                mine.pop(name)
            mine.update({name: read.entry for name, read in starting.items()} | told)
            self.running |= starting
            for name in (*starting, *told):
                self.waiting.pop(name, None)
                self.aborted.pop(name, None)
            if blocks:
                setattr(meta, GIVEN_UP, blocks)
        for read in starting.values():
            read.start()

    def _choose(self, now: float) -> tuple[dict[str, Read], dict[str, Read]]:
        """What starts now, and what is given up."""
        starting: dict[str, Read] = {}
        given_up = dict(self.aborted)
        for name, read in sorted(self.waiting.items(), key=lambda item: item[1].deadline):
            if self.give_up and math.isfinite(read.alone_s) and now + read.alone_s > read.deadline:
                given_up[name] = read
            elif not any(read.waits_for(r, now) for r in (*self.running.values(), *starting.values())):
                starting[name] = read
        return starting, given_up

    def over(self, name: str) -> None:
        """A read has ended, or its request has."""
        self.running.pop(name, None)
        self.expected.pop(name, None)
        read = self.waiting.pop(name, None)
        if read is not None:
            self.aborted[name] = read


def _blocks(entry: Any) -> list[int]:
    return [int(block) for group in entry.local_block_ids for block in group]


def _notice(entry: Any) -> Any:
    """What remains of a read that is given up: the prefill host hears that it may free the blocks."""
    entry.local_block_ids = tuple([] for _ in entry.local_block_ids)
    entry.awaiting_kvs = False
    return entry


@dataclass(slots=True)
class GivenUp:
    """The workers' side: what to report at the end of a step."""

    requests: set[str] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)

    def hear(self, meta: Any) -> None:
        """The metadata of a step."""
        for name, blocks in getattr(meta, GIVEN_UP, {}).items():
            self.requests.add(name)
            self.blocks.update(blocks)

    def take_requests(self) -> set[str]:
        """Once each."""
        out, self.requests = self.requests, set()
        return out

    def take_blocks(self) -> set[int]:
        """Once each."""
        out, self.blocks = self.blocks, set()
        return out
