# SPDX-License-Identifier: Apache-2.0
"""How soon a promotion takes effect while others saturate the link, with rescue and with plain re-classification.

The experiment is mfsd/lab/promotion.py: native htb at 1 Gbit/s, one leaf queue per deferred connection, cubic, the
kernel's default timers, the real daemon, hints over gRPC, all at nice -10. Plain is the same with ``rescue.enabled =
false``, watched for a bounded time: what has not happened by then counts as that time (``plain_censored`` says how
often), so plain_p50_ms and speedup_p50 are lower bounds then. It takes so long that it gets fewer promotions
(``plain_trials``).

Retransmissions are given in GSO segments: TCP's counter of segments (1448 bytes) divided by the 45 that make up a full
GSO segment of 64 KiB. ``bystander_rtos`` is the mean number of retransmission timeouts on all other deferred
connections together in the 0.3 s after a promotion, plain as its baseline.
"""

from __future__ import annotations

import functools
import sys
from typing import Final, Literal

import click
import numpy as np
from rich.progress import Progress

from bench.common import Figure, write
from mfsd.ground.units import Rate
from mfsd.lab.hosts.machine import take_precedence
from mfsd.lab.hosts.net import LabError
from mfsd.lab.hosts.tcp import MSS
from mfsd.lab.promotion import Settings, Trial, run

GSO_SEGMENTS: Final = 65536 // MSS


def percentile(values: list[float], q: float) -> float:
    """Smallest measured value that ``q`` per cent do not exceed: no interpolation towards censored values."""
    return float(np.percentile(values, q, method="inverted_cdf"))


def latencies(trials: list[Trial], watch: float) -> list[float]:
    """In ms; what was not seen within ``watch`` seconds counts as that."""
    return [watch * 1000 if t.latency_ms is None else t.latency_ms for t in trials]


def figures(
    suffix: str, rescue: list[Trial], plain: list[Trial], rescue_watch: float, plain_watch: float
) -> list[Figure]:
    """All figures of one case; only that without a suffix (64 flows) has targets."""
    slow, fast = latencies(plain, plain_watch), latencies(rescue, rescue_watch)
    plain_p50, p50 = percentile(slow, 50), percentile(fast, 50)
    # Latencies are whole milliseconds, rounded down; half a millisecond stands for 0 in the ratio.
    speedup = plain_p50 / max(p50, 0.5)
    repeated = percentile([t.retransmitted / GSO_SEGMENTS for t in rescue], 99)
    rtos, plain_rtos = (float(np.mean([t.bystander_rtos for t in series])) for series in (rescue, plain))
    goodput, plain_goodput = (float(np.mean([t.bystander_mbps for t in series])) for series in (rescue, plain))
    p99 = percentile(fast, 99)
    plain_repeated = percentile([t.retransmitted / GSO_SEGMENTS for t in plain], 99)

    def figure(
        name: str,
        value: float,
        unit: str,
        target: float,
        want: Literal["at most", "at least"],
        base: float | None = None,
    ) -> Figure:
        ratio = value / base if base else None
        if suffix:
            return Figure(name + suffix, value, unit, base, ratio)
        return Figure.against(name, value, unit, target=target, want=want, baseline=base, ratio=ratio)

    out = [
        Figure(f"plain_p50_ms{suffix}", plain_p50, "ms"),
        Figure(f"rescue_p50_ms{suffix}", p50, "ms", plain_p50, p50 / plain_p50),
        figure("rescue_p99_ms", p99, "ms", 10, "at most", percentile(slow, 99)),
        figure("speedup_p50", speedup, "x", 100, "at least"),
        figure("retransmitted_segments_p99", repeated, "GSO segments", 2, "at most", plain_repeated),
        Figure(f"retransmitted_bytes_p99{suffix}", repeated * GSO_SEGMENTS * MSS, "B"),
    ]
    if not suffix:
        out += [
            figure("bystander_rtos", rtos, "per promotion", plain_rtos, "at most", plain_rtos),
            Figure("bystander_goodput_mbps", goodput, "Mbit/s", plain_goodput, goodput / plain_goodput),
        ]
    out += [
        Figure(f"promoted_rtos{suffix}", float(np.mean([t.rtos for t in rescue])), "per promotion"),
        Figure(f"rescue_trials{suffix}", len(rescue), "promotions"),
        Figure(f"rescue_censored{suffix}", sum(t.latency_ms is None for t in rescue), "promotions"),
        Figure(f"plain_trials{suffix}", len(plain), "promotions"),
        Figure(f"plain_censored{suffix}", sum(t.latency_ms is None for t in plain), "promotions"),
        Figure(f"plain_watch_ms{suffix}", plain_watch * 1000, "ms"),
    ]
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--trials", default=60, show_default=True, help="Promotions with rescue, per case.")
@click.option("--plain-trials", default=15, show_default=True, help="Promotions by plain re-classification, per case.")
@click.option("--watch", default=3.0, show_default=True, help="Seconds that plain re-classification is watched.")
def main(trials: int, plain_trials: int, watch: float) -> None:
    """Benchmark promotion: build/bench/promotion.json."""
    rate, rescue_watch = Rate.parse("1gbit"), 0.5
    out: list[Figure] = []
    try:
        take_precedence()
        with Progress(transient=True) as progress:
            for flows, suffix in ((64, ""), (1, "_1")):
                series = {}
                for rescue, count, seconds in ((True, trials, rescue_watch), (False, plain_trials, watch)):
                    task = progress.add_task(f"{flows} deferred, {'rescue' if rescue else 'plain'}", total=count)
                    advance = functools.partial(progress.advance, task)
                    series[rescue] = run(Settings(flows, rescue, count, seconds, rate), advance)
                out += figures(suffix, series[True], series[False], rescue_watch, watch)
    except LabError as e:
        sys.exit(f"bench promotion: {e}")
    write("promotion", out)


if __name__ == "__main__":
    main()
