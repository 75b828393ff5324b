# SPDX-License-Identifier: Apache-2.0
"""What the demo shows of a bottleneck elsewhere: the network experiment (fifo.py), small and twice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.ground.units import Rate
from mfsd.lab import fifo
from mfsd.lab.hosts.net import LabError
from mfsd.lab.results import plots
from mfsd.lab.results.report import Section

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BANDS: Final = fifo.Settings("bands", Rate.parse("200mbit"), flows=32, small=8, large=0, promotions=0, steady=0.5)
ARMS: Final = {"bands alone": BANDS, "network.yield": replace(BANDS, how="yield")}
SECONDS: Final = 32.0
"""About how long it takes."""
INTRO: Final = (
    f"The queue is elsewhere: four hosts send to a fifth through a switch's port of {BANDS.rate}, one FIFO, which "
    f"{BANDS.flows} deferred connections fill; urgent messages of {fifo.SMALL // 1000} KB meet them there. Bands order "
    "what leaves a host, and that is not where the queue is; with network.yield the deferred connections keep it short."
)


@dataclass(frozen=True, slots=True)
class Arm:
    """What one arm gave, or why it could not be run."""

    outcome: fifo.Outcome | None
    problem: str = ""

    def median(self) -> float:
        """Of a message's time over that of the same message alone. Only where there is an outcome."""
        assert self.outcome is not None  # noqa: S101 (for mypy)
        return float(np.median(self.outcome.small))


def run(tell: Callable[[str], None]) -> dict[str, Arm]:
    """Both arms by name. ``tell``: is told which is next. An arm that this machine can't run is no failure."""
    out = {}
    for name, settings in ARMS.items():
        tell(name)
        try:
            out[name] = Arm(fifo.run(settings))
        except LabError as e:
            out[name] = Arm(None, str(e))
    return out


def section(arms: Mapping[str, Arm]) -> Section:
    """The panel."""
    out = Section("A bottleneck elsewhere", [("", INTRO)], name="network")
    out.words += [("bad", f"{name} could not be run: {arm.problem}") for name, arm in arms.items() if arm.problem]
    found = {name: arm.outcome for name, arm in arms.items() if arm.outcome is not None}
    if not found:
        return out
    out.rows = [
        ["", *found],
        ["urgent message over the same alone, median", *(f"{arms[name].median():.1f}" for name in found)],
        ["  at worst", *(f"{max(o.small):.1f}" for o in found.values())],
        ["deferred goodput over what was left", *(f"{o.used:.2f}" for o in found.values())],
    ]
    out.figure = plots.strips({name: o.small for name, o in found.items()}, "time of a message over the same alone")
    return out


def data(arms: Mapping[str, Arm]) -> dict[str, Any]:
    """The same for JSON."""
    return {
        name: {"problem": arm.problem}
        if arm.outcome is None
        else {"slowdown_p50": arm.median(), "slowdown": arm.outcome.small, "used_share": arm.outcome.used}
        for name, arm in arms.items()
    }
