# SPDX-License-Identifier: Apache-2.0
"""The cells of the cluster lab, and in which order they are run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from mfsd.lab import arms
from mfsd.lab.arms import ARMS
from mfsd.lab.settings import PRESETS, REGIMES, Settings
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SEEDS: Final = (0, 1, 2)
QUICK_S: Final = 11.0
QUICK_REGIME: Final = "several"
QUICK_ARMS: Final = ("none", "two-class", "mfs", "ladder-net", registry.DEFAULT)


@dataclass(frozen=True, slots=True)
class Part:
    """A named set of cells."""

    name: str
    title: str
    cells: tuple[Settings, ...]


def quick() -> list[Settings]:
    """Two loads of one regime, one seed: a few minutes."""
    preset = PRESETS[QUICK_REGIME]
    return in_order(
        replace(preset.settings, arm=arm, load=load, duration=QUICK_S)
        for arm in QUICK_ARMS
        for load in preset.loads[:2]
    )


def _grid(names: Iterable[str], regime: str, loads: Sequence[float], **more: Any) -> tuple[Settings, ...]:
    return tuple(
        replace(PRESETS[regime].settings, arm=arm, load=load, seed=seed, **more)
        for seed in SEEDS
        for arm in names
        for load in loads
    )


def _at_middle(names: Iterable[str], **more: Any) -> tuple[Settings, ...]:
    names = tuple(names)
    return tuple(c for r in REGIMES for c in _grid(names, r, [PRESETS[r].loads[1]], **more))


def full() -> list[Part]:
    """Everything, most important first."""
    few = ("none", "two-class", "mfs", "ladder-net", registry.DEFAULT)
    fair = _at_middle(["none"])  # as a reference; what the switch could tell apart does not concern it
    ablation = ("mfs", *arms.ABLATION, "mfs-nop1", "mfs-giveup", "ladder", "ladder-rli", "ladder-keep")
    fit = ("two-class", "ladder", *arms.FIT, "ladder-net")
    return [
        Part("main", "policies, regimes and loads",
             tuple(c for r in REGIMES for c in _grid(arms.MAIN, r, PRESETS[r].loads))),
        Part("fifo", "host enforcement alone: FIFO switch", (*fair, *_at_middle(few[1:], switch="fifo"))),
        Part("yield", "FIFO switch: deferred connections that yield, beside bands alone",
             (*fair, *_at_middle(("demand-bound", "two-class", *arms.YIELD), switch="fifo"))),
        Part("levels", "a switch class per band", (*fair, *_at_middle(few[1:], switch="levels"))),
        Part("ablation", "MFS and the ladder, each part alone off or on", (*fair, *_at_middle(ablation))),
        Part("fit", "the ladder fitted to the network, step by step", (*fair, *_at_middle(fit))),
        Part("sensitivity", "parameters, wrong hints, cross traffic",
             (*fair, *_at_middle(("mfs", "ladder-net", registry.DEFAULT, *arms.SENSITIVITY)))),
        Part("slo", "SLO scale", tuple(c for s in (1.5, 2.0, 5.0) for c in _at_middle(few, slo_scale=s))),
        Part("mixed", "20 % tight, 80 % loose deadlines", _at_middle(few, tight=0.2)),
        Part("poisson", "Poisson arrivals", _at_middle(few, arrivals="poisson")),
    ]  # fmt: skip


def in_order(cells: Iterable[Settings]) -> list[Settings]:
    """Seed by seed, so that an interrupted run is as balanced as can be.

    Within a seed arm by arm, to start few daemons; every other seed has the arms in reverse, so that no arm is always
    measured last.
    """
    rank = {name: i for i, name in enumerate(ARMS)}

    def key(cell: Settings) -> tuple[Any, ...]:
        position = rank.get(cell.arm, len(rank))
        return cell.seed, cell.switch, cell.links, position if cell.seed % 2 == 0 else -position

    return sorted(dict.fromkeys(cells), key=key)
