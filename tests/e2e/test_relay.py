# SPDX-License-Identifier: Apache-2.0
"""Hints between six hosts, each a namespace: one waits for KV of five, of which four are no help."""

from __future__ import annotations

import contextlib
import functools
import itertools
import secrets
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from support.namespaces import ip
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Stage, tuple_of
from mfsd.client.introduction import introduced
from mfsd.lab.hosts.certificates import Authority
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.netns

PORT: Final = 5731
MB: Final = 1_000_000
PEERS: Final = ("good", "slow", "parted", "old", "impostor")
OLD: Final = """
import sys, time
from concurrent import futures
import grpc
from mfsd.v1 import hints_pb2
cert, key, ca, log = sys.argv[1:]
def stream(batches, context):
    # As it was before there were columns and advice: field numbers above 5 are unknown to it.
    for batch in batches:
        with open(log, "a") as f:
            f.writelines(h.transfer.id + chr(10) for h in batch.hints if h.HasField("transfer"))
        yield hints_pb2.HintReply(seq=batch.seq, accepted=len(batch.hints), epoch=7)
handler = grpc.stream_stream_rpc_method_handler(
    stream, hints_pb2.HintBatch.FromString, hints_pb2.HintReply.SerializeToString
)
server = grpc.server(futures.ThreadPoolExecutor(2))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("mfsd.v1.Hints", {"Stream": handler})])
read = lambda path: open(path, "rb").read()
server.add_secure_port("0.0.0.0:5731", grpc.ssl_server_credentials([(read(key), read(cert))], read(ca), True))
server.start()
time.sleep(600)
"""


class World:
    """The host that waits has one wire to each of the others: 10.78.n.1 - 10.78.n.2."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        stem = f"mfsd-r-{secrets.token_hex(3)}"
        self.names = {name: f"{stem}-{name}" for name in ("waits", *PEERS)}
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in self.names.values():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        stack.callback(self.end)
        for n, peer in enumerate(PEERS):
            ip(
                "-n", self.names["waits"], "link", "add", f"w{n}", "type", "veth",
                "peer", "name", "v0", "netns", self.names[peer],
            )  # fmt: skip
            for host, device, last in (("waits", f"w{n}", 1), (peer, "v0", 2)):
                ip("-n", self.names[host], "addr", "add", f"10.78.{n}.{last}/24", "dev", device)
                ip("-n", self.names[host], "link", "set", device, "up")

    def run(self, host: str, *command: str) -> None:
        log = (self.folder / f"{host}.log").open("ab")
        with log:
            self.processes.append(
                subprocess.Popen(["ip", "netns", "exec", self.names[host], *command], stdout=log, stderr=log)
            )

    def daemon(self, host: str, relay: str, wrap: tuple[str, ...] = ()) -> str:
        """Start mfsd; where its socket is."""
        folder = self.folder / host
        folder.mkdir()
        config = folder / "mfsd.toml"
        config.write_text(
            f'[daemon]\nsocket = "{folder}/mfsd.sock"\nstate_dir = "{folder}"\n[relay]\n{relay}', encoding="utf-8"
        )
        self.run(host, *wrap, sys.executable, "-m", "mfsd.daemon", "--config", str(config))
        wait_for(lambda: answers(f"unix:{folder}/mfsd.sock"), f"{host} to serve")
        return f"unix:{folder}/mfsd.sock"

    def end(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def answers(target: str) -> bool:
    try:
        return bool(control(target, lambda c: c.GetStatus(pb.GetStatusRequest(), timeout=2)).version)
    except (OSError, grpc.RpcError):
        return False


def control(target: str, call: Any) -> Any:
    with introduced(target) as channel:
        return call(rpc.ControlStub(channel))


def due(target: str) -> dict[str, float]:
    """When transfers are due, monotonic, which all hosts of this machine share."""
    reply = control(target, lambda c: c.ListTransfers(pb.ListTransfersRequest(), timeout=WAIT_S))
    now = time.monotonic()
    return {t.id.rpartition("/")[2]: now + t.deadline_us / 1e6 for t in reply.transfers}


def first_due(target: str) -> float | None:
    return due(target).get("first")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(tmp_path, stack)


def test_hints_reach_who_is_there_on_time_whatever_the_others_do(world: World, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ca"), Authority(tmp_path / "forged")
    address = {peer: f"10.78.{n}.2" for n, peer in enumerate(PEERS)}
    peers = ", ".join(f'"{a}:{PORT}"' for a in address.values())
    targets = {}
    for peer in ("good", "slow", "parted"):
        papers = ours.papers(f"{peer}.test", address[peer])
        targets[peer] = world.daemon(peer, f'listen = "0.0.0.0:{PORT}"\nallow = ["waits.test"]\n{papers.toml}')
    papers = ours.papers("old.test", address["old"])
    told = tmp_path / "old.told"
    world.run("old", sys.executable, "-c", OLD, str(papers.cert), str(papers.key), str(papers.ca), str(told))
    papers = theirs.papers("impostor.test", address["impostor"])
    targets["impostor"] = world.daemon("impostor", f'listen = "0.0.0.0:{PORT}"\nallow = ["waits.test"]\n{papers.toml}')
    slow = world.names["slow"]
    for name, device in ((slow, "v0"), (world.names["waits"], "w1")):
        # No more than 25 kB/s: a TLS handshake takes a while, and every message some tens of milliseconds.
        ip_tc = ["qdisc", "add", "dev", device, "root", "tbf", "rate", "200kbit", "burst", "2kb", "limit", "100kb"]
        subprocess.run(["ip", "netns", "exec", name, "tc", *ip_tc], check=True)
    ip("-n", world.names["parted"], "link", "set", "v0", "down")

    waits = world.daemon("waits", f"peers = [{peers}]\n{ours.papers('waits.test').toml}")
    with Client(target=waits) as client:
        started = time.monotonic()
        client.request("r", ttft_left_s=30.0)
        for n, peer in enumerate(PEERS):
            where = tuple_of(f"10.78.{n}.1", 0, address[peer], 6000)
            client.transfer(f"{peer}/first", where, MB, stage=Stage.P2D, request="r")
        assert client.flush(5)  # nobody waits for the others, of which one is not even there
        for peer in ("good", "slow"):
            at = wait_for(functools.partial(first_due, targets[peer]), f"{peer} to hear")
            assert abs(at - (started + 30.0)) < 0.1
        wait_for(lambda: told.exists() and "first" in told.read_text(), "the old one to hear")
        for n in range(20):  # by now messages are timed
            client.transfer(
                f"slow/{n}", tuple_of("10.78.1.1", 0, address["slow"], 6000), MB, stage=Stage.P2D, request="r"
            )
            time.sleep(0.02)
        begun = time.monotonic()
        client.request("tight", ttft_left_s=20.0)
        client.transfer(
            "slow/tight", tuple_of("10.78.1.1", 0, address["slow"], 6000), MB, stage=Stage.P2D, request="tight"
        )
        at = wait_for(lambda: due(targets["slow"]).get("tight"), "the slow one to hear")
        assert abs(at - (begun + 20.0)) < 0.05
        # What a partition keeps away comes when it ends, but for what has become late.
        client.request("lost", ttft_left_s=1.0)
        client.transfer(
            "parted/lost", tuple_of("10.78.2.1", 0, address["parted"], 6000), MB, stage=Stage.P2D, request="lost"
        )
        time.sleep(1.2)
        notices = control(waits, lambda c: c.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)).notices
        lacking = [n for n in notices if n.startswith("relay: no connection to ")]
        assert {a for a in address.values() if any(a in n for n in lacking)} == {address["parted"], address["impostor"]}
        ip("-n", world.names["parted"], "link", "set", "v0", "up")
        at = wait_for(lambda: due(targets["parted"]).get("first"), "the parted one to hear", 60)
        assert abs(at - (started + 30.0)) < 0.1
        assert set(due(targets["parted"])) == {"first"}
        assert not due(targets["impostor"])
        assert not due(waits)


def test_names_are_followed_to_where_they_lead(world: World, tmp_path: Path) -> None:
    """As of a headless service whose pod has been replaced by another one, elsewhere."""
    authority = Authority(tmp_path / "ca")
    places = {peer: f"10.78.{n}.2" for n, peer in enumerate(PEERS[:2])}
    targets = {}
    for peer, address in places.items():
        papers = authority.papers("sender.test")  # for the name, not for an address
        targets[peer] = world.daemon(peer, f'listen = "{address}:{PORT}"\nallow = ["waits.test"]\n{papers.toml}')
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{places['good']} sender.test\n")
    wrap = ("unshare", "--mount", "sh", "-ec", f'mount --bind {hosts} /etc/hosts; exec "$@"', "sh")
    waits = world.daemon("waits", f'peers = ["sender.test:{PORT}"]\n{authority.papers("waits.test").toml}', wrap)
    with Client(target=waits) as client:
        client.request("r", ttft_left_s=120.0)

        def says(n: int, peer: str, name: str) -> None:
            where = tuple_of(f"10.78.{n}.1", 0, places[peer], 6000)
            client.transfer(name, where, MB, stage=Stage.P2D, request="r")
            assert client.flush(WAIT_S)

        says(0, "good", "a/first")
        wait_for(functools.partial(first_due, targets["good"]), "the first one to hear")
        hosts.write_text(f"{places['slow']} sender.test\n")  # in place: the file is what is mounted
        tried = itertools.count()

        def arrives() -> bool:
            time.sleep(0.1)  # names are looked up again after some seconds
            says(1, "slow", f"b/{next(tried)}")
            return bool(due(targets["slow"]))

        wait_for(arrives, "the second one to hear", 3 * WAIT_S)
        says(0, "good", "a/last")  # its name leads elsewhere, but it is there, and sends
        wait_for(lambda: len(due(targets["good"])) == 2, "the first one to hear more")
