# SPDX-License-Identifier: Apache-2.0
"""Sockets as the engine wants them, told by the kernel or listed: processes and their descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from ipaddress import ip_network
from typing import TYPE_CHECKING, Final

import pytest
from support.privileges import DAEMON, call_with

from mfsd.daemon import sockets
from mfsd.daemon.sockets import HostSockets
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.teller import Teller
from mfsd.engine.sockets import Established, Found
from mfsd.host.processes import Families
from mfsd.model import PortRange, ProcessSelector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.namespaces import NetnsPair

    from mfsd.engine.sockets import Event

pytestmark = [pytest.mark.bpf, pytest.mark.netns]

ROWS: Final = 64
PARENT: Final = """
import os, socket, sys
for line in sys.stdin:
    what, host, port = line.split()
    if what == "fork" and os.fork():
        continue
    sock = socket.create_connection((host, int(port)))
    print(os.getpid(), int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder), flush=True)
    if what == "fork":
        sys.stdin.close()
        import time
        time.sleep(60)
"""


class Worker:
    """A process in namespace ``a`` that opens connections, itself or in a child."""

    def __init__(self, pair: NetnsPair, port: int) -> None:
        self.peer = f"{pair.addr_b} {port}"
        command = [sys.executable, "-c", PARENT]
        self.popen: subprocess.Popen[str] = pair.call(
            pair.a,
            lambda: subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
            ),
        )

    def connects(self, how: str = "self") -> tuple[int, int]:
        """(pid, cookie)."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(f"{how} {self.peer}\n")
        self.popen.stdin.flush()
        pid, cookie = self.popen.stdout.readline().split()
        return int(pid), int(cookie)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.communicate()


@pytest.fixture
def port(netns_pair: NetnsPair) -> Iterator[int]:
    import socket  # noqa: PLC0415 - the module of the same name is used everywhere else

    with netns_pair.call(netns_pair.b, lambda: socket.create_server((netns_pair.addr_b, 0), backlog=64)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def worker(netns_pair: NetnsPair, port: int) -> Iterator[Worker]:
    w = Worker(netns_pair, port)
    yield w
    w.end()


@pytest.fixture(params=["told", "listed"])
def host(
    request: pytest.FixtureRequest, netns_pair: NetnsPair, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HostSockets]:
    """In namespace ``a``, as the daemon."""
    monkeypatch.setattr(sockets, "FAMILIES_S", 0.05)
    with contextlib.ExitStack() as stack:
        classifier = stack.enter_context(call_with(DAEMON, lambda: LibbpfLoader().open_classifier(ROWS)))
        teller = None
        if request.param == "told":
            teller = stack.enter_context(netns_pair.call(netns_pair.a, lambda: Teller(classifier)))
            teller.lend(range(16))
        made = netns_pair.call(netns_pair.a, lambda: HostSockets(teller))
        stack.callback(made.close)
        yield made


def until(host: HostSockets, enough: Callable[[list[Event]], bool]) -> list[Event]:
    seen: list[Event] = []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        seen += host.events()
        if enough(seen):
            return seen
        time.sleep(0.01)
    raise AssertionError(seen)


def found(events: list[Event], cookie: int) -> bool:
    return any(isinstance(e, Found) and cookie in [s.cookie for s in e.sockets or ()] for e in events)


def test_connections_of_children_are_found_and_announced(host: HostSockets, worker: Worker) -> None:
    child, open_already = worker.connects("fork")
    selector = ProcessSelector(worker.popen.pid, None, PortRange())
    host.watch(selector, -1, 3, 2, 2**62)
    host.look([selector])
    until(host, lambda events: found(events, open_already))
    assert host.descends(child, worker.popen.pid)
    assert not host.descends(os.getpid(), worker.popen.pid)
    if host.tells:
        _, own = worker.connects()
        until(host, lambda events: any(isinstance(e, Established) and e.socket.cookie == own for e in events))
    later, cookie = worker.connects("fork")
    until(host, lambda events: found(events, cookie))
    assert host.descends(later, worker.popen.pid)


def test_the_peers_that_a_selector_names_hold_for_children_too(host: HostSockets, worker: Worker, port: int) -> None:
    child, _ = worker.connects("fork")
    network = ip_network(worker.peer.split()[0])
    for selector, wanted in (
        (ProcessSelector(worker.popen.pid, network, PortRange(port, port)), 1),
        (ProcessSelector(worker.popen.pid, network, PortRange(port + 1, port + 1)), 0),
        (ProcessSelector(worker.popen.pid, ip_network("192.0.2.0/24"), PortRange()), 0),
    ):
        host.watch(selector, -1, 3, 2, 2**62)
        until(host, lambda _: host.descends(child, worker.popen.pid))
        host.look([selector])
        answers = [e for e in until(host, lambda es: any(isinstance(e, Found) for e in es)) if isinstance(e, Found)]
        assert len(answers[-1].sockets or ()) == wanted
        host.unwatch(selector, -1)


def test_a_child_stays_of_the_family_when_its_parent_ends(worker: Worker) -> None:
    child, _ = worker.connects("fork")
    families = Families()
    assert families.look([worker.popen.pid])[worker.popen.pid] == {child}
    worker.popen.kill()
    worker.popen.wait()
    assert families.look([worker.popen.pid])[worker.popen.pid] == {child}
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while families.look([worker.popen.pid])[worker.popen.pid]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
