# SPDX-License-Identifier: Apache-2.0
"""Send one hint by hand: to try things out, or to help a program that sends none."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import click
from google.rpc import error_details_pb2

from mfsd.cli import output
from mfsd.cli.app import Globals, with_globals
from mfsd.cli.connect import TIMEOUT_S, hints
from mfsd.cli.errors import Exit
from mfsd.cli.values import COOKIE, COUNT, DURATION, ENDPOINT, PID, SIZE, SPAN, Endpoint
from mfsd.ground import tables
from mfsd.ground.wire import LASTING
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    Body = Callable[..., pb.Hint]

STAGES: Final = {word: pb.Stage.ValueType(number) for number, word in output.STAGES.items() if number}
KIND: Final = click.Choice(["transfer", "request", "batch"])


@click.group("hint")
def hint() -> None:
    """Send one hint by hand.

    All calls with the same --session belong together, as those of one worker do. The session ends when nothing that
    it said is alive; its marks stay until they are taken back.
    """


def _hint(name: str) -> Callable[[Body], click.Command]:
    """Declare a subcommand; its function makes the hint."""

    def wrap(f: Body) -> click.Command:
        @functools.wraps(f)
        def run(g: Globals, session: str, **kwargs: Any) -> None:
            _send(g, session, f(**kwargs))

        run = click.option("--session", default="mfsctl", show_default=True, help="Session that the hint belongs to.")(
            run
        )
        made: click.Command = hint.command(name)(with_globals(run))
        return made

    return wrap


def _send(g: Globals, session: str, body: pb.Hint) -> None:
    batch = pb.HintBatch(session=session, seq=1, hints=[body])
    with hints(g.socket) as daemon:
        reply = daemon.Send(batch, timeout=TIMEOUT_S, metadata=((LASTING, "1"),))
    if g.json:
        output.print_json(reply)
    else:
        for event in reply.events:
            kind = pb.Event.Kind.Name(event.kind).removeprefix("KIND_").lower().replace("_", " ")
            output.echo(tables.printable(f"{event.transfer_id or event.request_id}: {kind}: {event.reason}"))
        if reply.accepted:
            click.echo("accepted")
        for matched in reply.matched:
            click.echo(_match(matched.connections))
        for rejection in reply.rejected:
            for line in _violations(rejection):
                output.echo(f"mfsctl: rejected: {tables.printable(line)}", err=True)
    if reply.rejected:
        raise click.exceptions.Exit(Exit.BAD_NEWS)


def _match(connections: int) -> str:
    """What its selector matches now, in words."""
    if not connections:
        return "no connection matches now; those still to come will"
    return "1 connection matches now" if connections == 1 else f"{connections} connections match now"


def _violations(rejection: pb.Rejection) -> list[str]:
    """One line per field at fault; the bare message where there are no details."""
    lines = []
    for detail in rejection.status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            lines += [f"{v.field}: {v.description}" for v in bad.field_violations]
    return lines or [rejection.status.message]


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


TTL: Final = click.option("--ttl", type=SPAN, default=0.0, help="Forgotten after this; default: the daemon's limit.")


@_hint("request")
@click.argument("id_", metavar="ID")
@click.option("--ttft-left", type=DURATION, help="Time left until the first token is due, e.g. 180ms.")
@click.option("--no-deadline", is_flag=True, help="Instead of it: nobody has said when it is due.")
@click.option("--batch", "batch_id", default="", help="The batch it runs in.")
@click.option("--compute-left", type=SPAN, default=0.0, help="Compute still to be done for the first token.")
@TTL
def request(
    id_: str, ttft_left: float | None, batch_id: str, compute_left: float, ttl: float, *, no_deadline: bool
) -> pb.Hint:
    """Announce a request and its TTFT deadline."""
    if (ttft_left is None) is not no_deadline:
        raise click.UsageError("give --ttft-left, or --no-deadline, and not both")
    return pb.Hint(
        request=pb.Request(
            id=id_,
            ttft_left_us=0 if ttft_left is None else _us(ttft_left),
            no_deadline=no_deadline,
            batch_id=batch_id,
            compute_left_us=_us(compute_left),
            ttl_us=_us(ttl),
        )
    )


@_hint("batch")
@click.argument("id_", metavar="ID")
@click.option("--request", "request_ids", multiple=True, help="A member; may be given several times.")
@click.option("--layers", type=COUNT, default=0, help="Layers of the model; 0: unknown.")
@click.option("--current-layer", type=COUNT, default=0, help="The layer that computes now.")
@click.option("--layer-compute", type=SPAN, default=0.0, help="Compute time per layer.")
def batch(id_: str, request_ids: tuple[str, ...], layers: int, current_layer: int, layer_compute: float) -> pb.Hint:
    """Announce requests that execute together."""
    return pb.Hint(
        batch=pb.Batch(
            id=id_,
            request_ids=request_ids,
            layers=layers,
            current_layer=current_layer,
            layer_compute_us=_us(layer_compute),
        )
    )


@_hint("progress")
@click.argument("batch_id")
@click.argument("layer", type=COUNT)
@click.option("--compute-done", is_flag=True, help="The forward pass has ended.")
def progress(batch_id: str, layer: int, *, compute_done: bool) -> pb.Hint:
    """Say that a batch has started LAYER."""
    return pb.Hint(progress=pb.LayerProgress(batch_id=batch_id, current_layer=layer, compute_done=compute_done))


def _selector_options(f: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--udp", is_flag=True, help="The tuple is UDP's."),
        click.option("--pid", type=PID, help="Sockets of this process and its children."),
        click.option("--to", "to", type=ENDPOINT, help="Remote ADDRESS[:PORT[-PORT]]; with --pid also a network."),
        click.option("--from", "from_", type=ENDPOINT, help="Local [ADDRESS][:PORT[-PORT]]."),
        click.option("--cookie", type=COOKIE, help="The socket with this SO_COOKIE."),
    ):
        f = option(f)
    return f


def _selector(
    cookie: int | None, from_: Endpoint | None, to: Endpoint | None, pid: int | None, *, udp: bool
) -> pb.Selector:
    """Raise UsageError unless the options name connections in exactly one way."""
    if cookie is not None:
        if from_ or to or pid or udp:
            raise click.UsageError("--cookie names the socket already; leave --from, --to, --pid and --udp out")
        return pb.Selector(cookie=cookie)
    if pid is not None:
        if from_ or udp:
            raise click.UsageError("--pid takes --to only")
        remote = "" if to is None or to.network is None else str(to.network)
        return pb.Selector(process=pb.ProcessPeer(pid=pid, remote=remote, remote_port=_ports(to)))
    if to is None or to.network is None:
        raise click.UsageError("name the connection: --cookie, or --to ADDRESS[:PORTS] (and --from), or --pid")
    try:
        src = "" if from_ is None or from_.address is None else str(from_.address)
        return pb.Selector(
            tuple=pb.Tuple(
                src_addr=src,
                dst_addr=str(to.address),
                src_port=_ports(from_),
                dst_port=_ports(to),
                protocol=17 if udp else 6,
            )
        )
    except ValueError as e:
        raise click.UsageError(f"--to or --from {e}") from None


def _ports(endpoint: Endpoint | None) -> pb.PortRange:
    return pb.PortRange() if endpoint is None else pb.PortRange(first=endpoint.first, last=endpoint.last)


INTERLEAVED: Final = click.option(
    "--interleaved", is_flag=True, help="Bytes of several transfers are written in turns, not one after the other."
)


@_hint("transfer")
@click.argument("id_", metavar="ID")
@click.option("--stage", type=click.Choice(list(STAGES)), required=True, help="Network stage.")
@click.option("--bytes", "octets", type=SIZE, required=True, help="Payload, e.g. 10MB.")
@click.option("--request", "request_id", default="", help="Request that it belongs to.")
@click.option("--batch", "batch_id", default="", help="Batch that it belongs to.")
@click.option("--layer", type=COUNT, default=0, help="Layer that consumes or produces the data.")
@click.option("--deadline", type=DURATION, default=0.0, help="Its own deadline from now; default: the request's.")
@click.option(
    "--max-defer", type=SPAN, default=0.0, help="Longest time that it may be held back; default: the policy's."
)
@INTERLEAVED
@TTL
@_selector_options
def transfer(  # one argument per field of the message
    id_: str,
    stage: str,
    octets: int,
    request_id: str,
    batch_id: str,
    layer: int,
    deadline: float,
    max_defer: float,
    ttl: float,
    *,
    interleaved: bool,
    **selector: Any,
) -> pb.Hint:
    """Announce bytes about to be written to a connection."""
    return pb.Hint(
        transfer=pb.Transfer(
            id=id_,
            request_id=request_id,
            batch_id=batch_id,
            stage=STAGES[stage],
            target_layer=layer,
            bytes=octets,
            selector=_selector(**selector),
            deadline_us=_us(deadline),
            max_defer_us=_us(max_defer),
            ttl_us=_us(ttl),
            interleaved=interleaved,
        )
    )


@_hint("done")
@click.argument("kind", type=KIND)
@click.argument("id_", metavar="ID")
def done(kind: str, id_: str) -> pb.Hint:
    """Say that a transfer, request or batch is complete."""
    return pb.Hint(completion=pb.Completion(**{f"{kind}_id": id_}))


@_hint("cancel")
@click.argument("kind", type=KIND)
@click.argument("id_", metavar="ID")
def cancel(kind: str, id_: str) -> pb.Hint:
    """Say that a transfer, request or batch will not come."""
    hint = pb.Hint(cancellation=pb.Cancellation())
    setattr(hint.cancellation, f"{kind}_id", id_)
    return hint


@_hint("mark")
@click.option("--stage", type=click.Choice([*STAGES, "none"]), required=True, help="none takes the mark back.")
@INTERLEAVED
@_selector_options
def mark(stage: str, *, interleaved: bool, **selector: Any) -> pb.Hint:
    """Say which stage connections without hints belong to.

    How many those are now is printed, too.
    """
    number = STAGES.get(stage, pb.STAGE_UNSPECIFIED)
    return pb.Hint(connection=pb.ConnectionMark(selector=_selector(**selector), stage=number, interleaved=interleaved))
