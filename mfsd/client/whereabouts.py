# SPDX-License-Identifier: Apache-2.0
"""On which sockets transfers were announced: who cancels them says how far those had been written by then.

The daemon hears of it some milliseconds later, when the bytes of other transfers may have gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.client.selectors import written
from mfsd.ground.model import CookieSelector, What
from mfsd.ground.wire import SOCKETS_MAX

if TYPE_CHECKING:
    from mfsd.client.selectors import Named
    from mfsd.ground.model import TransferHint

KEPT: Final = 8192
"""Names of each kind that are remembered at least; twice as many at most."""


@dataclass(slots=True)
class _Lately:
    """The sockets, by cookie their descriptors, of what was named lately."""

    _new: dict[str, dict[int, int]] = field(default_factory=dict)
    _old: dict[str, dict[int, int]] = field(default_factory=dict)

    def put(self, name: str, cookie: int, fd: int) -> None:
        found = self._new.get(name)
        if found is None:
            if len(self._new) >= KEPT:
                self._new, self._old = {}, self._new
            self._new[name] = found = self._old.pop(name, {})
        found[cookie] = fd

    def get(self, name: str) -> dict[int, int]:
        return self._new.get(name) or self._old.get(name) or {}

    def pop(self, name: str) -> dict[int, int]:
        old, new = self._old.pop(name, None), self._new.pop(name, None)
        return new or old or {}


@dataclass(slots=True)
class Whereabouts:
    """Of one client. Calls of other threads in between do no harm."""

    _of: dict[What, _Lately] = field(default_factory=lambda: {what: _Lately() for what in What})

    def note(self, hint: TransferHint, named: Named) -> None:
        """A transfer is announced on a connection."""
        selector, fd = named.selector, named.fd
        if fd < 0 or not isinstance(selector, CookieSelector):
            return
        self._of[What.TRANSFER].put(hint.id, selector.cookie, fd)
        if hint.request_id:
            self._of[What.REQUEST].put(hint.request_id, selector.cookie, fd)
        elif hint.batch_id:
            self._of[What.BATCH].put(hint.batch_id, selector.cookie, fd)

    def reached(self, name: str, cookie: int) -> int | None:
        """How far the socket of a transfer has been written; None: it is not known, or gone."""
        fd = self._of[What.TRANSFER].get(name).get(cookie)
        return None if fd is None else written(fd, cookie)

    def end(self, what: What, name: str, *, cancelled: bool) -> tuple[tuple[int, int], ...]:
        """Something is over; of what is ``cancelled``: how far its sockets have been written, by their cookies."""
        sockets = self._of[what].pop(name)
        if not cancelled:
            return ()
        told = ((cookie, written(fd, cookie)) for cookie, fd in list(sockets.items())[:SOCKETS_MAX])
        return tuple((cookie, position) for cookie, position in told if position is not None)
