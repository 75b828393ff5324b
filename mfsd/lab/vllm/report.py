# SPDX-License-Identifier: Apache-2.0
"""What came of the vLLM experiment: a table, whether its targets were met, pictures, a page."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.figure import Figure

from mfsd.lab.hosts.health import verdict
from mfsd.lab.hosts.machine import NICE, commit, machine
from mfsd.lab.hosts.tcp import CONGESTION
from mfsd.lab.results import report
from mfsd.lab.results.figures import percentiles_ms
from mfsd.lab.results.report import Section
from mfsd.lab.vllm.engine import NICE as ENGINE_NICE
from mfsd.lab.vllm.engine import PROGRESS_US, TOKEN
from mfsd.lab.vllm.hosts import PACKET, RATE, Arm
from mfsd.lab.vllm.play import EXCHANGE, GAP_S, PAUSE_S, SIZES, SLACKS, Beside, Outcome, could_alone, could_in_turn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mfsd.lab.results.report import Rows
    from mfsd.lab.vllm.suite import Found

NAME: Final = "e2e-vllm"
IN_TIME_MIN: Final = 0.9
"""Of requests that could be in time alone, with the connector, beside one bulk flow."""
EXCHANGES_MAX: Final = 2.0
"""Collectives' 99th percentile beside KV over that without."""
COLOURS: Final = {Arm.PLAIN: "#bbbbbb", Arm.RULES: "#4477aa", Arm.CONNECTOR: "#aa3377"}


def exchanges(outcome: Outcome) -> tuple[float, float, float]:
    """Collectives' 99th percentile without KV and with it, in ms, and the ratio; 0 where there were none."""
    (quiet,), (busy,) = percentiles_ms(outcome.quiet, 99), percentiles_ms(outcome.exchanges, 99)
    return quiet, busy, busy / quiet if quiet else 0.0


def of_those(outcome: Outcome, could: Sequence[bool]) -> tuple[int, int]:
    """How many of them were in time, and how many they are."""
    return sum(r.met for r, c in zip(outcome.requests, could, strict=True) if c), sum(could)


def table(found: Found) -> Rows:
    """A row per competitor and arm."""
    rows = [["beside", "arm", "in time", "could alone", "in turn", "tight", "loose", "TTFT p50", "max", "exchange p99",
             "without KV", "ratio", "failed", "CPU", "health"]]  # fmt: skip
    cells = [(beside.value, arm.words, o) for (arm, beside), o in found.cells.items()]
    order = {b.value: i for i, b in enumerate(Beside)}
    cells.sort(key=lambda c: order[c[0]])
    if found.killed is not None:
        cells.append((f"{Beside.BULK_1.value}, kill -9 x {found.killed.kills}", Arm.CONNECTOR.words, found.killed))
    for beside, arm, o in cells:
        quiet, busy, ratio = exchanges(o)
        times = [r.ttft for r in o.requests if r.ttft is not None]
        rows.append(
            [
                beside,
                arm,
                f"{o.met} of {len(o.requests)}",
                str(sum(could_alone(o.requests, found.alone))),
                str(sum(could_in_turn(o.requests, found.alone))),
                *(_share(o, tight=tight) for tight in (True, False)),
                f"{np.median(times):.2f} s" if times else "",
                f"{max(times):.2f} s" if times else "",
                f"{busy:.0f} ms",
                f"{quiet:.0f} ms" if quiet else "",
                f"{ratio:.2f}" if ratio else "",
                str(sum(r.failed for r in o.requests)),
                f"{o.health.get('cpu', 0.0):.0%}",
                "; ".join(verdict(o.health)) or "ok",
            ]
        )
    return rows


def _share(outcome: Outcome, *, tight: bool) -> str:
    some = [r for r in outcome.requests if r.tight == tight]
    return f"{sum(r.met for r in some)}/{len(some)}"


def targets(found: Found) -> list[tuple[bool, str]]:
    """Met or not, and in words."""
    cells, out = found.cells, []
    one = cells.get((Arm.CONNECTOR, Beside.BULK_1))
    if one is not None:
        share = of_those(one, could_alone(one.requests, found.alone))
        turns = of_those(one, could_in_turn(one.requests, found.alone))
        words = (f"connector, beside one bulk flow: {share[0]} of {share[1]} in time that alone could be (target "
                 f"{IN_TIME_MIN:.0%}); {turns[0]} of {turns[1]} that could, one after the other")  # fmt: skip
        out.append((share[0] >= IN_TIME_MIN * share[1], words))
    for arm in (Arm.RULES, Arm.CONNECTOR):
        both = [(cells[arm, b], cells[Arm.PLAIN, b], b) for a, b in cells if a is arm and (Arm.PLAIN, b) in cells]
        fewer = [b.value for ours, plain, b in both if ours.met < plain.met]
        words = f"fewer in time than plain TCP beside {', '.join(fewer)}" if fewer else "never fewer in time than plain"
        out.append((not fewer, f"{arm.words}: {words}"))
        slow = [(b.value, exchanges(o)[2]) for (a, b), o in cells.items() if a is arm]
        worst = max((ratio for _, ratio in slow), default=0.0)
        words = f"{arm.words}: exchanges' p99 at most {worst:.2f} times that without KV (target {EXCHANGES_MAX:g})"
        out.append((worst <= EXCHANGES_MAX, words))
    everything = [*cells.values(), *([found.killed] if found.killed is not None else [])]
    failed, asked = sum(r.failed for o in everything for r in o.requests), sum(len(o.requests) for o in everything)
    kills = found.killed.kills if found.killed is not None else 0
    out.append((not failed, f"{failed} of {asked} requests failed; prefill's daemon was killed {kills} times"))
    rejected = sum(c.get("hints_rejected", 0) for o in everything for c in o.counters.values())
    out.append((not rejected, f"{rejected} hints were rejected"))
    return out


def settings(found: Found) -> list[tuple[str, str, str]]:
    """Name, value, meaning."""
    alone = ", ".join(f"{tokens} tokens: {a.ttft:.2f} s" for tokens, a in found.alone.items())
    handed = ", ".join(f"{tokens} tokens: {a.handed:.2f} s" for tokens, a in found.alone.items())
    return [
        ("rate", str(RATE), "Of the link, the egress of the prefill host."),
        ("requests", str(found.plan.requests), "Of each cell; the same in all."),
        ("sizes", ", ".join(f"{t} tokens, {t * TOKEN >> 20} MiB" for t in SIZES), "Of prompts, and of their KV."),
        ("alone", alone, "Time to the first token with the link to itself, plain TCP, median of three."),
        ("from prefill on", handed, "Of that, from prefill's answer to decode's token."),
        ("objectives", ", ".join(f"{s:g}" for s in SLACKS), "Times that; the first are called tight."),
        ("arrivals", f"every {GAP_S[0]:g} to {GAP_S[1]:g} s", "Evenly distributed."),
        ("exchanges", f"{EXCHANGE >> 10} KiB, {PAUSE_S * 1000:g} ms pause", "Collectives, in all cells, by rule."),
        ("in time", "", "The decode engine's first token within the objective, from the arrival at prefill."),
        ("could alone", "", "In time, had each had the link to itself when prefill was done, whenever that was."),
        ("in turn", "", "And had they had it together: UCX brings the reads of a peer one after the other."),
        ("failed", "", "No token within a minute, or another one than prefill's."),
        ("engines", "vLLM on the CPU, dummy weights", "A Llama with the KV of Llama-3-8B and little to compute."),
        ("transport", "NIXL, UCX, TCP", f"One connection; its progress thread looks every {PROGRESS_US} us."),
        ("packets", f"{PACKET >> 10} KiB", "At most, before segmentation; 64 KiB take a quarter of an exchange."),
        ("congestion", CONGESTION, "Congestion control of all connections."),
        ("nice", f"{NICE}; engines {NICE + ENGINE_NICE}", "Of the processes."),
        ("seed", str(found.plan.seed), "Of requests and arrivals."),
        ("machine", ", ".join(f"{k} {v}" for k, v in machine().items()), "What all of this ran on."),
        ("commit", commit(), "Of the project."),
    ]  # fmt: skip


def in_time(found: Found) -> Figure:
    """Share of requests in time, by competitor and arm."""
    besides = [b for b in Beside if any(b is x for _, x in found.cells)]
    out = Figure(figsize=(2.2 * len(besides) + 2, 3.8), layout="constrained")
    ax: Any = out.subplots()
    for i, arm in enumerate(Arm):
        cells = [found.cells.get((arm, b)) for b in besides]
        shares = [0.0 if o is None else o.met / max(len(o.requests), 1) for o in cells]
        bars = ax.bar([x + (i - 1) * 0.27 for x in range(len(besides))], shares, 0.25, color=COLOURS[arm])
        bars.set_label(arm.words)
    ax.set_xticks(range(len(besides)), [f"beside {b.value}" for b in besides])
    ax.set_ylim(0, 1)
    ax.set_ylabel("requests in time")
    ax.grid(axis="y", alpha=0.3)
    out.legend(loc="outside right upper", fontsize=8)
    return out


def distributions(found: Found) -> Figure:
    """Cumulative: TTFT over its objective, and exchanges; a column per competitor."""
    besides = [b for b in Beside if any(b is x for _, x in found.cells)]
    out = Figure(figsize=(3.4 * len(besides) + 1.6, 6.4), layout="constrained")
    axes: Any = out.subplots(2, len(besides), squeeze=False, sharey=True)
    for column, beside in enumerate(besides):
        for arm in Arm:
            o = found.cells.get((arm, beside))
            if o is None:
                continue
            over = [r.ttft / r.slo for r in o.requests if r.ttft is not None]
            _steps(axes[0, column], over, len(o.requests), arm)
            _steps(axes[1, column], [e * 1000 for e in o.exchanges], len(o.exchanges), arm)
        axes[0, column].axvline(1.0, color="#000000", linewidth=0.8)
        axes[0, column].set_title(f"beside {beside.value}", fontsize=10)
        axes[0, column].set_xlabel("TTFT over its objective")
        axes[1, column].set_xlabel("exchange, ms")
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
    out.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return out


def _steps(ax: Any, values: Sequence[float], of: int, arm: Arm) -> None:
    ends = np.sort(np.array(values))
    if len(ends):
        ax.step(ends, np.arange(1, len(ends) + 1) / of, where="post", color=COLOURS[arm], label=arm.words)


def data(found: Found) -> dict[str, Any]:
    """JSON-able."""

    def cell(o: Outcome) -> dict[str, Any]:
        quiet, busy, ratio = exchanges(o)
        return {
            "in_time": o.met,
            "failed": sum(r.failed for r in o.requests),
            "requests": [
                {"tokens": r.tokens, "slo_s": r.slo, "tight": r.tight, "ttft_s": r.ttft, "in_time": r.met,
                 "prefill_s": None if r.prefilled is None else r.prefilled - r.at,
                 "could_alone": single, "could_in_turn": turn}
                for r, single, turn in zip(o.requests, could_alone(o.requests, found.alone),
                                           could_in_turn(o.requests, found.alone), strict=True)
            ],
            "exchanges_ms": percentiles_ms(o.exchanges, 50, 99),
            "exchanges_without_kv_ms": percentiles_ms(o.quiet, 50, 99),
            "exchanges_p99_ratio": ratio if quiet and busy else None,
            "health": {**o.health, "problems": verdict(o.health)},
            "mfsd": o.counters,
            "kills": o.kills,
        }  # fmt: skip

    cells = {f"{arm.value}, {beside.value}": cell(o) for (arm, beside), o in found.cells.items()}
    killed = {} if found.killed is None else {"killed": cell(found.killed)}
    return {
        "alone_s": {tokens: dataclasses.asdict(a) for tokens, a in found.alone.items()},
        "cells": cells | killed,
        "targets": [{"met": met, "what": words} for met, words in targets(found)],
    }


def write(folder: Path, found: Found) -> tuple[Rows, list[tuple[bool, str]]]:
    """Everything; returns the table, and what was met."""
    rows, met = table(found), targets(found)
    sections = [
        Section(words=[("good" if ok else "bad", words) for ok, words in met], rows=rows),
        Section("In time", figure=in_time(found), name="in-time"),
        Section("Distributions", figure=distributions(found), name="distributions"),
    ]
    title = "Real vLLM: prefill hands KV to decode over one link"
    report.publish(folder, NAME, title, sections, settings(found), data(found))
    return rows, met
