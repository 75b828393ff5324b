# SPDX-License-Identifier: Apache-2.0
"""Workers that write some of what they announce on a connection, take the rest back and close, at random.

However late their words are heard, in order: what was written is completed and its requests are met, and nothing else.
"""

from __future__ import annotations

import random
from collections import deque
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from support.harness import MSS, Host

from mfsd.ground.model import What

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 40 * MSS
PART = SIZE // 8
"""Written of some: four of them are not nearly a whole one, which would be completed before one is taken back."""


class Play:
    """One worker with one connection."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.h = Host()
        self.sock = self.h.socket(1)
        self.words: deque[Callable[[], None]] = deque()
        self.lag = self.random.choice([0.0, 0.3, 0.8, 1.0])

    def announce(self, i: int, at: int) -> None:
        self.h.request(str(i), 60.0)
        self.h.transfer(str(i), self.sock, SIZE, request=str(i), position=at)

    def end(self, i: int, *, whole: bool, at: int) -> None:
        if whole:
            self.h.done(str(i), What.REQUEST)
        else:
            self.h.cancel(str(i), self.sock, at, What.REQUEST)

    def hear(self, words: int) -> None:
        self.perhaps_tick()
        for _ in range(min(words, len(self.words))):
            self.words.popleft()()
            self.perhaps_tick()

    def perhaps_tick(self) -> None:
        for _ in range(self.random.choice([0, 1])):
            self.h.tick(0.001)

    def go_on(self) -> None:
        self.hear(self.random.randint(1, 3) if self.random.random() > self.lag else 0)

    def run(self) -> int:
        """How many transfers were written as a whole."""
        sent = [self.random.choice([SIZE, SIZE, 0, PART]) for _ in range(self.random.randint(1, 4))]
        begins = list(accumulate(sent, initial=1))
        ahead, announced = self.random.choice([1, 2, 4]), 0
        for i, size in enumerate(sent):
            while announced < min(len(sent), i + ahead):
                self.words.append(partial(self.announce, announced, begins[i]))
                announced += 1
                self.go_on()
            self.h.send(self.sock, size)
            self.go_on()
            self.words.append(partial(self.end, i, whole=size == SIZE, at=begins[i + 1]))
            self.go_on()
        self.h.kernel.close(self.sock)
        self.go_on()
        self.hear(len(self.words))
        for _ in range(4):
            self.h.tick(0.2)
        return sent.count(SIZE)


@settings(max_examples=300)
@given(st.integers(min_value=0))
def test_words_that_are_heard_at_any_time(seed: int) -> None:
    play = Play(seed)
    written = play.run()
    assert play.h.counted == (written, written, 0)
    assert not play.h.session.transfers
    assert not play.h.session.streams
