# SPDX-License-Identifier: Apache-2.0
"""Workers that open, write, lose, try again, close and end at random, with hints that come late but in order.

Whatever they do: what has arrived is completed, a request is met if all of it has, met and missed add up to the
requests, and nothing is left.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from support.harness import MSS, FakeSocket, Host

from mfsd.ground.model import CookieSelector, EndHint, Hint, RequestHint, Stage, TransferHint, What

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mfsd.engine.records import Session
    from mfsd.ground.model import Endpoints

OPERATIONS = 80
CONNECTIONS = 3
"""At most, at a time."""
GRAIN_S = 0.001
"""TCP says in milliseconds when an acknowledgement came."""
MISSING = 0.3
"""Of what a worker had not written it had to write so much at least, that it counts as unwritten."""


@dataclass(eq=False)
class Owned:
    """A request of the worker's."""

    name: str
    late: bool
    unwritten: set[str] = field(default_factory=set)
    """Of its transfers."""
    said: bool = False
    """That it is done."""
    lost: bool = False


@dataclass(eq=False)
class Written:
    """A transfer on its way."""

    name: str
    owner: Owned
    size: int
    begin: int
    """Position of its first byte."""
    left: int


@dataclass(eq=False)
class Wire:
    """A connection, and what is announced on it and has not arrived."""

    sock: FakeSocket
    queue: deque[Written] = field(default_factory=deque)


class Play:
    """One worker."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.h = Host(slots=256)
        self.session: Session = self.h.session
        self.hints: deque[Hint] = deque()
        self.wires: list[Wire] = []
        self.owned: list[Owned] = []
        self.cookie = self.number = self.arrived = 0
        self.moved: set[str] = set()
        """Requests of which something has arrived."""

    # --- what a worker does

    def open(self) -> None:
        if len(self.wires) < CONNECTIONS:
            self.cookie += 1
            active = self.random.random() < 0.7
            before = 1 if active else 5  # the SYN, or a greeting
            self.wires.append(Wire(self.h.socket(self.cookie, active=active, bytes_acked=before)))

    def request(self) -> None:
        late = self.random.random() < 0.2
        self.owned.append(Owned(f"r{len(self.owned)}", late))
        self.hints.append(RequestHint(self.owned[-1].name, self.h.now + (-1.0 if late else 600.0)))

    def announce(self) -> None:
        waiting = [o for o in self.owned if not o.said and not o.lost]
        if waiting and self.wires:
            owner, wire = self.random.choice(waiting), self.random.choice(self.wires)
            self.number += 1
            self._announce(wire, f"t{self.number}", owner, self.random.randint(1, 20) * MSS)

    def _announce(self, wire: Wire, name: str, owner: Owned, size: int) -> None:
        if any(w.left for w in wire.queue):
            return  # what comes is said when what was said is written
        begin = wire.sock.bytes_acked + wire.sock.unsent_plus_unacked
        wire.queue.append(Written(name, owner, size, begin, size))
        owner.unwritten.add(name)
        self.hints.append(
            TransferHint(name, owner.name, "", Stage.P2D, 0, size, CookieSelector(wire.sock.cookie), position=begin)
        )

    def write(self) -> None:
        for wire in self.wires:
            for w in wire.queue:
                if w.left:
                    n = self.random.choice([w.left, min(w.left, 3 * MSS), max(w.left // 2, 1)])
                    self.h.send(wire.sock, n, acked=False)
                    w.left -= n
                    if not w.left:
                        w.owner.unwritten.discard(w.name)

    def acknowledge(self) -> None:
        for wire in self.wires:
            n = wire.sock.unsent_plus_unacked
            self.h.ack(wire.sock, self.random.choice([n, n // 2, 0]))
            self._arrive(wire)

    def _arrive(self, wire: Wire) -> None:
        while wire.queue and not wire.queue[0].left and self._end(wire.queue[0]) <= wire.sock.bytes_acked:
            self.moved.add(wire.queue.popleft().owner.name)
            self.arrived += 1

    @staticmethod
    def _end(w: Written) -> int:
        return w.begin + w.size

    def say_done(self) -> None:
        for owner in self.owned:
            if not owner.said and not owner.unwritten and self.random.random() < 0.5:
                owner.said = True
                self.hints.append(EndHint(What.REQUEST, owner.name))

    def close(self, *, clean: bool) -> None:
        """By FINs only if all that was begun is written: else its worker would have to say more."""
        whole = [w for w in self.wires if not any(x.left for x in w.queue)] if clean else self.wires
        if not whole:
            return
        wire = self.random.choice(whole)
        self.wires.remove(wire)
        self.h.kernel.close(wire.sock, clean=clean)
        self._arrive(wire)
        if not wire.queue:
            return
        again = self.random.random() < 0.7
        for w in wire.queue:
            if w.owner.said or not again:
                w.owner.lost = True
            else:
                w.owner.unwritten.add(w.name)
        for w in wire.queue:
            if not w.owner.lost and again:
                self.cookie += 1
                other = Wire(self.h.socket(self.cookie, bytes_acked=1))
                self.wires.append(other)
                self._announce(other, w.name, w.owner, w.size)
            else:
                w.owner.unwritten.discard(w.name)

    def hear(self, count: int) -> None:
        for _ in range(min(count, len(self.hints))):
            self.h.engine.apply(self.session, self.hints.popleft(), self.h.now)

    def tick(self) -> None:
        self.h.tick(self.random.choice([0.0, 0.001, 0.01]))

    # --- the play

    def run(self) -> None:
        """All of it."""
        self.play()
        while any(w.left for wire in self.wires for w in wire.queue):
            self.write()
            self.tick()
        self.hear(len(self.hints))
        for wire in self.wires:
            self.h.ack(wire.sock, wire.sock.unsent_plus_unacked)
            self._arrive(wire)
        self.hints.extend(EndHint(What.REQUEST, owner.name) for owner in self.owned if not owner.said)
        self.hear(len(self.hints))
        for _ in range(4):
            self.h.tick(0.3)
        while self.wires:
            self.close(clean=True)
        for _ in range(8):
            self.h.tick(1.0)

    def killed(self) -> None:
        """It ends in the middle: the kernel closes its connections, before or after somebody hears of that."""
        self.play()
        for wire in self.wires:
            for w in wire.queue:
                if w.left <= MISSING * w.size:
                    self.h.send(wire.sock, w.left, acked=False)  # else its size might have been announced too large
                    w.left = 0
        self.hear(len(self.hints))
        ends = [self._end_session, self.tick, *(lambda wire=wire: self._cut_off(wire) for wire in self.wires)]
        self.random.shuffle(ends)
        for end in ends:
            end()
        for _ in range(8):
            self.h.tick(1.0)

    def _end_session(self) -> None:
        self.h.engine.end_session(self.session, self.h.now)

    def _cut_off(self, wire: Wire) -> None:
        self.h.kernel.close(wire.sock)
        self._arrive(wire)
        for w in wire.queue:
            w.owner.lost = True

    def play(self) -> None:
        """What is left to chance."""
        self.open()
        self.request()
        for _ in range(OPERATIONS):
            step = self.random.choices(
                [self.open, self.request, self.announce, self.write, self.acknowledge, self.say_done, self.tick],
                [1, 1, 4, 4, 4, 1, 4],
            )[0]
            step()
            if self.random.random() < 0.08:
                self.close(clean=self.random.random() < 0.6)
            if self.random.random() < 0.5:
                self.hear(self.random.randint(0, 4))


@given(st.integers(0, 1 << 32), st.booleans())
def test_whatever_workers_do_the_account_is_right(seed: int, killed: bool) -> None:  # noqa: FBT001 - hypothesis
    play = Play(seed)
    (play.killed if killed else play.run)()
    h = play.h
    met = sum(not o.lost and not o.late and (o.said or not killed or o.name in play.moved) for o in play.owned)
    assert h.counted == (play.arrived, met, len(play.owned) - met)
    books = h.engine.books
    assert (books.requests.n, books.transfers.n, len(books.streams), h.table.taken) == (0, 0, 0, 0)
    assert not play.session.transfers
    assert play.session.user.transfers == 0


class Timed:
    """One request after the other on a connection, whose daemon may be held up between the acknowledgements."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.h = Host()
        self.sock = self.h.socket(1)
        self.acked_at = self.h.now
        ask = self.h.kernel.progress

        def progress(sockets: Iterable[tuple[int, Endpoints]]) -> dict[int, FakeSocket | None]:
            answers = ask(sockets)
            for answer in answers.values():
                if answer is not None:
                    answer.last_ack_ms = int((self.h.now - self.acked_at) * 1000)
            return answers

        self.h.kernel.progress = progress  # type: ignore[method-assign]

    def arrived_after(self, name: str, due_in: float) -> float:
        """Send a request's bytes; how long they took, as the peer has it, seconds."""
        h, choice = self.h, self.random.choice
        begin, size = h.now, self.random.randint(1, 30) * MSS
        h.request(name, due_in)
        h.transfer(name, self.sock, size, request=name, position=self.sock.bytes_acked)
        h.tick()
        h.send(self.sock, size, acked=False)
        said = choice([False, True])
        if said:
            h.done(name, What.REQUEST)
        while self.sock.unsent_plus_unacked:
            wait = choice([0.001, 0.004, 0.01, 0.03])
            h.now += wait
            if choice([False, True]):
                h.tick()
            h.ack(self.sock, min(self.sock.unsent_plus_unacked, choice([1, 3, 30]) * MSS))
            self.acked_at = h.now
        for wait in (choice([0.001, 0.01, 0.05]), 0.3, 0.3):
            h.tick(wait)
        if not said:
            h.done(name, What.REQUEST)
        return self.acked_at - begin


@given(st.integers(0, 1 << 32))
def test_a_deadline_is_met_exactly_if_the_last_byte_was_acknowledged_in_time(seed: int) -> None:
    play = Timed(seed)
    for n in range(10):
        due_in = play.random.choice([0.02, 0.05, 0.1])
        before = play.h.counted
        took = play.arrived_after(f"r{n}", due_in)
        assert play.h.counted[0] == before[0] + 1
        if abs(took - due_in) > GRAIN_S:
            assert (play.h.counted[1] > before[1]) == (took < due_in)
