# SPDX-License-Identifier: Apache-2.0
"""What a worker has announced and not yet ended: to be said again to a daemon that has not heard it.

The ledger also stands in for the daemon while there is none: hints are entered, ends cancel them out, and only what is
still alive when a daemon appears is sent. Bounded: the oldest entries go first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from mfsd.ground.model import (
    INF,
    BatchHint,
    EndHint,
    Hint,
    ProgressHint,
    RequestHint,
    Selector,
    Stage,
    TransferHint,
    What,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_TTL_S: Final = 30.0
"""For hints that leave their life to the daemon; its own default."""


@dataclass(slots=True)
class Entry:
    """An announced hint and when it stops to matter."""

    hint: Hint
    expires: float
    gone_before: int = 0
    """Of a transfer: what ``Ledger`` counted as ended on its connection when it was entered."""


@dataclass(slots=True)
class Ledger:
    """Announced and alive, at most ``limit`` entries of each kind."""

    limit: int
    forgotten: int = 0
    """Entries given up because of the limit."""
    _requests: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _batches: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _progress: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _transfers: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _marks: OrderedDict[Selector, Entry] = field(default_factory=OrderedDict)
    _ended: dict[Selector, list[int]] = field(default_factory=dict)
    """Of each connection with transfers: how many there are, and bytes of those that have ended since there are any."""

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts())

    def _parts(self) -> tuple[OrderedDict[str, Entry], ...]:
        # In the order in which a daemon must hear them: owners before what they own.
        return (self._requests, self._batches, self._progress, self._transfers)

    def enter(self, hint: Hint, now: float) -> None:
        """Take note of one hint."""
        if isinstance(hint, TransferHint):
            owner = self._requests.get(hint.request_id)
            due = min(hint.deadline, owner.hint.deadline if owner and isinstance(owner.hint, RequestHint) else INF)
            self._drop(self._transfers, hint.id)
            count = self._ended.setdefault(hint.selector, [0, 0])
            count[0] += 1
            self._put(self._transfers, hint.id, hint, (due if due != INF else now) + (hint.ttl or DEFAULT_TTL_S))
            self._transfers[hint.id].gone_before = count[1]
        elif isinstance(hint, RequestHint):
            self._put(self._requests, hint.id, hint, max(hint.deadline, now) + (hint.ttl or DEFAULT_TTL_S))
        elif isinstance(hint, BatchHint):
            self._put(self._batches, hint.id, hint, now + DEFAULT_TTL_S)
        elif isinstance(hint, ProgressHint):
            self._put(self._progress, hint.batch_id, hint, now + DEFAULT_TTL_S)
        elif isinstance(hint, EndHint):
            self._end(hint)
        elif hint.stage is Stage.NONE:
            self._marks.pop(hint.selector, None)
        else:
            self._marks.pop(hint.selector, None)
            self._marks[hint.selector] = Entry(hint, INF)
            if len(self._marks) > self.limit:
                self._marks.popitem(last=False)
                self.forgotten += 1

    def _put(self, part: OrderedDict[str, Entry], key: str, hint: Hint, expires: float) -> None:
        # A renewed entry moves to the end, so that the oldest are first.
        part.pop(key, None)
        part[key] = Entry(hint, expires)
        if len(part) > self.limit:
            self._drop(part, next(iter(part)))
            self.forgotten += 1

    def _drop(self, part: OrderedDict[str, Entry], key: str, *, done: bool = False) -> None:
        """Forget an entry, if it is there; ``done``: the bytes of a transfer have been written."""
        entry = part.pop(key, None)
        if entry is None or not isinstance(entry.hint, TransferHint):
            return
        count = self._ended[entry.hint.selector]
        count[0] -= 1
        count[1] += entry.hint.size * done
        if not count[0]:
            del self._ended[entry.hint.selector]

    def _end(self, hint: EndHint) -> None:
        if hint.what is What.TRANSFER:
            self._drop(self._transfers, hint.id, done=not hint.cancelled)
            return
        if hint.what is What.REQUEST:
            self._requests.pop(hint.id, None)
        else:
            self._batches.pop(hint.id, None)
        self._progress.pop(hint.id, None)
        # Its transfers stay until they are ended or expire: searching for them here would cost every completion.

    def alive(self, now: float) -> Iterator[Hint]:
        """What a daemon that knows nothing needs to hear, owners first; what has expired is dropped on the way.

        A request's compute time and the layer of a batch are as last said: the worker's next progress corrects them.
        """
        for part in self._parts():
            for key in [k for k, e in part.items() if e.expires < now]:
                self._drop(part, key)
        for entry in self._marks.values():
            yield entry.hint
        for part in self._parts():
            for entry in part.values():
                if self._orphan(entry.hint):
                    continue
                yield self._without_dead_owner(self._placed(entry))

    def _placed(self, entry: Entry) -> Hint:
        """A transfer begins where it was announced, or behind those before it that have been written since."""
        hint = entry.hint
        if isinstance(hint, TransferHint) and hint.position:
            return replace(hint, position=hint.position + self._ended[hint.selector][1] - entry.gone_before)
        return hint

    def _orphan(self, hint: Hint) -> bool:
        if isinstance(hint, ProgressHint):
            return hint.batch_id not in self._batches and hint.batch_id not in self._requests
        if isinstance(hint, TransferHint):
            known = hint.request_id in self._requests or hint.batch_id in self._batches
            return not known and not hint.stage.ownerless
        return False

    def _without_dead_owner(self, hint: Hint) -> Hint:
        if isinstance(hint, TransferHint) and hint.request_id and hint.request_id not in self._requests:
            return replace(hint, request_id="") if hint.batch_id else hint
        if isinstance(hint, BatchHint):
            return replace(hint, request_ids=[r for r in hint.request_ids if r in self._requests])
        return hint
