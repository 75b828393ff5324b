# SPDX-License-Identifier: Apache-2.0
"""What levels are worth at a switch port that no host governs: the network experiment (mfsd/lab/fifo.py).

64 deferred connections from four hosts, a port of the senders' rate with 50 ms of buffer. ``slowdown_*``: time of an
urgent message over its time alone. ``used_share``: what the deferred connections make of the rest. ``jain``: how evenly
they share it. ``remote_promotion_*``: from before the hint to the first 10 ms in which the promoted connection has 90 %
of the port; what takes longer than 500 ms counts as that. Baselines are those of bands alone; ``classes_*`` are the
same figures with strict classes in the switch, the best that there is. Figures at 1 Gbit/s end in ``_1g``.

Rounds of the three arms are interleaved, each in a cluster of its own.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Literal

import click
import numpy as np
from rich.progress import Progress

from bench.common import Figure, write
from mfsd.ground.units import Rate
from mfsd.lab.fifo import WATCH_S, How, Outcome, Settings, run
from mfsd.lab.hosts.machine import take_precedence
from mfsd.lab.hosts.net import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

ARMS: Final[tuple[How, ...]] = ("bands", "yield", "classes")
SLOW: Final = 5
"""Messages behind a full buffer take long, so that there are only one in so many with bands alone."""
Want = Literal["at most", "at least"]
TARGETS: Final[dict[str, dict[str, tuple[float, Want]]]] = {
    "": {
        "slowdown_134k_p50": (2.0, "at most"), "slowdown_2m_p50": (1.2, "at most"), "used_share": (0.93, "at least"),
        "jain": (0.9, "at least"), "remote_promotion_p50_ms": (20, "at most"),
        "remote_promotion_p99_ms": (80, "at most"),
    },
    "_1g": {
        "slowdown_134k_p50": (2.0, "at most"), "slowdown_2m_p50": (1.15, "at most"), "used_share": (0.98, "at least"),
        "jain": (0.9, "at least"), "remote_promotion_p50_ms": (10, "at most"),
        "remote_promotion_p99_ms": (50, "at most"),
    },
}  # fmt: skip
UNITS: Final = {"slowdown_134k_p50": "x", "slowdown_2m_p50": "x", "used_share": "", "jain": ""}


def values(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The figures of one arm, all its rounds together."""
    promotions = [WATCH_S * 1000 if ms is None else ms for o in outcomes for ms in o.promotions_ms]
    p50, p99 = (float(np.percentile(promotions, q, method="inverted_cdf")) for q in (50, 99))
    return {
        "slowdown_134k_p50": float(np.median([x for o in outcomes for x in o.small])),
        "slowdown_2m_p50": float(np.median([x for o in outcomes for x in o.large])),
        "used_share": float(np.mean([o.used for o in outcomes])),
        "jain": float(np.mean([o.jain for o in outcomes])),
        "remote_promotion_p50_ms": p50,
        "remote_promotion_p99_ms": p99,
    }


def figures(suffix: str, seen: dict[How, list[Outcome]], *, targets: bool) -> list[Figure]:
    """All figures of one rate; targets are for 64 connections."""
    of = {how: values(outcomes) for how, outcomes in seen.items()}
    out = []
    for name, value in of["yield"].items():
        base, unit = of["bands"][name], UNITS.get(name, "ms")
        more: dict[str, Any] = {"baseline": base, "ratio": value / base if base else None}
        if targets:
            target, want = TARGETS[suffix][name]
            out.append(Figure.against(name + suffix, value, unit, target=target, want=want, **more))
        else:
            out.append(Figure(name + suffix, value, unit, **more))
        out.append(Figure(f"classes_{name}{suffix}", of["classes"][name], unit, base))
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=3, show_default=True, help="Clusters per arm and rate.")
@click.option("--flows", default=64, show_default=True, help="Deferred connections, a multiple of four.")
@click.option("--messages", default=30, show_default=True, help="Urgent messages of 134 KB per round; of 2 MB a third.")
@click.option("--promotions", default=10, show_default=True, help="Promotions per round.")
@click.option("--rate", "rates", type=click.Choice(["200mbit", "1gbit"]), multiple=True, help="Both if not given.")
def main(rounds: int, flows: int, messages: int, promotions: int, rates: tuple[str, ...]) -> None:
    """Benchmark the network: build/bench/network.json."""
    if flows < 4 or flows % 4:
        raise click.BadParameter(f"{flows}: must be a multiple of four", param_hint="--flows")
    out: list[Figure] = []
    chosen = rates or ("200mbit", "1gbit")
    try:
        take_precedence()
        with Progress(transient=True) as progress:
            task = progress.add_task("clusters", total=len(chosen) * rounds * len(ARMS))
            for rate in chosen:
                seen: dict[How, list[Outcome]] = {how: [] for how in ARMS}
                for _ in range(rounds):
                    for how in ARMS:
                        n, p = (messages, promotions) if how != "bands" else (messages // SLOW, promotions // SLOW)
                        settings = Settings(how, Rate.parse(rate), flows, max(n, 3), max(n // 3, 2), max(p, 2))
                        seen[how].append(run(settings))
                        progress.advance(task)
                out += figures("" if rate == "200mbit" else "_1g", seen, targets=flows == 64)
    except LabError as e:
        sys.exit(f"bench network: {e}")
    write("network", out)


if __name__ == "__main__":
    main()
