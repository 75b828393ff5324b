# SPDX-License-Identifier: Apache-2.0
"""``mfsd lab``: the cluster lab from the command line."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mfsd.lab.cluster import matrix
from mfsd.lab.cluster.arms import ARMS
from mfsd.lab.cluster.cell import Cell
from mfsd.lab.cluster.cell import run as run_cell
from mfsd.lab.cluster.jobs import SLO_SCALE, TRACES, Work
from mfsd.lab.cluster.regimes import REGIMES
from mfsd.lab.hosts.machine import commit, end_on_sigterm, take_precedence
from mfsd.lab.hosts.net import LabError
from mfsd.lab.hosts.network import SETTINGS, Network, Setting
from mfsd.lab.models import MODELS
from mfsd.lab.real import run as real
from mfsd.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.lab.cluster.matrix import Part

FOLDER: Final = Path("build/lab")
REAL_SETUP_S: Final = 14.0
"""Of a run over real transports: daemons, torch, what is unfinished after the last arrival."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def lab() -> None:
    """Replay LLM serving on a cluster of network namespaces, with every policy, and compare.

    Needs root. Traffic stays in namespaces that the lab makes and removes.
    """


def _guard(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        end_on_sigterm()
        try:
            take_precedence()
            command(*args, **kwargs)
        except (LabError, PermissionError) as e:
            sys.exit(f"mfsd lab: {e}")
        except ImportError as e:
            sys.exit(f"mfsd lab: {e}; install the extra: pip install mfsd[lab]")

    return guarded


def _rate(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            Rate.parse(value)
        except ValueError as e:
            raise click.BadParameter(str(e)) from e
    return value


def _progress() -> Progress:
    columns = (TextColumn("{task.description:52}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), speed_estimate_period=600)


_out = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=FOLDER, show_default=True, help="Folder."
)


@lab.command()
@_out
@click.option("--resume/--fresh", default=False, help="Keep cells of an earlier, interrupted run.")
@_guard
def quick(out: Path, resume: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Five policies, one regime, two loads, one seed: at most four minutes."""
    from mfsd.lab.cluster import report  # noqa: PLC0415 - matplotlib is an extra; find out before minutes are spent

    part = matrix.quick()
    if not resume:
        for cell in part.cells:
            matrix.path_of(out, cell).unlink(missing_ok=True)
    _run(out, part.cells)
    data, rows = report.write_quick(out, part, matrix.results(out, part.cells), commit())
    console = Console()
    console.print(report.console(rows, "mfsd lab, quick"))
    for problem in data["health"]["problems"]:
        console.print(f"[bold red]The machine rather than the network may have been measured:[/] {problem}")
    console.print(f"{out / 'quick.json'}  {out / 'quick.html'}")


@lab.command()
@_out
@click.option("--part", "names", multiple=True, help="Only these parts (repeatable); `mfsd lab parts` lists them.")
@click.option("--arm", "arms", multiple=True, type=click.Choice(sorted(ARMS)), help="Only these arms (repeatable).")
@click.option("--regime", "regimes", multiple=True, type=click.Choice(list(REGIMES)), help="Only these (repeatable).")
@click.option("--load", "loads", multiple=True, type=float, help="Only these loads (repeatable).")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only these seeds (repeatable).")
@click.option("--report-only", is_flag=True, help="Run nothing; report what has been run.")
@_guard
def full(
    out: Path, names: Sequence[str], arms: Sequence[str], regimes: Sequence[str], loads: Sequence[float],
    seeds: Sequence[int], report_only: bool,  # noqa: FBT001 - click passes flags so
) -> None:  # fmt: skip
    """Everything; takes hours, goes on where it was interrupted, and reports what has been run so far."""
    from mfsd.lab.cluster import report  # noqa: PLC0415 - as above

    parts = matrix.full()
    unknown = set(names) - {p.name for p in parts}
    if unknown:
        sys.exit(f"mfsd lab: --part {min(unknown)}: must be one of {', '.join(p.name for p in parts)}")

    def wanted(part: Part, cell: Cell) -> bool:
        return (
            (not names or part.name in names)
            and (not arms or cell.arm in arms)
            and (not regimes or cell.regime in regimes)
            and (not loads or cell.work.load in loads)
            and (not seeds or cell.work.seed in seeds)
        )

    if not report_only:
        for part in parts:
            cells = [c for c in part.cells if wanted(part, c)]
            if cells:
                _run(out, cells, part.title)
    results = {p.name: matrix.results(out, p.cells) for p in parts}
    out.mkdir(parents=True, exist_ok=True)
    tables = report.write_full(out, parts, results, commit())
    console = Console(width=160)
    for title, rows in tables.items():
        console.print(report.console(rows, title))
    (out / "lab.md").write_text("\n\n".join(f"{t}\n\n{report.markdown(r)}" for t, r in tables.items()) + "\n", "utf-8")
    console.print(f"{out / 'lab.json'}  {out / 'lab.html'}  {out / 'lab.md'}")


@lab.command()
@_out
@click.option("--arm", "arms", multiple=True, type=click.Choice(sorted(ARMS)), default=("none", "ladder-net"),
              show_default=True, help="Repeatable.")  # fmt: skip
@click.option("--regime", type=click.Choice(list(REGIMES)), default=matrix.QUICK_REGIME, show_default=True,
              help="What is not given is this regime's.")  # fmt: skip
@click.option("--load", type=click.FloatRange(0.01, 10), help="Offered to the busiest link, as a share of its rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--duration", type=click.FloatRange(3, 3600), default=matrix.DURATION_S, show_default=True,
              help="Seconds of arrivals.")  # fmt: skip
@click.option("--slo-scale", type=click.FloatRange(1), default=SLO_SCALE, show_default=True)
@click.option("--poisson", is_flag=True, help="Poisson arrivals instead of the trace's.")
@click.option("--switch", type=click.Choice(SETTINGS), default="classes", show_default=True)
@click.option("--model", type=click.Choice(list(MODELS)))
@click.option("--trace", type=click.Choice(list(TRACES)))
@click.option("--instances", type=click.IntRange(1, 8))
@click.option("--prefill", type=click.IntRange(2, 16), help="Prefill hosts; every instance has a rank on each.")
@click.option("--decode", type=click.IntRange(1, 16), help="Decode hosts.")
@click.option("--stores", type=click.IntRange(1, 16), help="KV stores.")
@click.option("--rate", callback=_rate, help="Of prefill hosts' and stores' links: 200mbit.")
@click.option("--decode-rate", callback=_rate, help="Of decode hosts' links.")
@_guard
def cell(
    out: Path, arms: Sequence[str], regime: str, load: float | None, seed: int, duration: float, slo_scale: float,
    poisson: bool, switch: Setting, trace: str | None, **given: Any,  # noqa: FBT001 - click passes flags so
) -> None:  # fmt: skip
    """Run single cells on a cluster of your own: other sizes, rates, models or traces."""
    from mfsd.lab.cluster import report  # noqa: PLC0415 - as above

    base = REGIMES[regime]
    changed = {k: v for k, v in given.items() if v is not None}
    mine = dataclasses.replace(base, cluster=dataclasses.replace(base.cluster, **changed), trace=trace or base.trace)
    work = Work(duration, seed, load or base.loads[1], slo_scale=slo_scale, poisson=poisson)
    results = []
    with Network(mine.cluster) as network, _progress() as progress:
        for arm in arms:
            task = progress.add_task(arm, total=duration)
            one = Cell(arm, regime, work, switch, tag="cell")
            results.append(run_cell(network, one, lambda s, t=task: progress.update(t, completed=s), mine))  # type: ignore[misc]
    out.mkdir(parents=True, exist_ok=True)
    (out / "cell.json").write_text(json.dumps({"commit": commit(), "cells": results}), "utf-8")
    Console(width=160).print(report.console(report.cells_table(results), "mfsd lab cell"))
    click.echo(out / "cell.json")


@lab.command()
def parts() -> None:
    """List the parts of the full matrix, their cells and about how long they take."""
    for part in matrix.full():
        minutes = matrix.seconds(matrix.in_order(part.cells)) / 60
        click.echo(f"{part.name:12} {len(part.cells):4} cells {minutes:5.0f} min  {part.title}")


@lab.command(name="real")
@_out
@click.option("--duration", default=28.0, show_default=True, help="Seconds of replay per run.")
@click.option("--speed", default=2.0, show_default=True, help="How much faster than in the trace requests come.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True, help="Repeatable.")
@click.option(
    "--policy", "policies", multiple=True, type=click.Choice(list(real.ARMS)), help="Only these (repeatable)."
)
@_guard
def real_transports(out: Path, duration: float, speed: float, seeds: Sequence[int], policies: Sequence[str]) -> None:
    """The three stages over gloo and Mooncake's transfer engine, with and without mfsd (extra: transports)."""
    real.check_extra()
    chosen = [p for p in real.ARMS if not policies or p in policies]
    plans = {seed: real.plan_of(duration, speed, seed) for seed in seeds}
    each = duration + REAL_SETUP_S
    with _progress() as progress:
        task = progress.add_task("", total=each * len(chosen) * len(plans))
        started: list[str] = []

        def tell(text: str, s: float) -> None:
            if text not in started:
                started.append(text)
            past = (len(started) - 1) * each + min(max(s, 0.0) + REAL_SETUP_S / 2, each)
            progress.update(task, description=text, completed=past)

        _, rows = real.compare(out, plans, chosen, tell)
    from mfsd.lab.cluster import report  # noqa: PLC0415 - as above

    Console(width=160).print(report.console(rows, "mfsd lab real"))
    click.echo(out / "real.json")


def _run(out: Path, cells: Sequence[Cell], title: str = "") -> None:
    """Run what has no result yet under a progress bar."""
    todo = [c for c in matrix.in_order(cells) if matrix.load(out, c) is None]
    with _progress() as progress:
        task = progress.add_task(title, total=max(matrix.seconds(todo), 1.0))

        def tell(cell: Cell, s: float, number: int) -> None:
            past = matrix.seconds(todo[:number]) if number else 0.0
            text = f"{number + 1}/{len(todo)} {cell.regime} {cell.arm} load {cell.work.load:g} seed {cell.work.seed}"
            progress.update(task, description=text, completed=past + max(s, 0.0))

        matrix.run_all(out, todo, commit(), tell)


if __name__ == "__main__":
    lab()
