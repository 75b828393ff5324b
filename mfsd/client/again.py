# SPDX-License-Identifier: Apache-2.0
"""Hints that are to be said again when the stream to a daemon has broken."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mfsd.ground.model import Hint

if TYPE_CHECKING:
    from mfsd.client.encode import Batch


class Again(deque[Hint]):
    """In their order; the first ones are those of messages that were sent and not answered."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[tuple[int, int]] = []
        """Numbers of those messages, and how many hints each was."""

    def put_back(self, unanswered: dict[int, Batch]) -> None:
        """A stream is over that has left these messages, by number, unanswered."""
        if unanswered:  # else it may have broken before the daemon said what it had heard of the one before
            self._messages = [(number, len(batch.hints)) for number, batch in unanswered.items()]
        self.extendleft(hint for batch in reversed(unanswered.values()) for hint in reversed(batch.hints))

    def drop(self, heard: int) -> None:
        """The daemon that they were sent to has heard messages up to this number: they would count twice."""
        for number, hints in self._messages:
            for _ in range(hints if number <= heard else 0):
                self.popleft()
        self._messages = []
