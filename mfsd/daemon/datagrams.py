# SPDX-License-Identifier: Apache-2.0
"""Whether a cookie is that of a UDP socket, which nobody tells of: all of them are listed, by a thread.

Any user may have a hundred thousand of them, whose listing takes most of a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

SHARE: Final = 0.1
"""Of the time that listing may take."""


class Datagrams:
    """For the event loop, but for what it has the thread do."""

    def __init__(
        self,
        listed: Callable[[], Collection[int]],
        search: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``listed``: cookies of all UDP sockets; may raise OSError. ``search``: has the thread work."""
        self._listed, self._search, self._clock = listed, search, clock
        self._sought: set[int] = set()
        self._known: dict[int, bool] = {}
        """Answers of the last listing that nobody has fetched."""
        self._looking = False
        self._soonest = 0.0

    def has(self, cookie: int) -> bool | None:
        """Whether there is such a socket; False if that can't be found out. None: it is being looked, ask again."""
        known = self._known.pop(cookie, None)
        if known is None:
            self._sought.add(cookie)
            if not self._looking and self._clock() >= self._soonest:
                self._looking = True
                self._search(self._look)
        return known

    def _look(self) -> None:
        began, sought, found = self._clock(), self._sought, frozenset[int]()
        self._sought = set()
        try:
            found = frozenset(self._listed())
        except OSError:
            pass
        finally:
            self._known = {cookie: cookie in found for cookie in list(sought)}  # the loop may still be adding one
            self._soonest = began + (self._clock() - began) / SHARE
            self._looking = False
