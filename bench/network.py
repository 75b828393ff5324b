# SPDX-License-Identifier: Apache-2.0
"""What levels are worth at a switch port that no host governs, and what they cost; in parts.

``port`` is the network experiment (mfsd/lab/fifo.py): 64 deferred connections from four hosts, a port of the senders'
rate with 50 ms of buffer. ``slowdown_*``: time of an urgent message over its time alone. ``used_share``: what the
deferred connections make of the rest. ``jain``: how evenly they share it. ``remote_promotion_*``: from before the hint
to the first 10 ms in which the promoted connection has 90 % of the port; what takes longer than 500 ms counts as that.
``promotion_told_p50_ms``: what of it the hint took until the connection was in its band, which has nothing to do with
the network. ``promotion_rescues``: how often the daemon freed a lane of its own, as share of the promotions. Baselines
are those of bands alone; ``classes_*`` are the same figures with strict classes in the switch, the best that there is.
Figures at 1 Gbit/s end in ``_1g``. Rounds of the three arms are interleaved, each in a cluster of its own.

``cost`` and ``reverse`` (bench/parts/manners.py): what it costs connections that need not yield, and what a busy way
back costs those that do. ``rescue``: promotions on the own link, with rescue and without. ``cluster``
(bench/parts/cluster.py): deadlines met in the cluster lab; a minute and a half per policy, regime and seed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Literal

import click
import numpy as np
from rich.progress import Progress

from bench.common import Figure, write
from bench.parts import cluster, manners
from mfsd.ground.units import Rate
from mfsd.lab import promotion
from mfsd.lab.fifo import WATCH_S, How, Outcome, Settings, run
from mfsd.lab.hosts.machine import take_precedence
from mfsd.lab.hosts.net import LabError
from mfsd.lab.settings import REGIMES
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ARMS: Final[tuple[How, ...]] = ("bands", "yield", "classes")
PARTS: Final = ("port", "cost", "reverse", "rescue", "cluster")
DEFAULT_FLOWS: Final = 64
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
    told = {how: float(np.median([ms for o in outcomes for ms in o.told_ms])) for how, outcomes in seen.items()}
    rescued = {how: sum(o.rescues for o in os) / sum(len(o.told_ms) for o in os) for how, os in seen.items()}
    return [
        *out,
        Figure(f"promotion_told_p50_ms{suffix}", told["yield"], "ms", told["bands"]),
        Figure(f"promotion_rescues{suffix}", rescued["yield"], "", rescued["bands"]),
    ]


def port(rates: Sequence[str], rounds: int, flows: int, messages: int, promotions: int) -> list[Figure]:
    """The three arms at a switch's port, interleaved."""
    out: list[Figure] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("clusters", total=len(rates) * rounds * len(ARMS))
        for rate in rates:
            seen: dict[How, list[Outcome]] = {how: [] for how in ARMS}
            for _ in range(rounds):
                for how in ARMS:
                    n, p = (messages, promotions) if how != "bands" else (messages // SLOW, promotions // SLOW)
                    settings = Settings(how, Rate.parse(rate), flows, max(n, 3), max(n // 3, 2), max(p, 2))
                    seen[how].append(run(settings))
                    progress.advance(task)
            out += figures("" if rate == "200mbit" else "_1g", seen, targets=flows == DEFAULT_FLOWS)
    return out


def rescue(trials: int) -> list[Figure]:
    """Promotions at the own link that another connection saturates: with rescue and without, of those that yield.

    Baselines are of those that don't. ``yield_rescued_share``: of the promotions, in how many the daemon freed a lane.
    """
    seen = {}
    for yields in (True, False):
        for wanted in (True, False):
            watch = 0.5 if wanted else 2.0
            s = promotion.Settings(
                64, wanted, trials if wanted else trials // 2, watch, Rate.parse("1gbit"), yields=yields
            )
            found = promotion.run(s)
            late = [watch * 1000 if t.latency_ms is None else t.latency_ms for t in found]
            seen[yields, wanted] = float(np.median(late)), sum(t.rescued for t in found) / len(found)
    return [
        Figure("yield_rescue_p50_ms", seen[True, True][0], "ms", seen[False, True][0]),
        Figure("yield_plain_p50_ms", seen[True, False][0], "ms", seen[False, False][0]),
        Figure("yield_rescued_share", seen[True, True][1], "", seen[False, True][1]),
    ]


def clusters(regimes: Sequence[str], seeds: Sequence[int]) -> list[Figure]:
    """Deadlines met in the cluster lab, under the default policy and two-class."""
    out: list[Figure] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=None)
        for policy in (registry.DEFAULT, "two-class"):
            out += cluster.cluster(policy, regimes, seeds, lambda name: progress.update(task, description=name))
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True,
              help="Only these (repeatable): build/bench/network-PART.json. All but cluster if not given.")  # fmt: skip
@click.option("--rounds", default=3, show_default=True, help="Clusters per arm and rate.")
@click.option("--flows", default=DEFAULT_FLOWS, show_default=True, help="Deferred connections, a multiple of four.")
@click.option("--messages", default=30, show_default=True, help="Urgent messages of 134 KB per round; of 2 MB a third.")
@click.option("--promotions", default=10, show_default=True, help="Promotions per round.")
@click.option("--rate", "rates", type=click.Choice(["200mbit", "1gbit"]), multiple=True, help="Both if not given.")
@click.option(
    "--regime", "regimes", type=click.Choice(REGIMES), multiple=True, help="Of the cluster lab; several if not given."
)
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="Of the cluster lab; 0 if not given.")
def main(rounds: int, flows: int, messages: int, promotions: int, **given: Sequence[Any]) -> None:
    """Benchmark the network: build/bench/network.json."""
    if flows < 4 or flows % 4:
        raise click.BadParameter(f"{flows}: must be a multiple of four", param_hint="--flows")
    parts = given["parts"] or [p for p in PARTS if p != "cluster"]
    run_part: dict[str, Callable[[], list[Figure]]] = {
        "port": lambda: port(given["rates"] or ("200mbit", "1gbit"), rounds, flows, messages, promotions),
        "cost": manners.costs,
        "reverse": manners.reverse,
        "rescue": lambda: rescue(promotions),
        "cluster": lambda: clusters(given["regimes"] or ("several",), given["seeds"] or (0,)),
    }
    try:
        take_precedence()
        out = [figure for part in parts for figure in run_part[part]()]
    except LabError as e:
        sys.exit(f"bench network: {e}")
    write("-".join(["network", *given["parts"]]), out)


if __name__ == "__main__":
    main()
