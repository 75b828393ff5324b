# SPDX-License-Identifier: Apache-2.0
"""The demo: one trace, once over fair TCP and once with mfsd. ``python -m mfsd.lab.demo``."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mfsd.lab import arm, promotion, report, story, trace, workload
from mfsd.lab.hosts.machine import NICE, commit, end_on_sigterm, machine, take_precedence
from mfsd.lab.hosts.net import LabError
from mfsd.lab.hosts.tcp import CONGESTION
from mfsd.lab.models import MIXTRAL, Scaled
from mfsd.lab.rank import KV_LANES, P2D_LANES
from mfsd.lab.results import summary
from mfsd.policy.registry import DEFAULT
from mfsd.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.lab.arm import Outcome, Plan

SETUP_S: Final = 3.0
"""Of an arm: namespaces, processes, the daemons."""
DRAIN_S: Final = 4.0
"""Of an arm: what is unfinished after the last arrival."""
PROMOTION: Final = promotion.Settings(flows=8, rescue=True, trials=6, watch=0.3, rate=Rate.parse("1gbit"))
PLAIN: Final = dataclasses.replace(PROMOTION, rescue=False, trials=3, watch=2.0)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the demo: its title, how long it takes (s, a guess), and what it does with a progress call."""

    title: str
    seconds: float
    work: Callable[[Callable[[float], None]], Any]


def plan_of(duration: float, speed: float, seed: int, link: Rate) -> tuple[Plan, workload.Selection]:
    """The work of both arms. Raises LabError when no request falls into it."""
    scaled = Scaled(MIXTRAL, link)
    selection = workload.Selection(duration=duration, speed=speed)
    jobs = workload.jobs(trace.load(seed=seed), selection, scaled)
    if not jobs:
        raise LabError(f"no request of the trace falls into {duration:g} s from {selection.start:g} s on")
    return arm.Plan(jobs, scaled), selection


def settings_of(plan: Plan, selection: workload.Selection, seed: int, sysctls: dict[str, str]) -> dict[str, Any]:
    """All that one needs to know to judge the figures, in words."""
    model = plan.scaled.model
    real, lab = Rate(model.link_bits / 8), plan.scaled.link
    return {
        "trace": "Mooncake conversation trace (FAST'25, Apache-2.0), arrivals spread inside its 3 s ticks",
        "part": f"{selection.duration:g} s of replay from {selection.start:g} s on, time running {selection.speed:g}x",
        "prompts": f"{selection.min_tokens} to {selection.max_tokens} tokens, at most {selection.max_new} to compute; "
        "shorter ones are computed where they are decoded, others go to other instances",
        "seed": seed,
        "model": model.name,
        "link": f"{lab} per host, standing for {real}: bytes x {plan.scaled.scale:g}, times as they are",
        "compute": f"{model.compute_s * 1e6:.1f} us per token and GPU (calibrated sleep)",
        "batching": f"continuous, first come first served, {plan.max_batch} new tokens per rank and pass, no chunks",
        "connections": f"per host pair: 1 collective, {KV_LANES} KV reuse, {P2D_LANES} P2D; long-lived, {CONGESTION}",
        "slo": f"TTFT within {selection.slo_scale:g}x the request's unloaded TTFT, computed (models.py)",
        "offered_load": round(workload.link_load(plan.jobs, selection, plan.scaled), 3),
        "sysctls": ", ".join(f"{k} = {v}" for k, v in sorted(sysctls.items())) + " (every host, both runs)",
        "policy": plan.options.get("policy", {}).get("name", f"{DEFAULT} (the default), default parameters"),
        "nice": f"{NICE}, all processes of the lab",
        "promotion": f"{PROMOTION.flows} saturating deferred flows; fair TCP column: plain re-classification "
        f"(rescue off), watched {PLAIN.watch:g} s, {PLAIN.trials} times; mfsd: {PROMOTION.trials} times",
    }


def _phases(plan: Plan, selection: workload.Selection, *, with_promotion: bool) -> dict[str, Phase]:
    seconds = SETUP_S + selection.duration + DRAIN_S

    def replay(*, governed: bool) -> Callable[[Callable[[float], None]], Outcome]:
        return lambda tell: arm.run(plan, governed=governed, on_progress=lambda s: tell(SETUP_S + max(s, 0.0)))

    out = {
        "off": Phase("replay over fair TCP", seconds, replay(governed=False)),
        "on": Phase("the same with mfsd", seconds, replay(governed=True)),
    }
    if with_promotion:
        for name, title, s in (("rescue", "promotions with rescue", PROMOTION), ("plain", "plain promotions", PLAIN)):
            each = s.recover + s.starve + max(s.settle, s.watch)
            out[name] = Phase(title, 4.0 + each * (s.trials + 1), functools.partial(_promotions, s))
    return out


def _promotions(settings: promotion.Settings, _tell: Callable[[float], None]) -> list[promotion.Trial]:
    return promotion.run(settings)


def _show(phases: dict[str, Phase], console: Console) -> dict[str, Any]:
    """Run the phases under a progress bar."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    found = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(p.seconds for p in phases.values()))
        past = 0.0
        for name, phase in phases.items():
            progress.update(task, description=phase.title, completed=past)

            def tell(seconds: float, past: float = past, phase: Phase = phase) -> None:
                progress.update(task, completed=past + min(seconds, phase.seconds))

            found[name] = phase.work(tell)
            past += phase.seconds
    return found


def run(out: Path, plan: Plan, selection: workload.Selection, seed: int, *, with_promotion: bool) -> dict[str, Any]:
    """Run everything, write demo.json and demo.html into ``out``, and return what demo.json holds. Raises LabError."""
    from mfsd.lab import pictures  # noqa: PLC0415 - matplotlib is an extra; find out before a minute is spent

    console = Console(stderr=True)
    found = _show(_phases(plan, selection, with_promotion=with_promotion), console)
    off, on = (summary(plan, found[name]) for name in ("off", "on"))
    if with_promotion:
        off |= report.promotion_summary(found["plain"], PLAIN.watch)
        on |= report.promotion_summary(found["rescue"], PROMOTION.watch)
    stories = story.stories(plan, found["on"])
    best = stories[0] if stories else None
    data = {
        "off": off,
        "on": on,
        "machine": machine(),
        "commit": commit(),
        "settings": settings_of(plan, selection, seed, found["on"].sysctls),
        "health": {"ok": not report.health_lines(off, on), "problems": report.health_lines(off, on)},
        "story": report.describe(best),
    }
    rows = report.rows(off, on)
    timeline = pictures.timeline(plan, found["on"], best) if best is not None else ""
    text = report.page(data, rows, best, timeline, pictures.cdf(plan, found["off"], found["on"]))
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (out / "demo.html").write_text(text, encoding="utf-8")
    _tell(data, rows, out)
    return data


def _tell(data: dict[str, Any], rows: report.Rows, out: Path) -> None:
    console = Console()
    console.print(report.console_table(rows))
    console.print(report.verdict(data["off"], data["on"]))
    console.print(f"The timeline in demo.html: {data['story']}")
    if not data["health"]["ok"]:
        console.print("[bold red]These figures may describe the machine rather than the network:[/]")
        for line in data["health"]["problems"]:
            console.print(f"  {line}")
    console.print(f"{out / 'demo.json'}  {out / 'demo.html'}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--duration", default=28.0, show_default=True, help="Seconds of replay per run.")
@click.option("--speed", default=2.0, show_default=True, help="How much faster than in the trace requests come.")
@click.option("--seed", default=0, show_default=True, help="Spreads arrivals inside the trace's 3 s ticks.")
@click.option("--policy", default="", help="Policy of the run with mfsd; none: its default.")
@click.option("--promotion/--no-promotion", "with_promotion", default=True, help="Also measure single promotions.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build"), show_default=True, help="Folder."
)
def main(duration: float, speed: float, seed: int, policy: str, with_promotion: bool, out: Path) -> None:  # noqa: FBT001 - click
    """Replay requests in network namespaces with mfsd off and on; write demo.json and demo.html."""
    end_on_sigterm()
    try:
        take_precedence()
        plan, selection = plan_of(duration, speed, seed, Rate.parse("1gbit"))
        if policy:
            plan = dataclasses.replace(plan, options={"policy": {"name": policy}})
        run(out, plan, selection, seed, with_promotion=with_promotion)
    except (LabError, PermissionError) as e:
        sys.exit(f"demo: {e}")
    except ImportError as e:
        sys.exit(f"demo: {e}; install the extra: pip install mfsd[lab]")


if __name__ == "__main__":
    main()
