# SPDX-License-Identifier: Apache-2.0
"""Rules in force, what they say of a connection, and those that mfsd ships."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import click

from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.connect import TIMEOUT_S, control
from mfsd.cli.errors import CliError
from mfsd.cli.values import COOKIE
from mfsd.ground import tables, units
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType


def render_rules(rules: Iterable[pb.Rule]) -> RenderableType:
    """A table, or a line that says there are none."""
    rows = [
        [
            r.name, r.conditions, output.STAGES.get(r.stage, "?"), "no" if r.interleaved else "yes",
            units.duration(r.deadline_us / 1e6) if r.deadline_us else "-", str(r.connections), r.source,
        ]
        for r in rules
    ]  # fmt: skip
    if not rows:
        return "no rules: name some in [rules] or [[rule]] sections of the configuration"
    return tables.table(
        [
            ("rule", "left"), ("connections of", "left"), ("stage", "left"), ("ordered", "left"), ("due in", "right"),
            ("now", "right"), ("from", "left"),
        ],
        rows,
    )  # fmt: skip


def _print_verdicts(verdicts: Iterable[pb.RuleVerdict]) -> None:
    last = None
    for v in verdicts:
        if v.cookie != last:
            last = v.cookie
            output.echo(f"{v.connection}, cookie {v.cookie}" + (f", process {v.pid}" if v.pid else ""))
        output.echo(output.paragraph(f"{v.rule}: {'; '.join(v.failing) or 'names it'}", "  "))


@command("rules")
@click.option("--cookie", type=COOKIE, help="Say of the connection of this socket (SO_COOKIE) who names it.")
@click.option("--port", type=click.IntRange(1, 65535), help="The same of connections with this port at either end.")
@click.option("--library", is_flag=False, flag_value="", metavar="[NAME]", help="List shipped rules, or print some.")
def rules(g: Globals, cookie: int | None, port: int | None, library: str | None) -> None:
    """Rules of the configuration, and what they say of a connection.

    With --cookie or --port every rule says whether it names the connection, and if not, why.
    """
    if library is not None:
        _library(library)
        return
    with control(g.socket) as daemon:
        answer = daemon.ListRules(pb.ListRulesRequest(cookie=cookie or 0, port=port or 0), timeout=TIMEOUT_S)
    if g.json:
        output.print_json(answer)
    elif answer.verdicts:
        _print_verdicts(answer.verdicts)
    else:
        tables.write(render_rules(answer.rules))
        for r in answer.rules:
            if r.problem:
                output.echo(f"! {r.name}: {r.problem}")


def _library(name: str) -> None:
    from mfsd.daemon.config_rules import shipped  # noqa: PLC0415 - brings pydantic, needed here only

    files = shipped()
    if not name:
        for one, file in files.items():
            lines = file.read_text(encoding="utf-8").splitlines()[1:]
            about = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line != "#", lines))
            output.echo(output.paragraph(about, f"{one:16}"))
    elif name in files:
        click.echo(files[name].read_text(encoding="utf-8"), nl=False)
    else:
        raise CliError(f"no rules {name!r} are shipped; there are: {', '.join(files)}")
