# SPDX-License-Identifier: Apache-2.0
"""The do-no-harm experiment: transfers with a deadline beside somebody who wants the same link.

One host sends to another over a link. What a transfer needs and may take is given as time: ``alone`` is what
its bytes take with the link to themselves, ``due`` when they must have arrived. Four arms: ``plain``, which is TCP on a
paced link without any daemon, and the daemon with its default policy, with mfs and with two-class. Everything goes the
daemon's way: hints over gRPC, no waiting for the answer.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.client import Client, Stage
from mfsd.ground.units import Rate
from mfsd.lab.hosts.governor import Governor
from mfsd.lab.hosts.net import Fabric, LabError, plain_link, remove_link
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.player import Player

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.lab.player import Flow

RATE: Final = Rate.parse("200mbit")
"""Of the link, unless another is wanted."""
SETTLE_S: Final = 0.4
"""From the competitor's first byte to the first transfer: the queue is full by then."""
LATE_S: Final = 0.1
"""A transfer that has not arrived so long after its deadline is not waited for any longer."""
DRAIN_S: Final = 0.2
"""After a case, for what is queued."""
EXCHANGE_S: Final = 0.01
"""What the bytes of a collective take alone."""
LOOSE_S: Final = 60.0


class Arm(enum.StrEnum):
    """Who governs the link."""

    PLAIN = "plain"
    DEFAULT = "default"
    MFS = "mfs"
    TWO_CLASS = "two-class"


class Beside(enum.StrEnum):
    """Whom transfers compete with."""

    NOBODY = "nobody"
    MARK = "saturating collective"
    BURSTS_25 = "collectives 25 %"
    BURSTS_50 = "collectives 50 %"
    BURSTS_75 = "collectives 75 %"
    BULK_1 = "1 unhinted bulk"
    BULK_4 = "4 unhinted bulk"
    LOOSER = "looser transfer"
    EQUAL = "equal transfer"
    DOOMED = "doomed transfer"
    BACKGROUND = "background"

    @property
    def collective(self) -> bool:
        """A collective group is there, whose time matters too."""
        return self is Beside.MARK or self in DUTY


DUTY: Final[Mapping[Beside, float]] = {Beside.BURSTS_25: 0.25, Beside.BURSTS_50: 0.5, Beside.BURSTS_75: 0.75}
"""Share of the link that collectives take when nothing disturbs them: each begins so long after the one before."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A transfer. Seconds."""

    alone: float
    due: float
    said: float = 1.0
    """What its hint says of its size, over the size."""
    read: float = 0.0
    """Share of the link that its receiver reads at most; 0: all that comes."""
    announced: bool = True
    """False: nothing but the stage of its connection is known, as by a rule."""


@dataclass(frozen=True, slots=True)
class Case:
    """Transfers that begin together, and who is beside them."""

    beside: Beside
    transfers: tuple[Wanted, ...]

    @classmethod
    def one(cls, beside: Beside, alone: float, factor: float, said: float = 1.0, read: float = 0.0) -> Self:
        """One transfer, due after ``factor`` times what it takes of a link; two of them beside an equal."""
        return cls(beside, (Wanted(alone, alone * factor, said, read),) * (1 + (beside is Beside.EQUAL)))

    @property
    def last(self) -> float:
        """When the last transfer is due, seconds."""
        return max(t.due for t in self.transfers)


@dataclass(slots=True)
class Outcome:
    """What came of a case."""

    took: list[float | None]
    """Seconds from each transfer's hint until its last byte was there; None: not seen."""
    met: list[bool]
    exchanges: list[float] = field(default_factory=list)
    """Seconds that each collective took that began between the transfers' begin and their last deadline. Of the
    saturating one: how long the bytes of one took to arrive."""


class Link:
    """Two hosts and the link between them under an arm. A context manager. Raises LabError."""

    def __init__(
        self, fabric: Fabric, arm: Arm, *, yields: bool = False, rate: Rate = RATE, configured: float = 1.0
    ) -> None:
        """``yields``: the daemon's deferred connections yield in the network (network.yield).

        ``rate``: of the link; ``configured``: what the daemon is told of that.
        """
        self.arm, self._yields = arm, yields
        self._rate, self._configured = rate, Rate(rate.bytes_per_s * configured)
        self.governor: Governor | None = None
        self._source, self._sink = (fabric.hosts[name] for name in HOSTS)
        self._stack = contextlib.ExitStack()
        self._number = itertools.count()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self.arm is Arm.PLAIN:
                plain_link(self._source, self._rate)
                stack.callback(remove_link, self._source)
            else:
                tables: dict[str, Any] = {} if self.arm is Arm.DEFAULT else {"policy": {"name": self.arm.value}}
                if self._yields:
                    tables["network"] = {"yield": "on", "replace": True}  # the lab's sockets choose cubic
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mfsd-")))
                self.governor = stack.enter_context(Governor(self._source, directory, self._configured, tables))
            self._player = stack.enter_context(Player(self._source, self._sink))
            target = "" if self.governor is None else self.governor.target
            self._client = stack.enter_context(Client("noharm", target))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def play(self, case: Case, *, whole: bool = False) -> Outcome:
        """Play a case. ``whole``: go on until the last deadline, for what collectives take until then."""
        try:
            play = _Play(self._player, self._client, case, f"c{next(self._number)}", self._rate)
            return play.run(whole=whole)
        finally:
            self._player.clear()
            time.sleep(DRAIN_S)
            rejected = self._client.stats.rejected
            if rejected:
                raise LabError(f"the daemon rejected {rejected} hints: the experiment did not test what it should")


HOSTS: Final = ("a", "b")


class _Play:
    """One case on its own connections."""

    def __init__(self, player: Player, client: Client, case: Case, name: str, rate: Rate) -> None:
        self.player, self.client, self.case, self.name = player, client, case, name
        self.payload = rate.bytes_per_s * EFFICIENCY
        """Bytes/s that a TCP stream gets of the link when it has it to itself."""
        self.flows = [(self._flow(w.alone, w.read), w) for w in case.transfers]
        for flow, _ in (one for one in self.flows if not one[1].announced):
            client.mark(flow.sock, Stage.P2D)
        self.begun: list[float] = []
        self.exchanges: list[tuple[float, float]] = []
        """When each collective began and how long it took."""

    def _flow(self, seconds: float, read: float = 0.0) -> Flow:
        return self.player.connect(max(int(seconds * self.payload), 1), pace=read * self.payload)

    def run(self, *, whole: bool) -> Outcome:
        begin = time.monotonic() + SETTLE_S
        self._compete()
        self.player.play(begin)
        for i, (flow, wanted) in enumerate(self.flows):
            self.begun.append(time.monotonic())
            if wanted.announced:
                self._announce(f"{self.name}-{i}", flow, wanted.due, flow.unit * wanted.said)
            flow.send(flow.unit)
        begin, until = self.begun[0], self.begun[-1] + self.case.last
        self.player.play(until + LATE_S, lambda: not whole and all(f.arrivals for f, _ in self.flows))
        self.client.cancel(request=f"{self.name}-other")
        for i in range(len(self.flows)):
            self.client.cancel(request=f"{self.name}-{i}")
        took = [
            flow.arrivals[0] - at if flow.arrivals else None
            for (flow, _), at in zip(self.flows, self.begun, strict=True)
        ]
        due = [wanted.due for _, wanted in self.flows]
        met = [t is not None and t <= d for t, d in zip(took, due, strict=True)]
        return Outcome(took, met, [took for at, took in self.exchanges if begin <= at <= until])

    def _announce(self, name: str, flow: Flow, due: float, size: float) -> None:
        self.client.request(name, ttft_left_s=due)
        self.client.transfer(name, flow.sock, max(int(size), 1), stage=Stage.P2D, request=name)

    # --- competitors --------------------------------------------------------------------------------------------------

    def _compete(self) -> None:
        beside, flood = self.case.beside, (self.case.last + SETTLE_S + LATE_S) * self.payload * 1.5
        if beside.collective:
            self._collective(DUTY.get(beside, 1.0))
        elif beside in (Beside.BULK_1, Beside.BULK_4):
            for _ in range(1 if beside is Beside.BULK_1 else 4):
                self._flow(EXCHANGE_S).send(flood)
        elif beside is Beside.BACKGROUND:
            flow = self._flow(EXCHANGE_S)
            self.client.transfer(f"{self.name}-other", flow.sock, int(flood), stage=Stage.BACKGROUND)
            flow.send(flood)
        elif beside in (Beside.LOOSER, Beside.DOOMED):
            due = LOOSE_S if beside is Beside.LOOSER else SETTLE_S + self.case.last
            flow = self._flow(EXCHANGE_S)
            self._announce(f"{self.name}-other", flow, due, flood)
            flow.send(int(flood))

    def _collective(self, duty: float) -> None:
        flow = self._flow(EXCHANGE_S)
        self.client.mark(flow.sock, Stage.COLLECTIVE)
        self.client.flush()
        began = time.monotonic()

        def again() -> None:
            nonlocal began
            began = time.monotonic()
            flow.send(flow.unit)

        def arrived(at: float) -> None:
            nonlocal began
            self.exchanges.append((began, at - began))
            if duty < 1.0:
                self.player.at(at + EXCHANGE_S * (1.0 / duty - 1.0), again)
            else:
                began = at

        flow.on_arrival = arrived
        if duty < 1.0:
            again()
        else:
            flow.send(float("inf"))
