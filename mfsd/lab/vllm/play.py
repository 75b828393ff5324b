# SPDX-License-Identifier: Apache-2.0
"""One cell: requests that go through both engines, beside somebody who wants the same link.

A request goes to prefill with an objective for its time to first token (TTFT), and with what prefill answers to decode,
which pulls the KV and gives the token. What is measured lies between the arrival at prefill and that token. Both
engines must give the same one: wrong or missing KV would show.
"""

from __future__ import annotations

import enum
import itertools
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.lab.hosts.health import Measure
from mfsd.lab.hosts.net import LabError
from mfsd.lab.vllm.engine import TOKEN
from mfsd.lab.vllm.hosts import EXCHANGES, PAYLOAD, PREFILL, STORES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.lab.hosts.governor import Governor
    from mfsd.lab.player import Player
    from mfsd.lab.vllm.engines import Pair

SIZES: Final = (64, 192)
"""Tokens of a prompt: 8 and 24 MiB of KV."""
SLACKS: Final = (2.0, 4.0)
"""A request's objective over what it takes with the link to itself."""
GAP_S: Final = (1.2, 2.0)
"""Between two arrivals."""
EXCHANGE: Final = 256 << 10
"""Bytes of a collective."""
PAUSE_S: Final = 0.03
"""From a collective's end to the next one's begin."""
SETTLE_S: Final = 0.5
AFTER_S: Final = 1.0
"""After the last objective, when competitors are stopped; what is late by then may finish."""
DRAIN_S: Final = 60.0
DOWN_S: Final = 0.8
"""From the daemon's end to the start of the next one."""
UP_S: Final = 1.7
"""From then to its end."""


class Beside(enum.StrEnum):
    """Whom requests compete with; collectives are always there, but for nobody."""

    NOBODY = "nobody"
    EXCHANGES = "exchanges"
    BULK_1 = "1 bulk flow"
    BULK_4 = "4 bulk flows"
    STORES = "stores"


BULK: Final[Mapping[Beside, int]] = {Beside.BULK_1: 1, Beside.BULK_4: 4}


@dataclass(frozen=True, slots=True)
class Alone:
    """What a request takes with the link to itself, under plain TCP. Seconds."""

    ttft: float
    handed: float
    """Of these, from prefill's answer to decode's token."""


@dataclass(slots=True)
class Request:
    """One. Times in seconds of the monotonic clock."""

    name: str
    tokens: int
    slo: float
    seed: int
    tight: bool
    at: float = 0.0
    prefilled: float | None = None
    done: float | None = None
    first: int | None = None
    token: int | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds; None: no token came."""
        return None if self.done is None else self.done - self.at

    @property
    def met(self) -> bool:
        """In time."""
        return self.ttft is not None and self.ttft <= self.slo

    @property
    def failed(self) -> bool:
        """No token came, or not prefill's."""
        return self.done is None or self.token is None or self.token != self.first


@dataclass(slots=True)
class Outcome:
    """What came of a cell."""

    requests: list[Request]
    quiet: list[float] = field(default_factory=list)
    """Seconds that collectives took before the first request."""
    exchanges: list[float] = field(default_factory=list)
    """The same of those that began between the first arrival and the last objective."""
    health: dict[str, float] = field(default_factory=dict)
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    """The daemons', by host, counted from the cell's begin."""
    kills: int = 0

    @property
    def met(self) -> int:
        """How many were in time."""
        return sum(r.met for r in self.requests)


def could_alone(requests: Sequence[Request], alone: Mapping[int, Alone]) -> list[bool]:
    """Who could have been in time with the link to itself, given what prefill took of its objective.

    What the engines took is not the network's: they share two processors with everything else.
    """
    return [r.prefilled is not None and r.prefilled + alone[r.tokens].handed <= r.at + r.slo for r in requests]


def could_in_turn(requests: Sequence[Request], alone: Mapping[int, Alone]) -> list[bool]:
    """The same with the link to all of them, and nobody else on it.

    Reads from one peer come one after the other (one connection carries them), in the order in which they were asked
    for, whoever is due first: no network brings them in another one.
    """
    out, free = [False] * len(requests), 0.0
    for asked, i in sorted((r.prefilled, i) for i, r in enumerate(requests) if r.prefilled is not None):
        r = requests[i]
        wire = r.tokens * TOKEN / PAYLOAD
        free = max(free, asked) + wire
        out[i] = free + max(alone[r.tokens].handed - wire, 0.0) <= r.at + r.slo
    return out


def work(alone: Mapping[int, Alone], n: int, seed: int) -> list[tuple[float, Request]]:
    """``n`` requests, as many of each size and slack as possible, and when each comes, in seconds from the first."""
    rng = random.Random(seed)  # noqa: S311 - a seed of requests
    kinds = list(itertools.islice(itertools.cycle(itertools.product(SIZES, SLACKS)), n))
    rng.shuffle(kinds)
    out, at = [], 0.0
    for i, (tokens, slack) in enumerate(kinds):
        out.append((at, Request(f"r{i}", tokens, slack * alone[tokens].ttft, i, slack == SLACKS[0])))
        at += rng.uniform(*GAP_S)
    return out


class Cell:
    """One run on a link that is governed, with engines that serve."""

    _number = itertools.count()

    def __init__(self, player: Player, pair: Pair, governors: Mapping[str, Governor], beside: Beside) -> None:
        self._player, self._pair, self._governors, self._beside = player, pair, governors, beside
        self._requests: dict[str, Request] = {}
        self._exchanges: list[tuple[float, float]] = []
        self._kills = 0

    def run(self, wanted: Sequence[tuple[float, Request]], quiet_s: float, kills: int = 0) -> Outcome:
        """Let collectives be alone with the competitor for a while, then serve. Raises LabError.

        ``kills``: how often prefill's daemon is killed meanwhile; another one is started each time.
        """
        number = next(self._number)
        self._requests = {f"c{number}-{r.name}": r for _, r in wanted}
        self._pair.prefill.on_answer, self._pair.decode.on_answer = self._prefilled, self._decoded
        before = {} if kills else {name: g.counters() for name, g in self._governors.items()}
        begun = time.monotonic()
        first = begun + SETTLE_S + quiet_s
        self._compete()
        for (at, request), name in zip(wanted, self._requests, strict=True):
            self._player.at(first + at, lambda name=name, request=request: self._begin(name, request))  # type: ignore[misc]
        last = max(first + at + r.slo for at, r in wanted)
        if kills:
            self._player.at(first + UP_S, lambda: self._kill(kills))
            last = max(last, first + kills * (UP_S + DOWN_S))
        with Measure([]) as measure:
            self._player.play(last + AFTER_S)
        self._player.clear()
        self._drain()
        counters = {
            name: {k: v - before[name][k] for k, v in g.counters().items()}
            for name, g in self._governors.items() if before
        }  # fmt: skip
        return Outcome(
            [r for _, r in wanted],
            [took for at, took in self._exchanges if begun + SETTLE_S <= at < first],
            [took for at, took in self._exchanges if first <= at <= last],
            measure.figures,
            counters,
            self._kills,
        )

    def run_alone(self, request: Request) -> None:
        """Serve one request, with nobody there."""
        name = f"c{next(self._number)}-{request.name}"
        self._requests = {name: request}
        self._pair.prefill.on_answer, self._pair.decode.on_answer = self._prefilled, self._decoded
        self._begin(name, request)
        self._drain()

    def _drain(self) -> None:
        """Wait for what is late."""
        until = time.monotonic() + DRAIN_S
        while any(r.done is None for r in self._requests.values()) and time.monotonic() < until:
            self._pair.prefill.check()
            self._pair.decode.check()
            time.sleep(0.01)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _begin(self, name: str, request: Request) -> None:
        request.at = time.monotonic()
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        self._ask(self._pair.prefill.ask, name, request, params)

    @staticmethod
    def _ask(ask: Any, name: str, request: Request, params: dict[str, Any]) -> None:
        xargs = {"mfsd_ttft_slo_ms": request.slo * 1000}
        ask(id=name, tokens=request.tokens, seed=request.seed, params=params, xargs=xargs)

    def _prefilled(self, answer: dict[str, Any]) -> None:
        """In the thread of prefill's answers."""
        request = self._requests.get(answer["id"])
        if request is not None:
            request.prefilled, request.first = answer["at"], answer["token"]
            self._ask(self._pair.decode.ask, answer["id"], request, answer["params"])

    def _decoded(self, answer: dict[str, Any]) -> None:
        request = self._requests.get(answer["id"])
        if request is not None:
            request.token, request.done = answer["token"], answer["at"]

    # --- competitors --------------------------------------------------------------------------------------------------

    def _compete(self) -> None:
        if self._beside is Beside.NOBODY:
            return
        self._exchange()
        for _ in range(BULK.get(self._beside, 0)):
            self._player.connect(EXCHANGE).send(float("inf"))
        if self._beside is Beside.STORES:
            self._player.connect(EXCHANGE, STORES[0]).send(float("inf"))

    def _exchange(self) -> None:
        flow, began = self._player.connect(EXCHANGE, EXCHANGES[0]), 0.0

        def again() -> None:
            nonlocal began
            began = time.monotonic()
            flow.send(EXCHANGE)

        def arrived(at: float) -> None:
            self._exchanges.append((began, at - began))
            self._player.at(at + PAUSE_S, again)

        flow.on_arrival = arrived
        again()

    # --- faults -------------------------------------------------------------------------------------------------------

    def _kill(self, left: int) -> None:
        governor = self._governors[PREFILL]
        governor.kill()
        self._kills += 1

        def again() -> None:
            governor.launch()
            if left > 1:
                self._player.at(time.monotonic() + UP_S, lambda: self._kill(left - 1))

        self._player.at(time.monotonic() + DOWN_S, again)


def alone(player: Player, pair: Pair) -> dict[int, Alone]:
    """What a request takes with the link to itself, by tokens of the prompt: medians of three.

    One of each size goes before, so that the engines know each other. Raises LabError when that fails.
    """
    out = {}
    for tokens in SIZES:
        requests = [Request(f"a{tokens}-{i}", tokens, DRAIN_S, i, tight=False) for i in range(4)]
        for request in requests:
            Cell(player, pair, {}, Beside.NOBODY).run_alone(request)
            if request.failed:
                raise LabError(f"a request of {tokens} tokens alone on the link: token {request.token}, prefill's is "
                               f"{request.first}; the engines' logs say more")  # fmt: skip
        some = requests[1:]
        handed = statistics.median((r.done or 0.0) - (r.prefilled or 0.0) for r in some)
        out[tokens] = Alone(statistics.median(r.ttft or 0.0 for r in some), handed)
    return out
