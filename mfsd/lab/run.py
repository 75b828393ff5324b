# SPDX-License-Identifier: Apache-2.0
"""The run loop: cells, one after the other, each with a file of its own, so that an interrupted run goes on."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from mfsd.lab.arms import arm_of
from mfsd.lab.hosts.health import Measure
from mfsd.lab.hosts.machine import commit
from mfsd.lab.network import Network
from mfsd.lab.requests import requests
from mfsd.lab.results.result import RESULT, result_of
from mfsd.lab.serving import loop, processes
from mfsd.lab.serving.driver import Played, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from mfsd.lab.results.result import Result
    from mfsd.lab.settings import Settings

EMULATOR: Final = 3
"""Raised when the emulator changes what it measures: results of an earlier one then no longer count."""
DRIVERS: Final[dict[str, Callable[[Task], Played]]] = {
    "conduits": loop.play,
    "sockets": processes.play,
    "real": processes.play,
}
CHANGE_S: Final = {"conduits": 5.0, "sockets": 3.0, "real": 12.0}
"""Between arms: daemons and serving processes end, others start."""


def run(
    network: Network, settings: Settings, on_progress: Callable[[float], None] = lambda _s: None
) -> tuple[Result, Played]:
    """Run a cell on a network of its hosts. ``on_progress`` is told the seconds of replay. Raises LabError."""
    work = requests(settings)
    network.govern(arm_of(settings.arm), settings)
    measure = Measure(network.governors.values())
    played = DRIVERS[settings.transport](Task(network, settings, work, measure, on_progress))
    return result_of(settings, work, played, measure, dict(network.fabric.applied)), played


def run_all(
    folder: Path,
    cells: Sequence[Settings],
    on_progress: Callable[[Settings, float, int], None],
    on_played: Callable[[Result, Played], None] = lambda _r, _p: None,
    *,
    again: bool = False,
) -> None:
    """Run cells in the order given and keep their results. ``on_progress`` gets the cell, its seconds, its number.

    ``again``: try once more what the machine spoilt, and keep it with its problems if that does not help.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for _, group in itertools.groupby(enumerate(cells), key=lambda pair: pair[1].links):
        numbered = list(group)
        with Network(numbered[0][1]) as network:
            for number, cell in numbered:

                def tell(s: float, cell: Settings = cell, number: int = number) -> None:
                    on_progress(cell, s, number)

                tell(0.0)
                found = run(network, cell, tell)
                if again and not found[0].health.ok:
                    found = min(found, run(network, cell, tell), key=lambda pair: len(pair[0].health.problems))
                result = replace(found[0], identity=identity(cell), commit=commit())
                path = path_of(folder, cell)
                partial = path.with_suffix(".part")
                partial.write_bytes(RESULT.dump_json(result))
                partial.replace(path)
                on_played(result, found[1])


def path_of(folder: Path, cell: Settings) -> Path:
    """File of a cell's result."""
    return folder / f"{cell.name}.json"


def load(folder: Path, cell: Settings) -> Result | None:
    """A result from an earlier run of the very same cell; None if there is none."""
    try:
        result = RESULT.validate_json(path_of(folder, cell).read_bytes())
    except (FileNotFoundError, ValidationError):  # the latter: of another version
        return None
    return result if result.identity == identity(cell) else None


def results(folder: Path, cells: Iterable[Settings]) -> list[Result]:
    """Those of cells that have been run."""
    return [r for r in (load(folder, c) for c in cells) if r is not None]


def identity(cell: Settings) -> str:
    """All that decides what is run: a file made with other settings must not pass for this cell's."""
    arm = arm_of(cell.arm)
    # Without defaults, so that a new field of arms leaves the files of those that don't use it valid.
    told = {f.name: getattr(arm, f.name) for f in fields(arm) if getattr(arm, f.name) != f.default}
    told["title"] = ""
    return repr((EMULATOR, cell, told))


def seconds(cells: Sequence[Settings]) -> float:
    """About how long they take."""
    changes = [b for a, b in itertools.pairwise(cells) if a.arm != b.arm] + list(cells[:1])
    each = sum(c.duration + min(c.patience, 8.0) / 2 for c in cells)
    return each + sum(CHANGE_S[c.transport] for c in changes)
