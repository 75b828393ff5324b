# SPDX-License-Identifier: Apache-2.0
"""Arms and cells of the vLLM experiment, in their order.

Plain TCP and rules share a pair of engines, which know nothing of mfsd; the connector has one of its own. Every cell
has the same requests.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mfsd.lab.player import Player
from mfsd.lab.vllm.engines import Pair, check
from mfsd.lab.vllm.hosts import DECODE, PREFILL, Arm, World
from mfsd.lab.vllm.play import AFTER_S, DOWN_S, SETTLE_S, UP_S, Alone, Beside, Cell, Outcome, Request, alone, work

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mfsd.lab.hosts.governor import Governor

BESIDE: Final = (Beside.EXCHANGES, Beside.BULK_1, Beside.BULK_4, Beside.STORES)
START_S: Final = 60.0
"""About what a pair of engines takes to start, and to be measured alone; for the progress bar."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of it is run."""

    requests: int = 12
    """Of each cell."""
    quiet_s: float = 6.0
    """Of collectives before the first request, the measure of those after it."""
    kills: int = 20
    """Of prefill's daemon, in a cell of their own; 0: no such cell."""
    beside: tuple[Beside, ...] = BESIDE
    seed: int = 1

    @property
    def cell_s(self) -> float:
        """About what a cell takes."""
        return SETTLE_S + self.quiet_s + self.requests * 1.6 + AFTER_S + 3.0

    @property
    def seconds(self) -> float:
        """About what all of it takes."""
        return 2 * START_S + len(Arm) * (len(self.beside) * self.cell_s + 3.0) + self.kills * (UP_S + DOWN_S) + 10.0


QUICK: Final = Plan(requests=4, quiet_s=3.0, kills=2, beside=(Beside.EXCHANGES, Beside.BULK_1))


@dataclass(slots=True)
class Found:
    """What came of it."""

    plan: Plan
    alone: dict[int, Alone]
    """By tokens of the prompt."""
    cells: dict[tuple[Arm, Beside], Outcome] = field(default_factory=dict)
    killed: Outcome | None = None


class Suite:
    """One run. Raises LabError."""

    def __init__(self, interpreter: Path, plan: Plan, tell: Callable[[str, float], None]) -> None:
        """``tell``: what is being done, and how many seconds of the plan are over."""
        check(interpreter)
        self._interpreter, self._plan, self._tell = interpreter, plan, tell
        self._past = 0.0
        self._found = Found(plan, {})

    def run(self) -> Found:
        """Everything, in its order."""
        with tempfile.TemporaryDirectory(prefix="mfsd-") as name, World(Path(name)) as world:
            hosts = world.fabric.hosts
            with contextlib.ExitStack() as stack:
                player = stack.enter_context(Player(hosts[PREFILL], hosts[DECODE]))
                with world.governed(Arm.PLAIN) as governors:
                    pair = stack.enter_context(self._engines(world, governors, Arm.PLAIN))
                    self._step("alone", 5.0)
                    self._found.alone = alone(player, pair)
                    self._arm(Arm.PLAIN, player, pair, governors)
                with world.governed(Arm.RULES) as governors:
                    self._arm(Arm.RULES, player, pair, governors)
            with (
                world.governed(Arm.CONNECTOR) as governors,
                Player(hosts[PREFILL], hosts[DECODE]) as player,
                self._engines(world, governors, Arm.CONNECTOR) as pair,
            ):
                alone(player, pair)  # so that the engines know each other
                self._arm(Arm.CONNECTOR, player, pair, governors)
                if self._plan.kills:
                    self._killed(player, pair, governors)
        return self._found

    def _engines(self, world: World, governors: dict[str, Governor], arm: Arm) -> Pair:
        self._step(f"engines, {arm.words}", START_S)
        return Pair(self._interpreter, world.fabric.hosts, governors, arm, world.folder)

    def _step(self, what: str, seconds: float) -> None:
        self._tell(what, self._past)
        self._past += seconds

    def _arm(self, arm: Arm, player: Player, pair: Pair, governors: Mapping[str, Governor]) -> None:
        for beside in self._plan.beside:
            self._step(f"{arm.words}, beside {beside}", self._plan.cell_s)
            cell = Cell(player, pair, governors, beside)
            self._found.cells[arm, beside] = cell.run(self._work(self._plan.requests), self._plan.quiet_s)

    def _killed(self, player: Player, pair: Pair, governors: Mapping[str, Governor]) -> None:
        """The daemon is killed again and again while requests are served beside a bulk flow."""
        kills = self._plan.kills
        self._step(f"{kills} times kill -9", kills * (UP_S + DOWN_S))
        requests = max(self._plan.requests, round(kills * (UP_S + DOWN_S) / 1.6))
        cell = Cell(player, pair, governors, Beside.BULK_1)
        self._found.killed = cell.run(self._work(requests), 0.0, kills)
        governors[PREFILL].ready()

    def _work(self, requests: int) -> list[tuple[float, Request]]:
        return work(self._found.alone, requests, self._plan.seed)
