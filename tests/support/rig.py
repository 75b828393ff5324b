# SPDX-License-Identifier: Apache-2.0
"""The real daemon process in a throw-away namespace, and real traffic beside it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc

from mfsd.client import Client, cookie_of
from mfsd.client.introduction import introduced
from mfsd.lab.hosts.tcp import reset_at_close
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc as rpc
from mfsd.v1 import hints_pb2 as hints
from mfsd.v1 import hints_pb2_grpc as hints_rpc
from support.waiting import WAIT_S, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.manager import Manager
    from support.namespaces import NetnsPair

RATE_MBIT: Final = 200
POLICY: Final = 'name = "deadline-ladder"\nkv = "rli"'
"""A policy in which the stage alone says the level: collectives 0, KV reuse 1, undated P2D the lowest."""


class Daemon:
    """One mfsd process inside namespace ``a`` of a pair, shaping its device."""

    def __init__(self, pair: NetnsPair, folder: Path, *, extra: str = "", wrap: tuple[str, ...] = ()) -> None:
        self.pair = pair
        self.folder = folder
        self.wrap = wrap
        self.socket = folder / "mfsd.sock"
        self.config = folder / "mfsd.toml"
        self.log = folder / "mfsd.log"
        self.write_config(extra)
        self.process: subprocess.Popen[bytes] | None = None
        self.manager: Manager | None = None
        """Who starts it, if it is to have a service manager."""

    def write_config(self, extra: str = "", *, mode: str = "enforce", daemon: str = "", policy: str = POLICY) -> None:
        """(Re)write the configuration file."""
        self.config.write_text(
            f"""[daemon]
socket = "{self.socket}"
state_dir = "{self.folder}"
mode = "{mode}"
{daemon}
[[device]]
name = "{self.pair.dev_a}"
backend = "htb"
rate = "{RATE_MBIT}mbit"
[policy]
{policy}
{extra}
"""
        )

    def start(self) -> Daemon:
        """Start and wait until the health service says SERVING."""
        command = [sys.executable, "-m", "mfsd.daemon", "--config", str(self.config)]
        environment, wrap, fds = ({}, (), ()) if self.manager is None else self.manager.start()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.pair.a, *wrap, *self.wrap, *command],
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                pass_fds=fds,
            )
        return self.serving()

    def serving(self) -> Daemon:
        """Wait until it does."""
        try:
            wait_for(self._up, "the daemon to serve")
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.log.read_text()}") from None
        return self

    def _up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended: {self.log.read_text()}"
        try:
            status = self.status()
        except grpc.RpcError:
            return False
        return bool(status.devices) and (status.mode == pb.MODE_OBSERVE or bool(status.devices[0].backend))

    @property
    def pid(self) -> int:
        """Of mfsd itself: `ip netns exec` replaces itself by what it runs."""
        assert self.process is not None
        return self.process.pid

    def control(self, call: Callable[[rpc.ControlStub], Any]) -> Any:
        """One call of the Control service."""
        with introduced(f"unix:{self.socket}") as channel:
            return call(rpc.ControlStub(channel))

    def status(self) -> pb.Status:
        """GetStatus."""
        answer: pb.Status = self.control(lambda c: c.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S / 4))
        return answer

    def bands(self) -> dict[str, pb.Band]:
        """Band statistics by name."""
        return {b.name: b for b in self.status().devices[0].bands}

    def connections(self) -> list[pb.Connection]:
        """ListConnections, all pages: it is a thousand at a time."""
        out: list[pb.Connection] = []
        request = pb.ListConnectionsRequest()
        while True:
            reply = self.control(lambda c: c.ListConnections(request, timeout=WAIT_S / 4))
            out += reply.connections
            if not reply.next_page_token:
                return out
            request.page_token = reply.next_page_token

    def band_of(self, flow: Flow) -> str:
        """Band of a flow as the daemon tells it; empty if it is not known."""
        cookie = cookie_of(flow.sender)
        return next((c.band for c in self.connections() if c.cookie == cookie), "")

    def client(self, **more: Any) -> Client:
        """A client SDK session."""
        return Client(target=f"unix:{self.socket}", **more)

    def send_hints(self, n: int) -> hints.HintReply:
        """One unary call with n requests."""
        batch = hints.HintBatch(session="rig", seq=1)
        for i in range(n):
            batch.hints.add().request.CopyFrom(hints.Request(id=str(i), ttft_left_us=1_000_000))
        with introduced(f"unix:{self.socket}") as channel:
            reply: hints.HintReply = hints_rpc.HintsStub(channel).Send(batch, timeout=WAIT_S / 4)
            return reply

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        os.kill(self.pid, number)

    @contextlib.contextmanager
    def held_up(self) -> Iterator[None]:
        """The daemon gets no processor meanwhile."""
        self.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send_signal(signal.SIGCONT)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal, wait for the end, return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.send_signal(number)
        return self.process.wait(timeout=WAIT_S)

    def mfsctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run mfsctl in the daemon's namespace."""
        return subprocess.run(
            ["ip", "netns", "exec", self.pair.a, sys.executable, "-m", "mfsd.cli", *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=3 * WAIT_S,
        )


@contextlib.contextmanager
def running(daemon: Daemon, *, started: bool = False) -> Iterator[Daemon]:
    """A started daemon that is gone afterwards, whatever happens."""
    try:
        yield daemon.serving() if started else daemon.start()
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGCONT)
            try:
                daemon.end()
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()


def tc_state(pair: NetnsPair) -> str:
    """Everything that tc can show of the device, statistics aside."""
    shown = pair.run(
        pair.a,
        f"for what in qdisc class filter; do tc -d $what show dev {pair.dev_a}; done; "
        f"tc filter show dev {pair.dev_a} egress 2>/dev/null || true",
    )
    return re.sub(r"direct_packets_stat \d+", "", shown)  # htb prints this statistic among its options


def programs() -> set[int]:
    """Ids of loaded programs of ours."""
    shown = json.loads(subprocess.run(["bpftool", "-j", "prog", "list"], check=True, capture_output=True).stdout)
    return {p["id"] for p in shown if str(p.get("name", "")).startswith("mfsd")}


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Let this thread alone be another user for a while: glibc's setresuid would change all threads."""
    number = {"x86_64": 117, "aarch64": 147}[os.uname().machine]

    def become(real: int) -> None:
        if ctypes.CDLL(None, use_errno=True).syscall(number, real, real, 0):
            raise OSError(ctypes.get_errno(), "setresuid")

    become(uid)
    try:
        yield
    finally:
        become(0)


# --- traffic ----------------------------------------------------------------------------------------------------------


@dataclass
class Flow:
    """A TCP connection from ``a`` to ``b`` whose receiver notes what arrives when."""

    sender: socket.socket
    receiver: socket.socket
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def open(cls, pair: NetnsPair, port: int = 0, source_port: int = 0, *, v6: bool = False, uid: int = 0) -> Flow:
        """Connect, as a user; the sockets stay in their namespaces."""
        family = socket.AF_INET6 if v6 else socket.AF_INET
        here, there = (pair.addr6_a, pair.addr6_b) if v6 else (pair.addr_a, pair.addr_b)

        def listen() -> socket.socket:
            s = socket.socket(family, socket.SOCK_STREAM)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((there, port))
            s.listen(1)
            return s

        def connect(address: Any) -> socket.socket:
            with as_user(uid):
                s = socket.socket(family, socket.SOCK_STREAM)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
            s.bind((here, source_port))
            s.connect(address)
            return s

        with pair.call(pair.b, listen) as listener:
            sender = pair.call(pair.a, lambda: connect(listener.getsockname()))
            receiver, _ = listener.accept()
        flow = cls(sender, receiver)
        flow._run(flow._receive)
        return flow

    def _run(self, body: Callable[[], None]) -> None:
        thread = threading.Thread(target=body, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _receive(self) -> None:
        self.receiver.settimeout(0.2)
        while not self._stop.is_set():
            try:
                n = len(self.receiver.recv(1 << 18))
            except TimeoutError:
                continue
            except OSError:
                return
            if not n:
                return
            self.arrivals.append((time.monotonic(), n))

    def saturate(self, seconds: float = 60.0) -> None:
        """Send as fast as TCP takes it, in the background, until closed."""
        end = time.monotonic() + seconds
        chunk = bytes(1 << 17)

        def body() -> None:
            self.sender.settimeout(0.2)
            while not self._stop.is_set() and time.monotonic() < end:
                try:
                    self.sender.send(chunk)
                except TimeoutError:
                    continue
                except OSError:
                    return

        self._run(body)

    @property
    def received(self) -> int:
        """Bytes that have arrived."""
        return sum(n for _, n in list(self.arrivals))

    def rate(self, seconds: float) -> float:
        """Bytes/s over the next ``seconds``."""
        before = self.received
        time.sleep(seconds)
        return (self.received - before) / seconds

    def longest_gap(self, since: float, until: float) -> float:
        """Longest time without an arrival, seconds."""
        times = [since, *[t for t, _ in list(self.arrivals) if since <= t <= until], until]
        return max(b - a for a, b in itertools.pairwise(times))

    def close(self) -> None:
        """Reset the connection: what is queued is thrown away."""
        self._stop.set()
        for s in (self.sender, self.receiver):
            with contextlib.suppress(OSError):
                reset_at_close(s)
            s.close()
        for thread in self._threads:
            thread.join(timeout=WAIT_S / 4)


@contextlib.contextmanager
def flows(pair: NetnsPair, n: int) -> Iterator[list[Flow]]:
    """Several connections that are closed afterwards."""
    opened: list[Flow] = []
    try:
        for _ in range(n):
            opened.append(Flow.open(pair))  # noqa: PERF401 - those already open must be closed if one fails
        yield opened
    finally:
        for flow in opened:
            flow.close()


def class_bytes(pair: NetnsPair) -> dict[str, int]:
    """Bytes sent per HTB class, by classid."""
    shown = pair.run(pair.a, f"tc -s class show dev {pair.dev_a}")
    found = re.findall(r"^class htb (\S+) .*?^ Sent (\d+) bytes", shown, flags=re.MULTILINE | re.DOTALL)
    return {classid: int(sent) for classid, sent in found}
