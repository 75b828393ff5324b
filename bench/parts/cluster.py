# SPDX-License-Identifier: Apache-2.0
"""What yielding brings the cluster lab behind a FIFO switch, as share of what three DSCP classes bring.

Of a policy, over the loads in the middle: deadlines met by fair sharing, with the policy behind a FIFO switch, the same
with network.yield, and with the policy and three strict classes. Cells are those of ``mfsd-lab full``, in the same
folder: what has been run there is not run again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from bench.common import ROOT, Figure
from mfsd.lab.matrix import in_order
from mfsd.lab.results.figures import summary
from mfsd.lab.run import load, results, run_all
from mfsd.lab.settings import PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.lab.settings import Settings

FOLDER: Final = ROOT / "build" / "lab" / "cells"
HALF: Final = 0.5


def _cells(policy: str, regimes: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Settings]]:
    """Of each way of governing."""
    bases = [replace(p.settings, load=p.loads[1], seed=s) for p in (PRESETS[r] for r in regimes) for s in seeds]
    fifo = [replace(c, switch="fifo") for c in bases]
    ways = {
        "fair": ("none", bases),
        "bands": (policy, fifo),
        "yield": (f"{policy}-yield", fifo),
        "classes": (policy, bases),
    }
    return {way: [replace(c, arm=arm) for c in cells] for way, (arm, cells) in ways.items()}


def cluster(policy: str, regimes: Sequence[str], seeds: Sequence[int], tell: Callable[[str], None]) -> list[Figure]:
    """All figures of one policy. Raises LabError."""
    ways = _cells(policy, regimes, seeds)
    todo = [c for c in in_order(c for cells in ways.values() for c in cells) if load(FOLDER, c) is None]
    run_all(FOLDER, todo, lambda cell, _s, _number: tell(cell.name), again=True)
    found = {way: results(FOLDER, cells) for way, cells in ways.items()}
    each = {way: [summary(r) for r in of] for way, of in found.items()}
    met = {way: sum(s["deadlines_met"] for s in of) / sum(s["requests"] for s in of) for way, of in each.items()}
    name = f"cluster_{policy}".replace("-", "_")
    gain = met["classes"] - met["fair"]
    share = (met["yield"] - met["fair"]) / gain if gain > 0 else None
    out = [Figure(f"{name}_met_{way}", met[way], "", met["fair"]) for way in ways]
    if share is not None:
        bands = (met["bands"] - met["fair"]) / gain
        out.append(Figure.against(f"{name}_share_of_classes", share, "", target=HALF, want="at least", baseline=bands))
    spoilt = sum(not r.health.ok for of in found.values() for r in of)
    return [*out, Figure(f"{name}_spoilt_cells", spoilt, "cells")]
