# SPDX-License-Identifier: Apache-2.0
"""Hints per second, and how long until a hint has set a level, against an empty service on the same grpcio.

    python -m bench.hints [--rounds N]

Two server processes share one core, the client has another: mfsd (a whole daemon; its table is plain shared memory, so
that the client can watch it) and an echo service with the same messages that does nothing. In each round both are
measured, one right after the other.

*Stream*: per request 1 announcement, 1 layer progress, 31 transfers on 64 real TCP connections, and the 31 completions
of the request before; packed into messages of 16 hints (and, with a suffix, of 1 and of 64), at most 256 messages
unanswered (an answer waits for the engine's tick; a client of ours has 8192 hints unanswered at most). Hints answered
per second. The message size decides the ratio to the echo service: all that the echo service does is per message,
nearly all that mfsd does is per hint.

*Columns*: per message a request, the completion of the one before, and 512 transfers of it by columns, on the same
connections. Transfers answered per second.

*Unary*: 500 calls a second of 3 hints (end a transfer, renew its request, announce another one), each of which moves
its connection to another band. From the start of the call to the reply and the new band being in the table, whichever
is later; for the echo service to the reply.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np

from bench.common import Figure, parser, write
from mfsd.client import cookie_of
from mfsd.client.introduction import introduced
from mfsd.daemon import devices
from mfsd.daemon.config import parse
from mfsd.daemon.daemon import Daemon
from mfsd.daemon.memory import keep_freed
from mfsd.daemon.turns import keep_turns_short
from mfsd.datapath import _abi
from mfsd.v1 import control_pb2, control_pb2_grpc, hints_pb2_grpc
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mfsd.engine.slots import SlotRows

PER_MESSAGE: Final = (16, 1, 64)
"""Hints; the first is the one whose figures have no suffix."""
PER_REQUEST: Final = 31
"""Transfers."""
ROWS: Final = 512
"""Transfers of a request by columns."""
COLUMN_MESSAGES: Final = 600
"""Per round."""
CONNECTIONS: Final = 64
WINDOW: Final = 256
REQUESTS: Final = {1: 150, 16: 1000, 64: 1000}
"""Per round, by hints per message; about two seconds."""
CALLS: Final = 1500
PERIOD_S: Final = 1 / 500
SLOTS: Final = 1024
STREAM: Final = "/mfsd.v1.Hints/Stream"
CORE: Final = "MFSD_BENCH_CORE"
"""Environment variable that tells a server its core."""


# --- servers ----------------------------------------------------------------------------------------------------------


class Echo(hints_pb2_grpc.HintsServicer):
    """The same messages, and nothing done about them."""

    async def Send(self, request: pb.HintBatch, context: Any) -> pb.HintReply:
        return self._reply(request)

    @staticmethod
    def _reply(request: pb.HintBatch) -> pb.HintReply:
        return pb.HintReply(seq=request.seq, accepted=len(request.hints) + len(request.transfers.ids))

    async def Stream(  # type: ignore[override]  # grpc.aio takes writers, too
        self, request_iterator: AsyncIterator[pb.HintBatch], context: Any
    ) -> None:
        async for request in request_iterator:
            await context.write(self._reply(request))

    async def Advise(self, request: pb.AdviseRequest, context: Any) -> pb.AdviseReply:
        del request, context
        return pb.AdviseReply()


async def echo(directory: Path) -> None:
    server = grpc.aio.server()
    hints_pb2_grpc.add_HintsServicer_to_server(Echo(), server)
    server.add_insecure_port(f"unix:{directory / 'echo.sock'}")
    await server.start()
    await server.wait_for_termination()


async def serve(directory: Path) -> None:
    setattr(devices, "memory_rows", lambda slots: shared_rows(directory, slots))  # noqa: B010 - not ours to export
    config = parse(
        {
            "daemon": {
                "socket": str(directory / "mfsd.sock"),
                "state_dir": str(directory),
                "slots": SLOTS,
                "anonymous": True,
            }
        }
    )
    keep_freed()  # as the daemon does
    keep_turns_short()
    await Daemon(config, None).run()


def shared_rows(directory: Path, slots: int) -> SlotRows:
    """Rows that another process can see, too."""
    path = directory / "table"
    if not path.exists():
        path.write_bytes(bytes(slots * _abi.SLOT_DTYPE.itemsize))
    rows: SlotRows = np.memmap(path, dtype=_abi.SLOT_DTYPE, mode="r+", shape=(slots,)).view(np.ndarray)
    return rows


@contextlib.contextmanager
def server(what: str, directory: Path) -> Iterator[str]:
    """Run one of the servers in a process of its own; its target."""
    path = directory / f"{'mfsd' if what == 'serve' else 'echo'}.sock"
    process = subprocess.Popen([sys.executable, "-m", "bench.hints", what, str(directory)])
    try:
        with grpc.insecure_channel(f"unix:{path}") as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
        yield f"unix:{path}"
    finally:
        process.terminate()
        process.wait(timeout=20)


# --- the client -------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """Makes messages; every transfer has an id of its own."""

    cookies: list[int]
    made: int = 0

    def messages(self, session: str, requests: int, size: int) -> list[bytes]:
        """The hints of so many requests, in messages of ``size`` hints; nothing is left of them."""
        hints = [hint for _ in range(requests) for hint in self._request(session)]
        hints.append(pb.Hint(cancellation=pb.Cancellation(request_id=f"{session}/r{self.made - 1}")))
        chunks = (hints[i : i + size] for i in range(0, len(hints), size))
        return [pb.HintBatch(session=session, seq=i + 1, hints=c).SerializeToString() for i, c in enumerate(chunks)]

    def columns(self, session: str, messages: int) -> list[bytes]:
        """A request's transfers in each message; nothing is left of them."""
        batches, end = [self._columns(session, i + 1) for i in range(messages)], pb.HintBatch(session=session)
        end.hints.add().cancellation.request_id = f"r{self.made - 1}"
        return [b.SerializeToString() for b in (*batches, end)]

    def _columns(self, session: str, seq: int) -> pb.HintBatch:
        n = self.made
        self.made += 1
        batch = pb.HintBatch(session=session, seq=seq)
        batch.hints.add().request.MergeFrom(pb.Request(id=f"r{n}", ttft_left_us=5_000_000 + 1000 * (n % 1000)))
        batch.hints.add().completion.request_id = f"r{n - 1}"
        batch.transfers.MergeFrom(
            pb.TransferColumns(
                ids=[f"r{n}/{i}" for i in range(ROWS)],
                owners=[f"r{n}"],
                request=[1],
                stage=[pb.STAGE_P2D],
                bytes=[(1 << 20) + i for i in range(ROWS)],
                target_layer=[i % 64 for i in range(ROWS)],
                selectors=[pb.Selector(cookie=c) for c in self.cookies],
                selector=[i % len(self.cookies) for i in range(ROWS)],
            )
        )
        return batch

    def _request(self, session: str) -> Iterator[pb.Hint]:
        n = self.made
        self.made += 1
        owner, batch = f"{session}/r{n}", f"b{n % 16}"
        yield pb.Hint(request=pb.Request(id=owner, ttft_left_us=5_000_000 + 1000 * (n % 1000), batch_id=batch))
        yield pb.Hint(progress=pb.LayerProgress(batch_id=batch, current_layer=n // 16 % 4096))
        for i in range(PER_REQUEST):
            selector = pb.Selector(cookie=self.cookies[(n * PER_REQUEST + i) % len(self.cookies)])
            transfer = pb.Transfer(
                id=f"{owner}/{i}",
                request_id=owner,
                target_layer=i,
                bytes=1 << 20,
                stage=pb.STAGE_P2D,
                selector=selector,
            )
            yield pb.Hint(transfer=transfer)
        for i in range(PER_REQUEST):
            yield pb.Hint(completion=pb.Completion(transfer_id=f"{session}/r{n - 1}/{i}"))


async def stream(target: str, messages: list[bytes], hints: int) -> float:
    """Hints answered per second."""
    async with grpc.aio.insecure_channel(target) as channel:
        call: Any = channel.stream_stream(STREAM)()  # no serializers: bytes in, bytes out
        window = asyncio.Semaphore(WINDOW)

        async def send() -> None:
            for message in messages:
                await window.acquire()
                await call.write(message)
            await call.done_writing()

        start = time.perf_counter()
        sending = asyncio.create_task(send())
        replies = []
        for _ in messages:
            replies.append(await call.read())
            window.release()
        took = time.perf_counter() - start
        await sending
    parsed = [pb.HintReply.FromString(r) for r in replies]
    rejected = [r for p in parsed for r in p.rejected]
    assert not rejected, rejected[0]
    assert sum(p.accepted for p in parsed) == hints
    return hints / took


def by_columns(target: str, worker: Worker) -> float:
    """Transfers answered per second."""
    messages, hints = worker.columns("columns", COLUMN_MESSAGES), COLUMN_MESSAGES * (ROWS + 2) + 1
    return asyncio.run(stream(target, messages, hints)) * COLUMN_MESSAGES * ROWS / hints


@dataclass
class Mover:
    """Unary calls that move one connection between two bands."""

    cookie: int
    rows: SlotRows
    session: str = "unary"
    turn: int = 0

    def batch(self) -> pb.HintBatch:
        self.turn += 1
        n = self.turn
        batch = pb.HintBatch(session=self.session, seq=n)
        batch.hints.add().cancellation.transfer_id = f"t{n - 1}"
        request = batch.hints.add().request
        request.id, request.ttft_left_us = "r", 60_000_000
        t = batch.hints.add().transfer
        t.id, t.request_id, t.bytes = f"t{n}", "r", 1000
        t.stage = pb.STAGE_P2D if n % 2 else pb.STAGE_COLLECTIVE  # the lowest level and the highest
        t.selector.cookie = self.cookie
        return batch

    def learn(self, channel: grpc.Channel) -> tuple[int, tuple[int, int]]:
        """Its slot, and the band after an even and after an odd turn."""
        stub, control = hints_pb2_grpc.HintsStub(channel), control_pb2_grpc.ControlStub(channel)
        bands = [0, 0]
        for _ in range(4):
            reply = stub.Send(self.batch())
            assert not reply.rejected, reply.rejected
            time.sleep(0.1)
            slot = control.Explain(control_pb2.ExplainRequest(cookie=self.cookie)).connection.slot
            bands[self.turn % 2] = int(self.rows["band"][slot])
        assert bands[0] != bands[1], f"both stages lead to band {bands[0]}"
        return int(slot), (bands[0], bands[1])


def unary(stub: hints_pb2_grpc.HintsStub, mover: Mover, place: tuple[int, tuple[int, int]] | None) -> list[float]:
    """Seconds per call; ``place`` None: to the reply only."""
    out = []
    start = time.perf_counter()
    for i in range(CALLS):
        batch = mover.batch()
        while (wait := start + i * PERIOD_S - time.perf_counter()) > 0:
            time.sleep(wait)
        began = time.perf_counter()
        stub.Send(batch)
        if place is not None:
            slot, bands = place
            wanted = bands[mover.turn % 2]
            while mover.rows["band"][slot] != wanted:
                assert time.perf_counter() - began < 5, "the level never came"
        out.append(time.perf_counter() - began)
    return out


@contextlib.contextmanager
def connections(count: int) -> Iterator[list[int]]:
    """Cookies of real TCP connections over the loopback."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=count))
        cookies = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            stack.enter_context(listener.accept()[0])
            cookies.append(cookie_of(client))
        yield cookies


def measure(rounds: int) -> list[Figure]:
    streams: dict[int, list[tuple[float, float]]] = {size: [] for size in PER_MESSAGE}
    columns: list[tuple[float, float]] = []
    calls: list[float] = []
    echoes: list[float] = []
    with tempfile.TemporaryDirectory(prefix="mfsd-bench-") as name, connections(CONNECTIONS + 1) as cookies:
        directory = Path(name)
        with server("serve", directory) as mfsd, server("echo", directory) as other:
            worker = Worker(cookies[1:])
            mover = Mover(cookies[0], shared_rows(directory, SLOTS))
            with introduced(mfsd) as a, grpc.insecure_channel(other) as b:
                stub, empty = hints_pb2_grpc.HintsStub(a), hints_pb2_grpc.HintsStub(b)
                place = mover.learn(a)
                for i in range(rounds):
                    for size in PER_MESSAGE:
                        hints = REQUESTS[size] * (2 + 2 * PER_REQUEST) + 1
                        messages = worker.messages("stream", REQUESTS[size], size)
                        ours = asyncio.run(stream(mfsd, messages, hints))
                        theirs = asyncio.run(stream(other, messages, hints))
                        streams[size].append((ours, theirs))
                        print(f"round {i + 1}, {size} per message: {ours:,.0f}/s, the empty service {theirs:,.0f}/s")
                    columns.append((by_columns(mfsd, worker), by_columns(other, worker)))
                    ours, theirs = columns[-1]
                    print(f"round {i + 1}, columns: {ours:,.0f} transfers/s, the empty service {theirs:,.0f}/s")
                    time.sleep(0.5)
                    calls += unary(stub, mover, place)
                    echoes += unary(empty, Mover(cookies[0], mover.rows), None)
    out: list[Figure] = []
    for size, pairs in streams.items():
        out += _stream_figures("" if size == PER_MESSAGE[0] else f"_{size}_per_message", pairs)
    many, empty_many = (statistics.median(side) for side in zip(*columns, strict=True))
    p50, p99 = (float(v) * 1000 for v in np.percentile(calls, [50, 99]))
    echo50, echo99 = (float(v) * 1000 for v in np.percentile(echoes, [50, 99]))
    return [
        *out,
        Figure.against(
            "column_transfers_per_s",
            many,
            "1/s",
            target=150_000,
            want="at least",
            baseline=empty_many,
            ratio=many / empty_many,
        ),
        Figure.against("unary_p99_ms", p99, "ms", target=2.0, want="at most", baseline=echo99, ratio=p99 / echo99),
        Figure.against("unary_p99_over_echo", p99 / echo99, "ratio", target=2.5, want="at most"),
        Figure("unary_p50_ms", p50, "ms", baseline=echo50, ratio=p50 / echo50),
        Figure("unary_ratio_to_echo", p50 / echo50, "ratio"),
    ]


def _stream_figures(suffix: str, pairs: list[tuple[float, float]]) -> list[Figure]:
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(o / t for o, t in pairs)
    rate, share = f"stream_hints_per_s{suffix}", f"stream_ratio_to_echo{suffix}"
    if suffix:
        return [Figure(rate, ours, "1/s", theirs, ours / theirs), Figure(share, ratio, "ratio")]
    return [
        Figure.against(rate, ours, "1/s", target=50_000, want="at least", baseline=theirs, ratio=ours / theirs),
        Figure.against(share, ratio, "ratio", target=0.5, want="at least"),
    ]


def main() -> None:
    line = parser(__doc__)
    line.add_argument("--rounds", type=int, default=5)
    line.add_argument("role", nargs="?", choices=["serve", "echo"], help=argparse.SUPPRESS)
    line.add_argument("directory", nargs="?", type=Path, help=argparse.SUPPRESS)
    args = line.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if args.role:
        # The mask that was inherited is the client's.
        os.sched_setaffinity(0, {int(os.environ[CORE])})
        asyncio.run((serve if args.role == "serve" else echo)(args.directory))
        return
    if len(cores) < 2:
        print("hints: one core only; client and server share it, so the figures say little")
    os.environ[CORE] = str(cores[0])
    os.sched_setaffinity(0, {cores[-1]})
    write("hints", measure(args.rounds))


if __name__ == "__main__":
    main()
