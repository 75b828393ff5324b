# SPDX-License-Identifier: Apache-2.0
"""How much an honest client notices of a hostile one, beside one attack after the other.

The daemon runs without a device (nothing here depends on one), the hostile client in a process and, for root, with a
user of its own. The honest one announces and cancels a transfer on a connection of its own, one call after the other;
its latencies beside each attack are compared with those of the same client alone. ``longest_stall_ms`` is its longest
wait in all attacks, ``rss_mb`` the daemon's memory after all of them.

Then traffic, for root: two users on a link of 200 Mbit/s between namespaces, the honest one with a connection marked as
a collective that wants 30 % of it, beside one that takes what it can get in all the ways of bench/parts/workers.py.
``traffic_share_ratio`` is the least that the honest one moved beside any of them over what it moved alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import click
import grpc
import numpy as np

from bench.common import Figure, write
from bench.parts import workers
from bench.parts.host import THERE, Daemon, daemon, namespaces
from mfsd.client import cookie_of
from mfsd.client.introduction import introduced
from mfsd.v1 import hints_pb2 as pb
from mfsd.v1 import hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUIET: Final = 'log_level = "error"'
P2D: Final = pb.STAGE_P2D
LONG_US: Final = 60_000_000
LINK_MBIT: Final = 200
WANTS: Final = 0.3
"""Of the link, the honest user: less than its even part."""


def _request(name: str) -> pb.Hint:
    return pb.Hint(request=pb.Request(id=name, ttft_left_us=LONG_US))


def _transfer(name: str, cookie: int, *, size: int = 1 << 20, interleaved: bool = False) -> pb.Hint:
    selector = pb.Selector(cookie=cookie)
    return pb.Hint(
        transfer=pb.Transfer(id=name, request_id="r", stage=P2D, bytes=size, selector=selector, interleaved=interleaved)
    )


# --- attacks: batches without end -------------------------------------------------------------------------------------


def nonsense(_: int) -> Iterator[list[pb.Hint]]:
    """Hints that mean nothing."""
    while True:
        yield [pb.Hint()] * 1024


def swaps(_: int) -> Iterator[list[pb.Hint]]:
    """Members of batches that come and go."""
    members = [f"r{i}" for i in range(680)]
    yield [_request(m) for m in members]
    while True:
        yield [pb.Hint(batch=pb.Batch(id=f"b{i % 2}", request_ids=members if i % 4 < 2 else [])) for i in range(1024)]


def ranges(_: int) -> Iterator[list[pb.Hint]]:
    """Selectors that match nothing, other ones each time, taken back in between."""
    for n in itertools.count():
        marks = []
        for i in range(512):
            selector = pb.Selector()
            selector.tuple.dst_addr = f"10.{n & 255}.{i >> 8}.{i & 255}"
            selector.tuple.dst_port.first, selector.tuple.dst_port.last = 1, 65535
            marks.append(selector)
        yield [pb.Hint(connection=pb.ConnectionMark(selector=s, stage=P2D)) for s in marks]
        yield [pb.Hint(connection=pb.ConnectionMark(selector=s)) for s in marks]


def crowd(cookie: int) -> Iterator[list[pb.Hint]]:
    """As many transfers on one connection as may be, then all cancelled at once."""
    while True:
        yield [_request("r")]
        for k in range(64):
            yield [_transfer(f"{k}/{i}", cookie, interleaved=k % 2 == 1) for i in range(1000)]
        yield [pb.Hint(cancellation=pb.Cancellation(request_id="r"))]


def holes(cookie: int) -> Iterator[list[pb.Hint]]:
    """Transfers cancelled one by one in the middle of very many."""
    yield [_request("r")]
    for k in range(32):
        yield [_transfer(f"{k}/{i}", cookie) for i in range(1000)]
    for k in itertools.cycle(range(32)):
        yield [pb.Hint(cancellation=pb.Cancellation(transfer_id=f"{k}/{i}")) for i in range(300, 400)]
        yield [_transfer(f"{k}/{i}", cookie) for i in range(300, 400)]


def ballast(cookie: int) -> Iterator[list[pb.Hint]]:
    """Fields that nobody knows, and the longest names there can be."""
    for n in itertools.count():
        raw = pb.Selector(cookie=cookie).SerializeToString() + b"\x9a\x06\x80\x80\x04" + n.to_bytes(8, "big") * 8192
        yield [pb.Hint(connection=pb.ConnectionMark(selector=pb.Selector.FromString(raw), stage=P2D))] * 16
        yield [_request(f"{n}/{i}".ljust(256, "x")) for i in range(1024)]


def flips(cookie: int) -> Iterator[list[pb.Hint]]:
    """A connection marked as one stage and another."""
    marks = [
        pb.Hint(connection=pb.ConnectionMark(selector=pb.Selector(cookie=cookie), stage=stage))
        for stage in (pb.STAGE_COLLECTIVE, pb.STAGE_BACKGROUND)
    ]
    while True:
        yield marks * 512


def deadlines(cookie: int) -> Iterator[list[pb.Hint]]:
    """Everything due at once, and never done."""
    for n in itertools.count():
        yield [_request("r"), *(_transfer(f"{n}/{i}", cookie, size=1 << 40) for i in range(1000))]


BATCHES: Final[dict[str, Callable[[int], Iterator[list[pb.Hint]]]]] = {
    a.__name__: a for a in (nonsense, swaps, ranges, crowd, holes, ballast, flips, deadlines)
}


def run(target: str, name: str, until: float, done: Any) -> None:
    """One attack, in a process of its own; ``done.value`` counts its calls, so that one that was none is noticed."""
    listener = socket.create_server(("127.0.0.1", 0))
    "".encode("idna")  # looked up while this user may still read the library
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(workers.HOSTILE_UID)
        os.setuid(workers.HOSTILE_UID)
    mine = socket.create_connection(listener.getsockname())
    with listener, mine:
        if name == "malformed":
            with introduced(target) as channel:
                ask: Any = channel.unary_unary("/mfsd.v1.Hints/Send")
                while time.time() < until:
                    with contextlib.suppress(grpc.RpcError):
                        ask(b"\xff\xff\xff")
                    done.value += 1
        elif name == "sessions":
            while time.time() < until:
                with introduced(target) as channel:
                    stub = hints_pb2_grpc.HintsStub(channel)
                    for i in range(16):
                        stub.Send(pb.HintBatch(session=f"{time.time()}/{i}", hints=[_request("r")]))
                        done.value += 1
        else:
            batches = BATCHES[name](cookie_of(mine))
            with introduced(target) as channel:
                stub = hints_pb2_grpc.HintsStub(channel)
                while time.time() < until:
                    stub.Send(pb.HintBatch(session="hostile", hints=next(batches)))
                    done.value += 1


ATTACKS: Final = (*BATCHES, "malformed", "sessions")


def honest(target: str, seconds: float) -> list[float]:
    """Latencies of calls that announce and cancel a transfer, ms."""
    out: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as mine:
        cookie = cookie_of(mine)
        with introduced(target) as channel:
            stub = hints_pb2_grpc.HintsStub(channel)
            until = time.monotonic() + seconds
            while (began := time.monotonic()) < until:
                name = f"t{len(out)}"
                hints = [
                    _request("r"), _transfer(name, cookie), pb.Hint(cancellation=pb.Cancellation(transfer_id=name)),
                ]  # fmt: skip
                reply = stub.Send(pb.HintBatch(session="honest", hints=hints))
                assert reply.accepted == 3, reply
                out.append((time.monotonic() - began) * 1000)
    return out


def open_to_all(mfsd: Daemon) -> None:
    """Let every user reach its sockets."""
    for path in (mfsd.folder, mfsd.folder / "mfsd.sock", mfsd.folder / "mfsd.sock.id"):
        path.chmod(0o777)


def moved(namespace: str, target: str, seconds: float, attack: str = "") -> float:
    """Bytes/s that the honest one moves, alone or beside an attack."""
    with contextlib.ExitStack() as stack:
        if attack:
            stack.enter_context(workers.started(attack, namespace, THERE, target, 2 * seconds + 10))
            time.sleep(2.0)
        rate = WANTS * LINK_MBIT * 1e6 / 8
        one = stack.enter_context(workers.started("honest", namespace, THERE, target, seconds, rate))
        assert one.stdout is not None
        said = json.loads(one.stdout.readline())
        return float(said["bytes"] / said["seconds"])


def traffic(seconds: float) -> Iterator[Figure]:
    """What users do to each other's bytes."""
    with (
        namespaces() as (a, b),
        daemon(QUIET, a, f"{LINK_MBIT}mbit") as mfsd,
        workers.started("sink", b, THERE),
    ):
        open_to_all(mfsd)
        alone = moved(a, mfsd.target, seconds)
        yield Figure("traffic_mbit alone", alone * 8e-6, "Mbit/s")
        ratios = []
        for attack in workers.HOSTILE:
            rate = moved(a, mfsd.target, seconds, attack)
            ratios.append(rate / alone)
            yield Figure(f"traffic_mbit {attack}", rate * 8e-6, "Mbit/s", alone * 8e-6, rate / alone)
        yield Figure.against("traffic_share_ratio", min(ratios), "ratio", target=0.95, want="at least")


@click.command()
@click.option("--seconds", default=5.0, show_default=True, help="For each attack.")
@click.option("--only", multiple=True, type=click.Choice(ATTACKS), help="Of the attacks; can be repeated.")
def main(seconds: float, only: tuple[str, ...]) -> None:
    """Run all attacks beside an honest client."""
    p99: dict[str, float] = {}
    longest = 0.0
    figures: list[Figure] = []
    with daemon(QUIET) as mfsd:
        open_to_all(mfsd)
        honest(mfsd.target, 1.0)
        alone = honest(mfsd.target, 2 * seconds)
        base = float(np.percentile(alone, 99))
        figures.append(Figure("unary_p99_ms alone", base, "ms"))
        figures.append(Figure("longest_ms alone", max(alone), "ms"))
        most = 0.0
        for attack in only or ATTACKS:
            spawn = multiprocessing.get_context("spawn")
            done = spawn.Value("Q", 0)
            hostile = spawn.Process(target=run, args=(mfsd.target, attack, time.time() + seconds + 1.5, done))
            hostile.start()
            time.sleep(1.0)
            took = honest(mfsd.target, seconds)
            hostile.join(10)
            assert hostile.exitcode == 0, f"{attack} ended with {hostile.exitcode}"
            figures.append(Figure(f"calls {attack}", done.value / (seconds + 1.5), "/s"))
            p99[attack] = float(np.percentile(took, 99))
            longest = max(longest, *took)
            most = max(most, mfsd.process.memory_info().rss / 1e6)
            figures.append(Figure(f"unary_p99_ms {attack}", p99[attack], "ms", base, p99[attack] / base))
            figures.append(Figure(f"longest_ms {attack}", max(took), "ms"))
    figures += [
        Figure.against("unary_p99_ratio", max(p99.values()) / base, "x", target=3, want="at most"),
        Figure.against("longest_stall_ms", longest, "ms", target=100, want="at most"),
        Figure.against("rss_mb", most, "MB", target=200, want="at most"),
    ]
    if os.geteuid() == 0:
        figures += traffic(seconds)
    write("hostile", figures)


if __name__ == "__main__":
    main()
