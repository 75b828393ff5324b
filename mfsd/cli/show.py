# SPDX-License-Identifier: Apache-2.0
"""Commands that show: status, connections, transfers, watch, explain."""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.connect import TIMEOUT_S, control, paged
from mfsd.cli.errors import CliError
from mfsd.cli.glossary import SECTIONS
from mfsd.cli.values import COOKIE, COUNT, Interval
from mfsd.ground import tables, units
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType

    from mfsd.ground.tables import Side

LIMIT = click.option("--limit", type=COUNT, default=0, help="Show so many only; 0: all.")


def mode_text(status: pb.Status) -> str:
    """observe, enforce, or what a pause makes of it."""
    name = pb.Mode.Name(status.mode).removeprefix("MODE_").lower()
    return f"{name}, paused" if status.paused else name


def _summary(s: pb.Status) -> Iterator[str]:
    c = s.counters
    requests = f"requests {s.requests}"
    if s.requests_no_deadline:
        requests += f" ({s.requests_no_deadline} without a deadline)"
    without = f", none {units.count(c.ended_no_deadline)}" if c.ended_no_deadline else ""
    yield tables.phrases([f"mfsd {s.version}", mode_text(s), f"policy {s.policy}", f"up {units.duration(s.uptime_s)}"])
    yield tables.phrases([
        f"sessions {s.sessions}", requests, f"batches {s.batches}", f"transfers {s.transfers}",
        f"connections {s.connections} of {s.slots}", f"waiting selectors {s.pending_selectors}",
    ])  # fmt: skip
    yield tables.phrases([
        f"deadlines met {units.count(c.deadlines_met)}, missed {units.count(c.deadlines_missed)}{without}",
        f"transfers completed {units.count(c.transfers_completed)}, expired {units.count(c.transfers_expired)}",
    ])  # fmt: skip
    yield tables.phrases([
        f"hints accepted {units.count(c.hints_accepted)}, rejected {units.count(c.hints_rejected)}",
        f"promotions {units.count(c.promotions)}, of them rescued {units.count(c.rescues)}",
    ])  # fmt: skip
    yield f"tick {s.tick_p50_ms:.2f} ms, p99 {s.tick_p99_ms:.2f} ms  memory {units.size(s.rss_bytes)}"


BANDS: Final[list[tuple[str, Side]]] = [
    ("band", "left"), ("class", "left"), ("lanes", "right"), ("floor", "right"), ("guaranteed", "right"),
    ("standing", "right"), ("got", "right"), ("conns", "right"), ("sent", "right"), ("packets", "right"),
    ("drops", "right"), ("queued", "right"), ("fabric", "left"), ("dscp", "right"),
]  # fmt: skip
NOW: Final = ("floor", "guaranteed", "standing", "got", "conns", "queued")
"""Columns of bands that tell how things stand; where a terminal has no room for all, they are a table of their own."""
REST: Final = ("class", "lanes", "sent", "packets", "drops", "fabric", "dscp")


def _device(d: pb.Device) -> Iterator[RenderableType]:
    how = f"{d.backend} " if d.backend else "observed only, "
    head = tables.phrases([
        f"{d.name}: {how}via {d.attach or 'nothing'}{f' ({d.loader})' if d.loader else ''}",
        f"rate {units.rate(d.rate_bytes_per_s)}", f"measured {units.rate(d.measured_bytes_per_s)}",
        f"busy {d.utilisation:.0%}",
    ])  # fmt: skip
    yield tables.Line(f"\n{head}", "bold")
    seen = [f"{name} {units.count(n)}" for name, n in sorted(d.stats.items()) if n] or ["none yet"]
    yield tables.Line(tables.phrases([f"packets: {seen[0]}", *seen[1:]]))
    if d.bands:
        rows = [
            [
                b.name, b.classid or "-", str(b.lanes), units.rate(b.floor_bytes_per_s),
                units.rate(b.guaranteed_bytes_per_s), units.rate(b.standing_bytes_per_s), units.rate(b.got_bytes_per_s),
                str(b.connections), units.size(b.bytes), units.count(b.packets), units.count(b.drops),
                units.size(b.backlog_bytes), b.urgency, "-" if b.dscp < 0 else str(b.dscp),
            ]
            for b in d.bands
        ]  # fmt: skip
        yield from tables.parts(BANDS, rows, NOW, REST)


def _peers(peers: Iterable[pb.Peer]) -> Iterator[RenderableType]:
    heads: list[tuple[str, Side]] = [
        ("peer", "left"), ("configured", "right"), ("learnt", "right"), ("seen", "right"), ("used", "right"),
        ("given up", "right"), ("in time", "right"), ("raised", "right"),
    ]  # fmt: skip
    rows = [
        [
            p.address, units.rate(p.configured_bytes_per_s), units.rate(p.learnt_bytes_per_s), str(p.sightings),
            units.rate(p.used_bytes_per_s), str(p.given_up), str(p.in_time), f"{p.raised:.3g}",
        ]
        for p in peers
    ]  # fmt: skip
    groups = ("configured", "learnt", "used"), ("seen", "given up", "in time", "raised")
    yield from ("", *tables.parts(heads, rows, *groups))


def _tenants(tenants: Iterable[pb.Tenant]) -> RenderableType:
    return tables.table(
        [
            ("user", "right"), ("device", "left"), ("conns", "right"), ("moves", "right"), ("urgent", "right"),
            ("allowed", "right"), ("demoted", "left"), ("times", "right"),
        ],
        (
            [
                "-" if t.uid < 0 else str(t.uid), t.device, str(t.connections), units.rate(t.moved_bytes_per_s),
                units.rate(t.urgent_bytes_per_s), units.rate(t.allowed_bytes_per_s),
                "yes" if t.demoted else "no", units.count(t.demotions),
            ]
            for t in tenants
        ),
    )  # fmt: skip


def _yielding(rows: Iterable[pb.Yielding]) -> RenderableType:
    return tables.table(
        [
            ("yields in the network", "left"), ("hosts", "right"), ("conns", "right"), ("queue", "right"),
            ("aims at", "right"), ("gives way", "right"),
        ],
        (
            [
                y.band, str(y.hosts), str(y.connections), f"{y.queue_ms:.2f} ms", f"{y.target_ms:.2f} ms",
                f"{y.yielding_share:.0%}",
            ]
            for y in rows
        ),
    )  # fmt: skip


def render_status(s: pb.Status) -> list[RenderableType]:
    """One screen: lines and tables."""
    lines = list(_summary(s))
    parts: list[RenderableType] = [tables.Line(lines[0], "bold"), *(tables.Line(line) for line in lines[1:])]
    for device in s.devices:
        parts += _device(device)
    if s.peers:
        parts += _peers(s.peers)
    if s.yielding:
        parts += ["", _yielding(s.yielding)]
    if len(s.tenants) > 1 or any(t.demotions for t in s.tenants):
        parts += ["", _tenants(s.tenants)]
    if not s.devices:
        parts.append(tables.Line("\nno devices: name one in a [[device]] section of the configuration"))
    if s.notices:
        parts += ["", *(tables.Line(f"! {notice}", "yellow") for notice in s.notices)]
    return parts


def render_connections(connections: Iterable[pb.Connection]) -> list[RenderableType]:
    """A table, or two where the terminal is narrow, or a line that says there are none."""
    rows = [
        [
            str(c.slot), c.endpoints or f"cookie {c.cookie}", output.STAGES.get(c.stage, "?"), c.band or "-",
            str(c.lane), str(c.transfers), units.size(c.bytes_left), units.size(c.bytes_sent),
            f"{c.promotions}/{c.rescues}", units.duration(c.expires_us / 1e6),
        ]
        for c in connections
    ]  # fmt: skip
    if not rows:
        return ["no connections"]
    return tables.parts(
        [
            ("slot", "right"), ("connection", "left"), ("stage", "left"), ("band", "left"), ("lane", "right"),
            ("xfers", "right"), ("left", "right"), ("sent", "right"), ("pro/resc", "right"), ("expires", "right"),
        ],
        rows,
        ("connection", "stage", "band", "lane"),
        ("xfers", "left", "sent", "pro/resc", "expires"),
    )  # fmt: skip


def render_transfers(transfers: Iterable[pb.TransferState]) -> RenderableType:
    """A table, or a line that says there are none."""
    rows = [
        [
            t.id, t.request_id or t.batch_id, output.STAGES.get(t.stage, "?"), str(t.target_layer),
            f"{units.size(t.bytes_left)} of {units.size(t.bytes)}",
            units.duration(t.deadline_us / 1e6) if t.HasField("deadline_us") else "-",
            f"{t.mlu:.2f}" if t.HasField("mlu") else "-", str(t.rli) if t.HasField("rli") else "-",
            output.level(t.level), str(t.slot) if t.slot >= 0 else "-",
        ]
        for t in transfers
    ]  # fmt: skip
    if not rows:
        return "no transfers"
    return tables.table(
        [
            ("transfer", "left"), ("owner", "left"), ("stage", "left"), ("layer", "right"), ("left", "right"),
            ("due", "right"), ("mlu", "right"), ("rli", "right"), ("level", "right"), ("slot", "right"),
        ],
        rows,
    )  # fmt: skip


def _help_stats(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if not value or ctx.resilient_parsing:
        return
    if ctx.params.get("json_") or ctx.find_root().params.get("json_"):
        output.print_json({f"{path}{name}": text for _, path, texts in SECTIONS for name, text in texts.items()})
        ctx.exit()
    for n, (title, _, texts) in enumerate(SECTIONS):
        click.echo(f"{chr(10) if n else ''}{title}")
        formatter = click.HelpFormatter(width=tables.columns() or sys.maxsize, indent_increment=2)
        with formatter.indentation():
            formatter.write_dl(list(texts.items()))
        click.echo(formatter.getvalue(), nl=False)
    ctx.exit()


@command("status")
@click.option("--help-stats", is_flag=True, expose_value=False, callback=_help_stats, help="Describe every number.")
def status(g: Globals) -> None:
    """Devices, bands, link and counts on one screen."""
    with control(g.socket) as daemon:
        answer = daemon.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    print_status(g, answer)


def print_status(g: Globals, answer: pb.Status) -> None:
    """In full, as tables or JSON."""
    if g.json:
        output.print_json(answer)
    else:
        tables.write(*render_status(answer))


@command("connections")
@LIMIT
def connections(g: Globals, limit: int) -> None:
    """Connections that mfsd knows, most urgent first."""
    with control(g.socket) as daemon:
        rows = paged(daemon.ListConnections, pb.ListConnectionsRequest(), "connections", limit)
    if g.json:
        output.print_rows("connections", rows)
    else:
        tables.write(*render_connections(rows))


@command("transfers")
@LIMIT
def transfers(g: Globals, limit: int) -> None:
    """Transfers that are not finished, most urgent first."""
    with control(g.socket) as daemon:
        rows = paged(daemon.ListTransfers, pb.ListTransfersRequest(), "transfers", limit)
    if g.json:
        output.print_rows("transfers", rows)
    else:
        tables.write(render_transfers(rows))


@command("watch")
@click.option("--interval", type=Interval(0.1), default="1s", show_default=True, help="Between updates, 100ms to 24h.")
@click.option("--connections", "with_connections", is_flag=True, help="List the connections, too.")
@click.option("--count", type=COUNT, default=0, help="Stop after so many updates; 0: at Ctrl-C.")
def watch(g: Globals, interval: float, *, with_connections: bool, count: int) -> None:
    """Status again and again.

    On a terminal in place, elsewhere one after the other; with --json one object per line.
    """
    from rich.console import Group  # noqa: PLC0415 - needed here only
    from rich.live import Live  # noqa: PLC0415 - the same

    from mfsd.cli.heard import answers  # noqa: PLC0415 - the same

    request = pb.WatchRequest(interval_us=round(interval * 1e6), connections=with_connections)
    with control(g.socket) as daemon, contextlib.suppress(KeyboardInterrupt):
        # No timeout: it would be one for the whole stream.
        call = daemon.Watch(request)
        gc.enable()
        console = tables.console()
        in_place = console.is_terminal and not g.json
        with Live(console=console, auto_refresh=False) if in_place else contextlib.nullcontext() as live:
            for n, answer in enumerate(answers(call, g.socket, every=interval, shown=True), 1):
                if g.json:
                    output.print_json(answer, lines=True)
                    sys.stdout.flush()
                elif live is not None:
                    live.update(Group(*map(tables.literal, _frame(answer, with_connections))), refresh=True)
                else:
                    tables.write(*_frame(answer, with_connections), "")
                if n == count:
                    return  # closing the channel ends the stream
    if count:
        raise CliError("the daemon ended the stream")


def _frame(answer: pb.WatchReply, with_connections: bool) -> list[RenderableType]:  # noqa: FBT001 - an option handed on
    more = ["", *render_connections(answer.connections)] if with_connections else []
    return [*render_status(answer.status), *more]


@command("explain")
@click.argument("transfer_id", required=False)
@click.option("--slot", type=COUNT, help="The connection in this row of the table.")
@click.option("--cookie", type=COOKIE, help="The connection of this socket (SO_COOKIE).")
def explain(g: Globals, transfer_id: str | None, slot: int | None, cookie: int | None) -> None:
    """Why a connection or transfer is at its level.

    Name a TRANSFER_ID, or a connection by --slot or --cookie.
    """
    target: dict[str, Any] = {
        name: value
        for name, value in (("transfer_id", transfer_id), ("slot", slot), ("cookie", cookie))
        if value is not None
    }
    if len(target) != 1:
        raise click.UsageError("name exactly one: TRANSFER_ID, --slot or --cookie")
    with control(g.socket) as daemon:
        answer = daemon.Explain(pb.ExplainRequest(**target), timeout=TIMEOUT_S)
    if g.json:
        output.print_json(answer)
        return
    for reason in answer.reasons:
        output.echo(output.paragraph(reason, "- "))
    if answer.HasField("connection"):
        tables.write("", *render_connections([answer.connection]))
    if answer.transfers:
        tables.write("", render_transfers(answer.transfers))
    if answer.figures:
        figures = ([name, f"{value:.6g}"] for name, value in sorted(answer.figures.items()))
        tables.write("", tables.table([("figure", "left"), ("value", "right")], figures))
