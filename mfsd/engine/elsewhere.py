# SPDX-License-Identifier: Apache-2.0
"""What the engine hands on: hints about bytes that another host sends (mfsd.relay)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mfsd.engine.records import Session
    from mfsd.ground.model import Hint, Selector


class Elsewhere(Protocol):
    """Who hears of hints before the books do. Nothing here waits, and nothing raises but HintError."""

    def sends(self, selector: Selector) -> bool:
        """The bytes of these connections leave another host, whose daemon we know."""
        ...

    def take(self, session: Session, hint: Hint, now: float) -> bool:
        """Hand a hint on if it is for another host; True: it is no business of this one."""
        ...

    def ended(self, session: Session) -> None:
        """A session is over."""
        ...
