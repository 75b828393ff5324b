# SPDX-License-Identifier: Apache-2.0
"""The lab's commands."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args, get_origin, get_type_hints

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import mfsd
from mfsd.ground import recording, units
from mfsd.ground.tables import write
from mfsd.ground.units import Rate
from mfsd.lab import demo as closer
from mfsd.lab import far, matrix, promotion
from mfsd.lab import replay as replaying
from mfsd.lab.arms import ARMS
from mfsd.lab.hosts.machine import end_on_sigterm, take_precedence
from mfsd.lab.hosts.net import LabError
from mfsd.lab.results import report, tables
from mfsd.lab.run import load, path_of, results, run_all, seconds
from mfsd.lab.serving.real import check_extra
from mfsd.lab.settings import PRESETS, REGIMES, Settings
from mfsd.lab.vllm import report as vllm_report
from mfsd.lab.vllm.suite import QUICK, Plan, Suite
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.lab.results.result import Result
    from mfsd.lab.serving.driver import Played

FOLDER: Final = Path("build/lab")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mfsd.__version__, message="mfsd-lab %(version)s")
def main() -> None:
    """Replay LLM serving in network namespaces, with and without mfsd, under every policy, and compare.

    Needs root. Traffic stays in namespaces that the lab makes and removes.
    """


# --- options ----------------------------------------------------------------------------------------------------------


class RateType(click.ParamType[str]):
    """A rate as tc writes it; stays a text."""

    name = "rate"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check it."""
        try:
            Rate.parse(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)
        return value


def _type(meta: Any, hint: Any) -> Any:
    if meta.get("rate"):
        return RateType()
    if meta.get("choices") or get_origin(hint) is Literal:
        return click.Choice(meta.get("choices") or get_args(hint))
    kind, limits = {int: click.IntRange, float: click.FloatRange}.get(hint), (meta["at_least"], meta["at_most"])
    return kind(*limits) if kind and limits != (None, None) else hint


def _settings(preset: str, *names: str, several: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Options for these settings (none: all), under their names; what is not given is None, or () for several.

    The settings' own texts are the help; ``preset`` has the defaults that it tells, "": none.
    """
    hints = get_type_hints(Settings)

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for f in reversed(dataclasses.fields(Settings)):
            if f.name in {"regime", "arm"} or (names and f.name not in names):
                continue
            flag, text = f.name.replace("_", "-"), str(f.metadata["doc"])
            text += " Repeatable." if f.name in several else ""
            text += f"  [default: {getattr(PRESETS[preset].settings, f.name)}]" if preset else ""
            flags = f"--{flag}/--no-{flag}" if hints[f.name] is bool else f"--{flag}"
            kind = _type(f.metadata, hints[f.name])
            command = click.option(flags, f.name, type=kind, default=None, help=text, multiple=f.name in several)(
                command
            )
        return command

    return add


def _arms(*default: str) -> Callable[..., Any]:
    known = click.Choice(list(dict.fromkeys([*ARMS, *registry.names()])))
    text = "An arm of the lab (`mfsd-lab arms`) or a policy of mfsd; repeatable."
    flags = ("--arm", "--policy", "arms")
    return click.option(
        *flags, multiple=True, default=default, show_default=True, type=known, metavar="NAME", help=text
    )


def _out(folder: Path = FOLDER) -> Callable[..., Any]:
    kind = click.Path(path_type=Path, file_okay=False)
    return click.option("--out", type=kind, default=folder, show_default=True, help="Folder.")


def _guard(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        end_on_sigterm()
        try:
            take_precedence()
            command(*args, **kwargs)
        except (LabError, PermissionError) as e:
            sys.exit(f"mfsd-lab: {e}")

    return guarded


def _preset(name: str, given: dict[str, Any]) -> Settings:
    return dataclasses.replace(PRESETS[name].settings, **{k: v for k, v in given.items() if v is not None})


# --- running ----------------------------------------------------------------------------------------------------------


class Bar:
    """Progress on stderr: seconds done of about so many in all. A context manager."""

    def __init__(self, total: float) -> None:
        columns = (TextColumn("{task.description:52}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
        console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=600)
        self._total = max(total, 1.0)
        self._task = self._progress.add_task("", total=self._total)

    def tell(self, text: str, past: float) -> None:
        """What is being done, and how far it is."""
        self._progress.update(self._task, description=text, completed=past)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._progress.update(self._task, completed=self._total)
        self._progress.stop()


def _run(
    folder: Path,
    cells: Sequence[Settings],
    bar: Bar,
    on_played: Callable[[Result, Played], None] = lambda _r, _p: None,
    *,
    again: bool = False,
) -> list[Result]:
    """Run what has no result yet."""
    todo = [c for c in cells if load(folder, c) is None]

    def tell(cell: Settings, s: float, number: int) -> None:
        bar.tell(f"{number + 1}/{len(todo)} {cell.name}", seconds(todo[:number]) + max(s, 0.0))

    run_all(folder, todo, tell, on_played, again=again)
    return results(folder, cells)


def _afresh(folder: Path, cells: Sequence[Settings]) -> Path:
    """Forget what was run before; returns the folder of the cells."""
    for cell in cells:
        path_of(folder, cell).unlink(missing_ok=True)
    return folder


def _finish(out: Path, name: str, found: Sequence[Result]) -> None:
    report.show(tables.write_cells(out, name, f"mfsd-lab {name}", found), f"mfsd-lab {name}")
    _complain(found)
    click.echo(f"{out / name}.json  {out / name}.html")


def _complain(found: Sequence[Result]) -> None:
    for problem in report.problems(found):
        click.secho(report.SPOILT + problem, fg="red", bold=True)


# --- commands ---------------------------------------------------------------------------------------------------------


@main.command()
@_settings("demo", "duration", "speed", "seed")
@_arms(registry.DEFAULT)
@click.option("--promotion/--no-promotion", "promote", default=True, help="Also measure single promotions.")
@click.option("--network/--no-network", "network", default=True, help="Also meet a bottleneck elsewhere.")
@_out(Path("build"))
@_guard
def demo(arms: Sequence[str], promote: bool, network: bool, out: Path, **given: Any) -> None:  # noqa: FBT001 - click passes flags so
    """The same requests over plain TCP and with mfsd: demo.html, in two minutes."""
    cells = [dataclasses.replace(_preset("demo", given), arm=arm).check() for arm in ("none", arms[-1])]
    series = {"rescue": closer.RESCUE, "plain": closer.PLAIN} if promote else {}
    past = seconds(cells)
    seen: list[Played] = []
    trials: dict[str, list[promotion.Trial]] = {}
    with Bar(past + sum(closer.seconds(s) for s in series.values()) + far.SECONDS * network) as bar:
        found = _run(_afresh(out / "demo", cells), cells, bar, lambda _result, played: seen.append(played))
        for name, one in series.items():
            bar.tell(f"promotions, {name}", past)
            trials[name] = promotion.run(one)
            past += closer.seconds(one)
        beyond = far.run(functools.partial(bar.tell, past=past)) if network else {}
    rows, words = closer.write(out, (found[0], found[1]), seen[-1], trials, beyond)
    report.show(rows, "mfsd demo")
    click.echo("\n".join(words))
    _complain(found)
    click.echo(f"{out / 'demo.json'}  {out / 'demo.html'}")


@main.command()
@_out()
@click.option("--resume/--fresh", default=False, help="Keep cells of an earlier, interrupted run.")
@_guard
def quick(out: Path, resume: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Five policies, one regime, two loads, one seed: at most four minutes."""
    cells = matrix.quick()
    folder = out / "cells" if resume else _afresh(out / "cells", cells)
    with Bar(seconds(cells)) as bar:
        found = _run(folder, cells, bar, again=True)
    _finish(out, "quick", found)


@main.command()
@_out()
@click.option("--part", "names", multiple=True, type=click.Choice([p.name for p in matrix.full()]), metavar="NAME",
              help="Only these parts (repeatable); `mfsd-lab parts` lists them.")  # fmt: skip
@_arms()
@click.option("--regime", "regimes", multiple=True, type=click.Choice(REGIMES), help="Only these (repeatable).")
@_settings("", "load", "seed", several=("load", "seed"))
@click.option("--report-only", is_flag=True, help="Run nothing; report what has been run.")
@_guard
def full(out: Path, names: Sequence[str], report_only: bool, **given: Sequence[Any]) -> None:  # noqa: FBT001 - as above
    """Everything; takes hours, goes on where it was interrupted, and reports what has been run so far."""
    parts = matrix.full()
    wanted = {"arm": given["arms"], "regime": given["regimes"], "load": given["load"], "seed": given["seed"]}
    for part in parts:
        cells = [
            c for c in matrix.in_order(part.cells) if all(not v or getattr(c, k) in v for k, v in wanted.items())
        ]  # fmt: skip
        if cells and not report_only and (not names or part.name in names):
            with Bar(seconds(cells)) as bar:
                _run(out / "cells", cells, bar, again=True)
    found = tables.write_full(out, parts, {p.name: results(out / "cells", p.cells) for p in parts})
    for title, rows in found.items():
        report.show(rows, title)
    click.echo(f"{out / 'lab.json'}  {out / 'lab.html'}  {out / 'lab.md'}" if found else "nothing has been run")


@main.command()
@_out()
@_arms("none", registry.DEFAULT)
@click.option("--regime", type=click.Choice(list(PRESETS)), default=matrix.QUICK_REGIME, show_default=True,
              help="The preset: what is not given is this one's.")  # fmt: skip
@_settings("")
@_guard
def cell(out: Path, arms: Sequence[str], regime: str, **given: Any) -> None:
    """Run single cells on a cluster of your own: other sizes, rates, models, traces or transports."""
    cells = [dataclasses.replace(_preset(regime, given), arm=arm).check() for arm in arms]
    with Bar(seconds(cells)) as bar:
        found = _run(_afresh(out / "cell", cells), cells, bar)
    _finish(out, "cell", found)


@main.command()
@_out()
@_arms("none", "mfs", registry.DEFAULT)
@_settings("real", "duration", "speed", "seed", several=("seed",))
@_guard
def real(out: Path, arms: Sequence[str], seed: Sequence[int], **given: Any) -> None:
    """The three stages over gloo and Mooncake's transfer engine, with and without mfsd (extra: transports)."""
    check_extra()
    base = _preset("real", given)
    cells = [dataclasses.replace(base, arm=arm, seed=s).check() for s in seed or [base.seed] for arm in arms]
    with Bar(seconds(cells)) as bar:
        found = _run(_afresh(out / "real", cells), cells, bar)
    _finish(out, "real", found)


@main.command()
@_out()
@click.option("--python", "interpreter", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="Interpreter of an environment with vLLM for the CPU, NIXL and grpcio.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Two competitors, four requests, two kills: about three minutes.")
@click.option("--requests", type=click.IntRange(1, 1000), help=f"Of each cell.  [default: {Plan().requests}]")
@click.option("--kills", type=click.IntRange(0, 1000), help=f"Of the daemon.  [default: {Plan().kills}]")
@click.option("--seed", type=click.IntRange(0), default=Plan().seed, show_default=True, help="Of the requests.")
@_guard
def vllm(out: Path, interpreter: Path, requests: int | None, kills: int | None, seed: int, quick: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Real vLLM on the CPU, prefill to decode over NIXL on TCP: plain, with rules, with the connector."""
    plan = dataclasses.replace(QUICK if quick else Plan(), seed=seed)
    plan = plan if requests is None else dataclasses.replace(plan, requests=requests)
    plan = plan if kills is None else dataclasses.replace(plan, kills=kills)
    with Bar(plan.seconds) as bar:
        found = Suite(interpreter, plan, bar.tell).run()
    rows, met = vllm_report.write(out, found)
    report.show(rows, "mfsd-lab vllm")
    for ok, words in met:
        click.secho(words, fg="green" if ok else "red", bold=not ok)
    click.echo(f"{out / vllm_report.NAME}.json  {out / vllm_report.NAME}.html")


@main.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--policy", "policies", multiple=True, required=True, type=click.Choice(registry.names()), metavar="NAME",
              help="A policy of mfsd with its default parameters; repeatable.")  # fmt: skip
@click.option("--rate", type=RateType(), help="Of every link, e.g. 10gbit, instead of what the record has.")
def replay(file: Path, policies: Sequence[str], rate: str | None) -> None:
    """What other policies would have made of a record of `mfsctl record`, on a simulated link. Needs no root.

    The first lines are what happened, and the recorded policy on the same simulated link: the difference between these
    two is what the simulation leaves out.
    """
    try:
        record = recording.read(file)
        speed = Rate.parse(rate).bytes_per_s if rate else 0.0
        again = replaying.under(record, record.policy, record.parameters, speed)
        again.name = f"{record.policy} simulated"
        others = [replaying.under(record, name, {}, speed) for name in policies]
    except (OSError, ValueError) as e:
        sys.exit(f"mfsd-lab: {e}")
    left_out = len(record.transfers) - len(replaying.used(record))
    write(
        f"{len(record.transfers)} transfers in {units.duration(record.seconds)}, {left_out} of them left out "
        f"(background, or without a stage), under {record.policy} of mfsd {record.version}"
    )
    for words in replaying.doubts(record):
        write(f"! {words}")
    report.show(replaying.rows([replaying.as_recorded(record), again, *others]), file.name)
    for other in others:
        write(*replaying.difference(again, other))


@main.command()
def parts() -> None:
    """List the parts of the full matrix, their cells and about how long they take."""
    for part in matrix.full():
        minutes = seconds(matrix.in_order(part.cells)) / 60
        click.echo(f"{part.name:12} {len(part.cells):4} cells {minutes:5.0f} min  {part.title}")


@main.command()
def arms() -> None:
    """List the arms: the ways to govern a cluster."""
    for arm in ARMS.values():
        click.echo(f"{arm.name:18} {arm.title}")
