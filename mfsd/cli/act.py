# SPDX-License-Identifier: Apache-2.0
"""Commands that plan, steer and undo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from rich.text import Text

from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.connect import TIMEOUT_S, control
from mfsd.cli.errors import CliError, Exit, HangingError, UnreachableError
from mfsd.cli.show import mode_text
from mfsd.ground import tables
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

SLOW_S: Final = 60.0
"""For calls that change qdiscs, which may have hundreds of classes."""
CONFIG = click.option("--config", metavar="FILE", help="The configuration, for use without a daemon.")
DEVICE = click.argument("device", default="", required=False)


def _told(g: Globals, answer: pb.Status) -> None:
    if g.json:
        output.print_json(answer)
        return
    output.echo(f"mode: {mode_text(answer)}")
    for notice in answer.notices:
        output.echo(f"! {tables.printable(notice)}")


@command("observe")
def observe(g: Globals) -> None:
    """Classify, count and predict, but leave packets alone.

    The qdiscs stay; `mfsctl restore` takes them away.
    """
    _set_mode(g, pb.MODE_OBSERVE)


@command("enforce")
def enforce(g: Globals) -> None:
    """Steer packets.

    Installs the qdiscs where they are not yet: see `mfsctl plan` first.
    """
    _set_mode(g, pb.MODE_ENFORCE)


def _set_mode(g: Globals, mode: pb.Mode.ValueType) -> None:
    with control(g.socket) as daemon:
        _told(g, daemon.SetMode(pb.SetModeRequest(mode=mode), timeout=SLOW_S))


@command("pause")
def pause(g: Globals) -> None:
    """Stop steering at once; hints and qdiscs stay.

    All traffic goes to the default band until `mfsctl resume`. Pausing twice does no harm.
    """
    with control(g.socket) as daemon:
        _told(g, daemon.Pause(pb.PauseRequest(), timeout=TIMEOUT_S))


@command("resume")
def resume(g: Globals) -> None:
    """Steer again after a pause."""
    with control(g.socket) as daemon:
        _told(g, daemon.Resume(pb.ResumeRequest(), timeout=TIMEOUT_S))


@command("plan")
@DEVICE
@CONFIG
@click.option("--offline", is_flag=True, help="Plan from the configuration even if a daemon runs.")
def plan(g: Globals, device: str, config: str | None, *, offline: bool) -> None:
    """What mfsd would change on the devices, or has changed.

    Changes nothing. Asks the daemon; without one, plans from the configuration. DEVICE: only this one.
    """
    made = _plan(g, device, config, offline=offline or config is not None)
    if g.json:
        output.print_json(made)
    else:
        for n, d in enumerate(made.devices):
            if n:
                output.echo()
            _print_plan(d)
        if not made.devices:
            output.echo(output.paragraph("no devices: name one in a [[device]] section of the configuration"))
    if any(d.refusals for d in made.devices):
        raise click.exceptions.Exit(Exit.BAD_NEWS)


def _plan(g: Globals, device: str, config: str | None, *, offline: bool) -> pb.Plan:
    if not offline:
        try:
            with control(g.socket) as daemon:
                return daemon.GetPlan(pb.GetPlanRequest(device=device), timeout=SLOW_S)
        except UnreachableError as e:
            output.echo(f"{e.format_message()}\nplanning from the configuration instead", err=True)
    from mfsd.cli import offline as without_daemon  # noqa: PLC0415 - brings numpy and pyroute2, needed here only

    return without_daemon.plan(without_daemon.read_config(config, needed=True), device)


def _print_plan(d: pb.DevicePlan) -> None:
    console = tables.console()
    console.print(Text(f"{d.device}{f': {d.backend}' if d.backend else ''}", style="bold"))
    _section(console, "found", d.found)
    _section(console, "mfsd will not touch it", d.refusals)
    _section(console, "why so", d.reasons)
    _section(console, "marks", d.marks)
    if not d.refusals:
        console.print(Text("steps", style="bold"))
        for step in d.steps:
            output.echo(output.paragraph(step.what, "  [done] " if step.done else "  "))
            output.echo(output.shell(step.command, "    "))
        if not d.steps:
            output.echo("  nothing to do: all of it is in place")
    _section(console, "undo", d.undo)


def _section(console: Console, title: str, lines: Iterable[str]) -> None:
    for n, line in enumerate(lines):
        if not n:
            console.print(Text(title, style="bold"))
        output.echo(output.paragraph(line, "  "))


@command("restore")
@DEVICE
@CONFIG
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where the daemon's notes are, instead of --config.")
@click.option("--delete", is_flag=True, help="Where no note says what was there, delete mfsd's qdiscs of DEVICE.")
def restore(g: Globals, device: str, config: str | None, state_dir: Path | None, *, delete: bool) -> None:
    """Put the devices' qdiscs back as they were found.

    A running daemon does it itself and goes on in observe mode. Without one, mfsctl works from the notes that the
    daemon left in its state directory. DEVICE: only this one. With --delete it works without the daemon, and where a
    note is missing or can't be read, the kernel's default returns.
    """
    if delete and not device:
        raise click.UsageError("--delete needs a DEVICE")
    answer = _restore(g, device, config, state_dir, delete=delete)
    if g.json:
        output.print_json(answer)
    else:
        for name in answer.restored:
            output.echo(f"{name}: as it was found")
        for name in answer.gone:
            output.echo(f"{name}: gone, and what mfsd had put on it with it")
        if not answer.restored and not answer.gone and not answer.problems:
            output.echo("nothing to restore")
        for problem in answer.problems:
            output.echo(f"mfsctl: {problem}", err=True)
    if answer.problems:
        raise click.exceptions.Exit(Exit.BAD_NEWS)


def _restore(g: Globals, device: str, config: str | None, state_dir: Path | None, *, delete: bool) -> pb.RestoreReply:
    hangs = False
    if state_dir is None and not delete:
        try:
            with control(g.socket) as daemon:
                return daemon.Restore(pb.RestoreRequest(device=device), timeout=SLOW_S)
        except UnreachableError as e:
            hangs = isinstance(e, HangingError)
            if not g.json:
                output.echo(f"{e.format_message()}\nrestoring from its notes instead", err=True)
    elif state_dir is not None and not state_dir.is_dir():
        raise CliError(f"--state-dir {state_dir}: there is no such folder")
    from mfsd.cli import offline as without_daemon  # noqa: PLC0415 - brings numpy and pyroute2, needed here only

    try:
        where = state_dir or without_daemon.read_config(config, needed=False).daemon.state_dir
    except CliError as e:
        raise CliError(f"{e.format_message()}; or say where the notes are with --state-dir") from None
    answer = without_daemon.restore(where, device, delete=delete)
    if hangs and not answer.restored and not answer.problems:
        answer.problems.append(
            f"mfsd at {g.socket} does not answer, and there are no notes of it in {where}: end it, or say where they "
            "are with --state-dir"
        )
    return answer
