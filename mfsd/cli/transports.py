# SPDX-License-Identifier: Apache-2.0
"""``mfsctl transports``: who moves bulk bytes over TCP, next to RDMA links and the classes of RoCE."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mfsd import doctor
from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.doctor import explain
from mfsd.cli.errors import CliError
from mfsd.cli.offline import read_config
from mfsd.cli.values import SPAN
from mfsd.ground import tables, units

if TYPE_CHECKING:
    from rich.console import RenderableType


@command("transports")
@click.option("--for", "seconds", type=SPAN, default="1s", show_default=True, help="Look for so long.")
@click.option("--all", "everything", is_flag=True, help="Also flows below 1 Mbit/s, and those within this host.")
@click.option("--root", type=click.Path(path_type=Path, file_okay=False), default=Path("/"), hidden=True)
def transports(g: Globals, seconds: float, root: Path, *, everything: bool) -> None:
    """Who moves bulk bytes over TCP and to whom, beside RDMA links, their counters and the classes of RoCE.

    Needs no daemon and changes nothing. Run it as root, or the processes of others can't be told.
    """
    context = doctor.Context((), read_config(None, needed=False), root)
    try:
        report = doctor.measure(context, seconds)
    except OSError as e:
        raise CliError(f"can't ask for sockets: {e}") from None
    findings = list(doctor.judge(report))
    if g.json:
        output.print_json(_as_dict(report) | {"findings": [dataclasses.asdict(f) for f in findings]})
        return
    shown = [f for f in report.flows if everything or (f.bytes_per_s >= 125e3 and not f.local)]
    tables.write(*_tables(report, shown))
    for f in findings:
        output.echo()
        output.echo(f"{f.severity:<5}{tables.printable(f.title)}")
        if f.severity != doctor.Severity.OK:
            explain(f)


def _tables(report: doctor.Report, flows: list[doctor.Flow]) -> list[RenderableType]:
    rate = partial(units.rate, nothing="0")
    out: list[RenderableType] = []
    if flows:
        out.append(tables.table(
            [("process", "left"), ("pid", "right"), ("over TCP to", "left"), ("conns", "right"), ("rate", "right")],
            [[f.process, str(f.pid or "-"), f.peer, str(f.connections), rate(f.bytes_per_s)] for f in flows],
        ))  # fmt: skip
    else:
        out.append("no bulk TCP leaves this host")
    if report.ports:
        out += ["", tables.table(
            [("RDMA", "left"), ("state", "left"), ("layer", "left"), ("speed", "left"), ("out", "right"),
             ("in", "right"), ("NIC", "left")],
            [[p.name, p.state.lower(), p.layer, p.rate, rate(out_), rate(in_), ", ".join(p.netdevs) or "-"]
             for p, out_, in_ in report.ports],
        )]  # fmt: skip
    else:
        out += ["", "no RDMA links"]
    if report.netdevs:
        out += ["", tables.table(
            [("NIC", "left"), ("out", "right")], [[name, rate(r)] for name, r in report.netdevs.items()]
        )]  # fmt: skip
    if report.classes:
        out += ["", tables.table(
            [("who", "left"), ("class", "right"), ("dscp", "right"), ("NIC", "left"), ("priority", "right"),
             ("tc", "right")],
            [[c.who, str(c.traffic_class), str(c.dscp), c.device or "-", _known(c.priority), _known(c.queue)]
             for c in report.classes],
        )]  # fmt: skip
    return out


def _known(number: int) -> str:
    return str(number) if number >= 0 else "-"


def _as_dict(report: doctor.Report) -> dict[str, object]:
    """As JSON; rates are bytes/s."""
    return {
        "seconds": report.seconds,
        "tcp": [dataclasses.asdict(f) for f in report.flows],
        "rdma": [
            dataclasses.asdict(p) | {"sent_bytes_per_s": sent, "received_bytes_per_s": received}
            for p, sent, received in report.ports
        ],
        "nics": report.netdevs,
        "processes": [dataclasses.asdict(p) for p in report.processes if p.verbs or p.variables],
        "classes": [dataclasses.asdict(c) | {"dscp": c.dscp} for c in report.classes],
        "mapped": report.mapped,
    }
