# SPDX-License-Identifier: Apache-2.0
"""``mfsctl stats``, ``trace`` and ``log-level``: what the daemon measures, of everything and of one request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.connect import TIMEOUT_S, control
from mfsd.cli.errors import CliError
from mfsd.ground import tables, units
from mfsd.ground.metrics import METRICS, PREFIX
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric as Family

_PREFIX: Final = "LOG_LEVEL_"
LEVELS: Final = {name.removeprefix(_PREFIX).lower(): number for name, number in pb.LogLevel.items() if number}


class _WithMetrics(click.Command):
    """Its help describes every metric."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Every metric with its labels and meaning."""
        del ctx
        formatter.write("\nMetrics:\n")
        for m in METRICS:
            labels = f"{{{','.join(m.labels)}}}" if m.labels else ""
            formatter.write(f"  {m.full_name}{labels} ({m.kind})\n{output.paragraph(m.what, '      ')}\n")


@command("stats", cls=_WithMetrics)
@click.argument("name", required=False)
@click.option("--openmetrics", is_flag=True, help="As the endpoint gives it, for a file that a collector reads.")
def stats(g: Globals, name: str | None, *, openmetrics: bool) -> None:
    """Print the metrics, those whose name contains NAME or all.

    They are the ones that Prometheus reads at the endpoint (section [metrics] of the configuration).
    """
    with control(g.socket) as daemon:
        text = daemon.GetMetrics(pb.GetMetricsRequest(), timeout=TIMEOUT_S).text
    if openmetrics:
        click.echo(text, nl=False)
        return
    known = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    families = [f for f in known if not name or name in f.name]
    if not families:
        raise CliError(f"no metric has {name!r} in its name; `mfsctl stats --help` describes all of them")
    if g.json:
        output.print_json(
            {
                f.name: {
                    "type": f.type,
                    "help": f.documentation,
                    "samples": [{"name": s.name, "labels": s.labels, "value": s.value} for s in f.samples],
                }
                for f in families
            }
        )
        return
    tables.write(tables.table([("metric", "left"), ("labels", "left"), ("value", "right")], _rows(families)))


def _rows(families: Iterable[Family]) -> Iterable[list[str]]:
    """Samples; of histograms only how many values there were and what they add up to."""
    for family in families:
        for s in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in s.labels.items())
            if not s.name.endswith("_bucket"):
                yield [s.name.removeprefix(PREFIX), labels, f"{s.value:.6g}"]
            elif s.labels["le"] == "+Inf" and not any(x.name.endswith("_count") for x in family.samples):
                labels = ",".join(f"{k}={v}" for k, v in s.labels.items() if k != "le")
                yield [f"{family.name.removeprefix(PREFIX)}_count", labels, f"{s.value:.6g}"]


@command("trace")
@click.argument("request_id")
@click.option("--session", default="", help="Of this client, where several have a request of that name.")
def trace(g: Globals, request_id: str, session: str) -> None:
    """Where the time of a request went: elsewhere, in queues, on the wire; by transfer, level and rescue.

    Of requests that are not over, and of the latest 2,000 that are.
    """
    with control(g.socket) as daemon:
        answer = daemon.Trace(pb.TraceRequest(request_id=request_id, session=session), timeout=TIMEOUT_S)
    if g.json:
        output.print_json(answer)
        return
    state = "over" if answer.over else "not over"
    slack = ", no deadline"
    if answer.HasField("slack_s"):
        slack = f", {units.duration(abs(answer.slack_s))} {'to spare' if answer.slack_s >= 0 else 'late'}"
    whose = tables.printable(f"request {answer.request_id} of session {answer.session}")
    output.echo(f"{whose}: {state} after {units.duration(answer.seconds)}{slack}")
    spent = answer.spent
    for words, seconds in (
        ("in a queue (until a first byte left)", spent.queue_s),
        ("on the wire (from a first byte to a last)", spent.wire_s),
        ("neither (compute, or nothing announced)", spent.elsewhere_s),
        ("of all that held back, below unhinted traffic", answer.held_back_s),
    ):
        share = seconds / answer.seconds if answer.seconds else 0.0
        click.echo(f"  {share:>4.0%}  {units.duration(seconds):>8}  {words}")
    if answer.transfers:
        tables.write("", *tables.parts(
            [("transfer", "left"), ("stage", "left"), ("size", "right"), ("announced", "right"), ("queue", "right"),
             ("wire", "right"), ("slack", "right"), ("levels", "left"), ("pro/resc", "right"), ("end", "left")],
            [_transfer_row(t, answer.seconds) for t in answer.transfers],
            ("stage", "size", "announced", "queue", "wire", "slack", "end"),
            ("pro/resc", "levels"),
        ))  # fmt: skip


def _transfer_row(t: pb.TransferTrace, now: float) -> list[str]:
    end = t.ended_s if t.HasField("ended_s") else now
    begun = t.begun_s if t.HasField("begun_s") else None
    return [
        t.id,
        output.STAGES.get(t.stage, "?"),
        units.size(t.bytes),
        units.duration(t.announced_s),
        units.duration((end if begun is None else begun) - t.announced_s),
        "-" if begun is None else units.duration(end - begun),
        units.duration(t.slack_s) if t.HasField("slack_s") else "-",
        ", ".join(f"{output.level(x.level)}: {units.duration(x.seconds)}" for x in t.levels),
        f"{t.promotions}/{t.rescues}",
        "delivered" if t.delivered else "not delivered" if t.HasField("ended_s") else "under way",
    ]


@command("log-level")
@click.argument("level", type=click.Choice(list(LEVELS)), required=False)
def log_level(g: Globals, level: str | None) -> None:
    """Show the least severe level that the daemon logs, or change it until a reload or restart."""
    with control(g.socket) as daemon:
        request = pb.SetLogLevelRequest(level=LEVELS[level] if level else pb.LOG_LEVEL_UNSPECIFIED)
        answer = daemon.SetLogLevel(request, timeout=TIMEOUT_S)
    name = pb.LogLevel.Name(answer.level).removeprefix(_PREFIX).lower()
    if g.json:
        output.print_json({"level": name})
    else:
        click.echo(name)
