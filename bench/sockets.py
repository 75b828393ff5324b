# SPDX-License-Identifier: Apache-2.0
"""What a host with very many sockets costs a hint, a tick, and the first bytes of a connection.

    python -m bench.sockets [--sockets N] [--seconds S]

The real daemon enforces htb on one end of a veth pair between two throw-away namespaces. In its namespace two processes
hold ``sockets`` established sockets over the loopback; everything is done once without them and once with them, each
with a daemon of its own.

*Unary*: 200 times a second a connection is made to the other namespace and hinted by a call of its own (renew a
request, announce a transfer on the socket), which is answered when the kernel obeys; then 4 KB are sent and it is
closed. ``unary_p99_ratio`` is the 99th percentile of the calls with the sockets over that without. ``tick_p99_ms`` is
the engine's, with the sockets, as the daemon reports it.

*First bytes*: transfers of 64 KB, each announced by ``Client.transfer``, ``flush`` and sent: ``_kept`` on one
connection that is kept, ``_each`` on a connection of its own for each. What the other bands' queues have sent
meanwhile, over what was hinted, is the share in the wrong band; ``first_byte_share`` is the worse one, with the
sockets.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.common import Figure, parser, write
from bench.parts.host import HERE, THERE, daemon, namespaces
from mfsd.client import Client, Stage, cookie_of
from mfsd.client.introduction import introduced
from mfsd.lab.hosts.enter import inside
from mfsd.lab.hosts.tcp import reset_at_close
from mfsd.v1 import control_pb2, control_pb2_grpc, hints_pb2_grpc
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc

SOCKETS: Final = 20_000
PER_S: Final = 200
SECONDS: Final = 20.0
PORT: Final = 6000
HELD: Final = 7000
"""First port of those that only hold connections."""
SMALL: Final = 4096
SIZE: Final = 64 << 10
TRANSFERS: Final = 400
"""Of 64 KB, kept and each."""
RATE: Final = "2gbit"
EACH: Final = 2500
"""Connections that one pair of processes holds, within the usual limit of descriptors."""


# --- other processes --------------------------------------------------------------------------------------------------


def sink(namespace: str, port: int = PORT, *, crowd: bool = False) -> None:
    """Accept connections and read them, or (``crowd``) only hold them."""
    with inside(namespace):
        listener = socket.create_server((HERE if crowd else THERE, port), backlog=4096)
    poll = selectors.DefaultSelector()
    poll.register(listener, selectors.EVENT_READ)
    held = []
    print("ready", flush=True)
    while True:
        for key, _ in poll.select():
            sock: Any = key.fileobj
            if sock is listener:
                new = listener.accept()[0]
                if crowd:
                    held.append(new)
                else:
                    poll.register(new, selectors.EVENT_READ)
                continue
            with contextlib.suppress(OSError):
                if sock.recv(1 << 18):
                    continue
            poll.unregister(sock)
            sock.close()


def crowd(namespace: str, number: int, count: int) -> None:
    """Open connections over the loopback of a namespace, and hold them. ``number`` tells several such apart."""
    held = []
    with inside(namespace):
        for i in range(count):
            s = socket.socket()
            # A connection's ports are free again for the next one with another peer only; so name them.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reset_at_close(s)
            s.bind((f"127.0.1.{number + 1}", 1024 + i))
            s.connect((HERE, HELD + number))
            held.append(s)
    print("ready", flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def helper(*words: object) -> Iterator[None]:
    """One of these processes, ready."""
    command = [sys.executable, "-m", "bench.sockets", *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "the helper has failed"
            yield
        finally:
            process.kill()


# --- what is measured -------------------------------------------------------------------------------------------------


def status(channel: grpc.Channel) -> control_pb2.Status:
    """Of the daemon."""
    answer: control_pb2.Status = control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest())
    return answer


def elsewhere(channel: grpc.Channel) -> int:
    """Bytes that bands other than the levels' and control's have sent."""
    return sum(
        b.bytes for b in status(channel).devices[0].bands if not b.name.startswith("level") and b.name != "control"
    )


def dial() -> socket.socket:
    """A connection to the other namespace; the calling thread is in the daemon's."""
    s = socket.create_connection((THERE, PORT))
    reset_at_close(s)
    return s


def unary(channel: grpc.Channel, seconds: float) -> list[float]:
    """Seconds per call."""
    stub = hints_pb2_grpc.HintsStub(channel)
    out = []
    start = time.perf_counter()
    for i in range(round(seconds * PER_S)):
        while (wait := start + i / PER_S - time.perf_counter()) > 0:
            time.sleep(wait)
        with dial() as sock:
            batch = pb.HintBatch(session="unary", seq=i + 1)
            request = batch.hints.add().request
            request.id, request.ttft_left_us = "r", 60_000_000
            t = batch.hints.add().transfer
            t.id, t.request_id, t.bytes, t.stage = f"t{i}", "r", SMALL, pb.STAGE_P2D
            t.selector.cookie = cookie_of(sock)
            began = time.perf_counter()
            reply = stub.Send(batch)
            out.append(time.perf_counter() - began)
            assert not reply.rejected, reply.rejected
            sock.sendall(bytes(SMALL))
    return out


def wrong_share(channel: grpc.Channel, client: Client, *, kept: bool) -> float:
    """Share of hinted bytes in the wrong band."""
    client.request("first", ttft_left_s=300)
    assert client.flush(5)
    before = elsewhere(channel)
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(dial()) if kept else None
        for i in range(TRANSFERS):
            s = one or dial()
            client.transfer(f"{kept}{i}", s, SIZE, stage=Stage.P2D, request="first")
            assert client.flush(5)
            s.sendall(bytes(SIZE))
            if one is None:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))  # what is on its way arrives
                s.close()
        time.sleep(1)
    return (elsewhere(channel) - before) / (TRANSFERS * SIZE)


def phase(a: str, seconds: float) -> dict[str, Any]:
    """All of it against one daemon."""
    with daemon(namespace=a, rate=RATE) as mfsd, introduced(mfsd.target) as channel, inside(a):
        time.sleep(2)
        before, began = mfsd.cpu_s, time.monotonic()
        calls = unary(channel, seconds)
        busy = 100 * (mfsd.cpu_s - before) / (time.monotonic() - began)
        said = status(channel)
        assert not said.notices, said.notices
        with Client(target=mfsd.target) as client:
            kept, each = (wrong_share(channel, client, kept=k) for k in (True, False))
        return {"calls": calls, "tick": said.tick_p99_ms, "kept": kept, "each": each, "cpu": busy}


def measure(sockets: int, seconds: float) -> list[Figure]:
    """Without the sockets, and with them."""
    with namespaces() as (a, b), helper("sink", b):
        alone = phase(a, seconds)
        with contextlib.ExitStack() as stack:
            for number, start in enumerate(range(0, sockets // 2, EACH)):
                stack.enter_context(helper("hold", a, HELD + number))
                stack.enter_context(helper("crowd", a, number, min(EACH, sockets // 2 - start)))
            many = phase(a, seconds)
    p50, p99 = (float(v) * 1000 for v in np.percentile(many["calls"], [50, 99]))
    alone50, alone99 = (float(v) * 1000 for v in np.percentile(alone["calls"], [50, 99]))
    wrong, alone_wrong = (max(p["kept"], p["each"]) for p in (many, alone))
    return [
        Figure.against("unary_p99_ratio", p99 / alone99, "ratio", target=2.0, want="at most"),
        Figure.against("tick_p99_ms", many["tick"], "ms", target=5.0, want="at most", baseline=alone["tick"]),
        Figure.against("first_byte_share", wrong, "ratio", target=0.005, want="at most", baseline=alone_wrong),
        Figure("first_byte_share_kept", many["kept"], "ratio", baseline=alone["kept"]),
        Figure("first_byte_share_each", many["each"], "ratio", baseline=alone["each"]),
        Figure("unary_p99_ms", p99, "ms", baseline=alone99),
        Figure("unary_p50_ms", p50, "ms", baseline=alone50),
        Figure("cpu_percent", many["cpu"], "% of a core", baseline=alone["cpu"]),
        Figure("sockets", sockets, "1"),
    ]


def main() -> None:
    """Run and write build/bench/sockets.json; or be one of the other processes."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if sys.argv[1:2] == ["sink"]:
        sink(sys.argv[2])
    elif sys.argv[1:2] == ["hold"]:
        sink(sys.argv[2], int(sys.argv[3]), crowd=True)
    elif sys.argv[1:2] == ["crowd"]:
        crowd(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        line = parser(__doc__)
        line.add_argument("--sockets", type=int, default=SOCKETS)
        line.add_argument("--seconds", type=float, default=SECONDS)
        args = line.parse_args()
        print(f"load of the machine before: {os.getloadavg()[0]:.2f}")
        write("sockets", measure(args.sockets, args.seconds))


if __name__ == "__main__":
    main()
