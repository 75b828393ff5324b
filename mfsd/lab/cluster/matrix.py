# SPDX-License-Identifier: Apache-2.0
"""Which cells are run, and in which order. Every cell has a file, so an interrupted run goes on where it was."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from mfsd.lab.cluster import arms
from mfsd.lab.cluster.arms import ARMS
from mfsd.lab.cluster.cell import PATIENCE_S, SETTLE_S, Cell, run
from mfsd.lab.cluster.jobs import Work
from mfsd.lab.cluster.regimes import REGIMES
from mfsd.lab.hosts.network import Network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

SEEDS: Final = (0, 1, 2)
DURATION_S: Final = 12.0
QUICK_S: Final = 11.0
QUICK_REGIME: Final = "several"
QUICK_ARMS: Final = ("none", "two-class", "karuna", "mfs", "ladder-net")
EMULATOR: Final = 2
"""Raised when the emulator changes what it measures: results of an earlier one then no longer count."""
CHANGE_S: Final = 5.0
"""Between arms: eight daemons end and eight others start."""


@dataclass(frozen=True, slots=True)
class Part:
    """A named set of cells."""

    name: str
    title: str
    cells: tuple[Cell, ...]


def quick() -> Part:
    """Two loads of one regime, one seed: a few minutes."""
    loads = REGIMES[QUICK_REGIME].loads[:2]
    cells = [Cell(a, QUICK_REGIME, Work(QUICK_S, load=load), tag="quick") for a in QUICK_ARMS for load in loads]
    return Part("quick", "one regime, two loads, one seed", tuple(cells))


def full() -> list[Part]:
    """Everything, most important first."""
    middle = {r.name: r.loads[1] for r in REGIMES.values()}

    def grid(
        names: Iterable[str], *, regimes: Sequence[str] = tuple(REGIMES), loads: Sequence[float] = (), **more: Any
    ) -> tuple[Cell, ...]:
        names, setting = tuple(names), more.pop("setting", "classes")
        return tuple(
            Cell(arm, regime, Work(DURATION_S, seed, load, **more), setting)
            for seed in SEEDS
            for arm in names
            for regime in regimes
            for load in (loads or REGIMES[regime].loads)
        )

    def at_middle(names: Iterable[str], **more: Any) -> tuple[Cell, ...]:
        names = tuple(names)
        return tuple(c for r, load in middle.items() for c in grid(names, regimes=[r], loads=[load], **more))

    few = ("none", "two-class", "mfs", "ladder-net")
    fair = at_middle(["none"])  # as a reference; what the switch could tell apart does not concern it
    return [
        Part("main", "policies, regimes and loads", grid(arms.MAIN)),
        Part("fifo", "host enforcement alone: FIFO switch", (*fair, *at_middle(few[1:], setting="fifo"))),
        Part("levels", "a switch class per band", (*fair, *at_middle(few[1:], setting="levels"))),
        Part(
            "ablation",
            "MFS and the ladder, each part alone off or on",
            (
                *fair,
                *at_middle(("mfs", *arms.ABLATION, "mfs-nop1", "mfs-giveup", "ladder", "ladder-rli", "ladder-keep")),
            ),
        ),
        Part(
            "fit",
            "the ladder fitted to the network, step by step",
            (*fair, *at_middle(("two-class", "ladder", *arms.FIT, "ladder-net"))),
        ),
        Part(
            "sensitivity",
            "parameters, wrong hints, cross traffic",
            (*fair, *at_middle(("mfs", "ladder-net", *arms.SENSITIVITY))),
        ),
        Part("slo", "SLO scale", tuple(c for s in (1.5, 2.0, 5.0) for c in at_middle(few, slo_scale=s))),
        Part("mixed", "20 % tight, 80 % loose deadlines", at_middle(few, tight=0.2)),
        Part("poisson", "Poisson arrivals", at_middle(few, poisson=True)),
    ]


def seconds(cells: Sequence[Cell]) -> float:
    """About how long they take."""
    changes = sum(a.arm != b.arm for a, b in itertools.pairwise(cells)) + 1
    return sum(c.work.duration + SETTLE_S + PATIENCE_S / 2 for c in cells) + changes * CHANGE_S


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Seed by seed, so that an interrupted run is as balanced as can be.

    Within a seed arm by arm, to start few daemons; every other seed has the arms in reverse, so that no arm is always
    measured last.
    """
    found = list(dict.fromkeys(cells))
    rank = {name: i for i, name in enumerate(ARMS)}

    def key(cell: Cell) -> tuple[Any, ...]:
        seed, links = cell.work.seed, REGIMES[cell.regime].cluster.links
        return seed, cell.setting, links, rank[cell.arm] if seed % 2 == 0 else -rank[cell.arm]

    return sorted(found, key=key)


def path_of(folder: Path, cell: Cell) -> Path:
    """File of a cell's result."""
    return folder / "cells" / f"{cell.name}.json"


def load(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A result from an earlier run of the very same cell and cluster; None if there is none."""
    path = path_of(folder, cell)
    if not path.exists():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data if data.get("of") == identity(cell) else None


def identity(cell: Cell) -> str:
    """All that decides what is run: a file made with other settings must not pass for this cell's."""
    arm = ARMS[cell.arm]
    # Without defaults, so that a new field of arms leaves the files of those that don't use it valid.
    told = {f.name: getattr(arm, f.name) for f in fields(arm) if getattr(arm, f.name) != f.default}
    told["title"] = ""
    return repr((EMULATOR, cell, replace(REGIMES[cell.regime], title="", loads=()), told))


def results(folder: Path, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Those of cells that have been run."""
    return [r for r in (load(folder, c) for c in cells) if r is not None]


def run_all(folder: Path, todo: Sequence[Cell], commit: str, on_progress: Callable[[Cell, float, int], None]) -> None:
    """Run cells in the order given and keep their results. ``on_progress`` gets the cell, its seconds, its number.

    A run that the machine spoilt is tried once more, and kept with its problems if that does not help.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    numbered = enumerate(todo)
    for _, group in itertools.groupby(numbered, key=lambda pair: REGIMES[pair[1].regime].cluster.links):
        cells = list(group)
        with Network(REGIMES[cells[0][1].regime].cluster) as network:
            for number, cell in cells:

                def tell(s: float, cell: Cell = cell, number: int = number) -> None:
                    on_progress(cell, s, number)

                tell(0.0)
                result = run(network, cell, tell)
                if not result["health"]["ok"]:
                    again = run(network, cell, tell)
                    result = min(result, again, key=lambda r: len(r["health"]["problems"]))
                result |= {"of": identity(cell), "commit": commit}
                path = path_of(folder, cell)
                partial = path.with_suffix(".part")
                partial.write_text(json.dumps(result), encoding="utf-8")
                partial.replace(path)
