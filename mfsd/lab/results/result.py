# SPDX-License-Identifier: Apache-2.0
"""What is kept of a cell, whichever driver and transport it ran on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import TypeAdapter

from mfsd.lab.hosts.health import verdict
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.requests import Request, link_loads
from mfsd.lab.settings import Settings  # noqa: TC001 - pydantic needs it

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from mfsd.lab.hosts.health import Measure
    from mfsd.lab.serving.driver import Played

BIN_S: Final = 0.1


@dataclass(frozen=True)
class Served(Request):
    """A request and what became of it; seconds since the beginning of the replay, None: never."""

    counted: bool = True
    began: float | None = None
    """Of its forward pass."""
    computed: float | None = None
    """End of it."""
    done: float | None = None
    """First token: its KV is complete at the decode host."""

    @property
    def deadline(self) -> float:
        """When its first token is due."""
        return self.at + self.slo

    @property
    def ttft(self) -> float:
        """Seconds; inf: never."""
        return math.inf if self.done is None else self.done - self.at

    @property
    def met(self) -> bool:
        """In time."""
        return self.ttft <= self.slo


@dataclass
class Health:
    """Was it the network that was measured? ``problems``: why not."""

    problems: list[str]
    figures: dict[str, float]

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.problems


@dataclass
class Result:
    """One cell; durations in seconds. JSON-able by ``RESULT``."""

    settings: Settings
    elapsed: float
    """Of the replay; what is not done by then never is."""
    requests: list[Served]
    collectives: list[tuple[float, float, int]]
    """Beginning, duration until the last rank has everything, bytes per pair of ranks."""
    fetch_waits: list[float]
    """Time a step stood still because cached KV had not come."""
    offered: dict[str, float]
    """Payload offered to each link ("p0 out"), as a share of what it carries..."""
    used: dict[str, float]
    """...and what it carried while requests arrived."""
    counters: dict[str, int]
    """The daemons' own."""
    hints: dict[str, int]
    """client.Stats."""
    health: Health
    sysctls: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    identity: str = ""
    """All that decided what was run."""

    @property
    def counted(self) -> list[Served]:
        """The requests that count."""
        return [r for r in self.requests if r.counted]


RESULT: Final = TypeAdapter(Result)


def result_of(
    settings: Settings, work: Sequence[Request], played: Played, measure: Measure, sysctls: dict[str, str]
) -> Result:
    """What has come out of a cell."""
    log, begin = played.log, played.begin
    elapsed = measure.ended - begin
    bins = link_bins(settings, played.arrivals, begin, elapsed)
    arriving = max(int(work[-1].at / BIN_S), 1)
    figures = {
        **measure.figures,
        "emulator_cpu": played.cpu_s / elapsed,
        "overslept": log.overslept / log.passes if log.passes else 0.0,
        "arrival_late_p99_ms": float(np.percentile(log.late, 99)) * 1000 if log.late else 0.0,
        "link_peak": max((float(row.max()) for row in bins.values() if len(row)), default=0.0),
    }

    def at(times: dict[int, float], request: Request) -> float | None:
        return times[request.id] - begin if request.id in times else None

    return Result(
        settings=settings,
        elapsed=elapsed,
        requests=[
            Served(
                **vars(r), counted=r.at >= settings.warm_up, began=at(log.began, r), computed=at(log.computed, r),
                done=at(log.done, r),
            )
            for r in work
        ],
        collectives=[(round(a - begin, 5), round(b - a, 6), size) for a, b, size in log.exchanges.values()],
        fetch_waits=[round(w, 6) for w in log.fetch_waits],
        offered=_rounded(link_loads(settings, work, settings.duration)),
        used=_rounded({link: float(row[:arriving].mean()) for link, row in bins.items()}),
        counters=measure.counters,
        hints=played.hints,
        health=Health(verdict(figures), _rounded(figures)),
        sysctls=sysctls,
    )  # fmt: skip


def link_bins(
    settings: Settings, arrivals: npt.NDArray[Any], begin: float, seconds: float
) -> dict[str, npt.NDArray[np.float64]]:
    """Payload per tenth of a second of each link, "p0 out", over what it can carry, shape (bins,).

    Where the switch has no queues, nothing limits what comes into a host.
    """
    conduits, count = settings.conduits(), max(int(np.ceil(seconds / BIN_S)), 1)
    out: dict[str, npt.NDArray[np.float64]] = {}
    for way, ends in (("out", [c.src for c in conduits]), ("in", [c.dst for c in conduits])):
        if way == "in" and settings.switch == "none":
            continue
        host_of = np.array(ends)[arrivals["conduit"]]
        for host in settings.hosts:
            full = settings.rate_of(host).bytes_per_s * EFFICIENCY * BIN_S
            out[f"{host} {way}"] = binned(arrivals[host_of == host], begin, count, BIN_S) / full
    return out


def binned(arrivals: npt.NDArray[Any], start: float, count: int, width: float) -> npt.NDArray[np.float64]:
    """Bytes per bin of ``width`` seconds from ``start``, shape (count,)."""
    number = np.floor((arrivals["at"] - start) / width).astype(np.int64)
    inside = (number >= 0) & (number < count)
    sizes = arrivals["size"][inside].astype(np.float64)
    return np.bincount(number[inside], sizes, minlength=count).astype(np.float64)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in figures.items()}
