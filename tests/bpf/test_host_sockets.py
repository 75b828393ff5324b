# SPDX-License-Identifier: Apache-2.0
"""Sockets as the engine wants them, told by the kernel or listed: processes and their descendants."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from support.privileges import DAEMON, call_with
from support.waiting import WAIT_S, wait_for

from mfsd.daemon import pace
from mfsd.daemon.sockets import HostSockets
from mfsd.datapath.bpf.cgroup import mounted_at
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.teller import Teller
from mfsd.engine.sockets import Established, Found
from mfsd.ground.model import Maker, PortRange, ProcessSelector, RuleSelector
from mfsd.host.processes import Families

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
    monkeypatch.setattr(pace, "FAMILIES_S", 0.05)
    with contextlib.ExitStack() as stack:
        classifier = stack.enter_context(call_with(DAEMON, lambda: LibbpfLoader().open_classifier(ROWS)))
        teller = None
        if request.param == "told":
            teller = stack.enter_context(netns_pair.call(netns_pair.a, lambda: Teller(classifier)))
            teller.lend(range(16))
        made = netns_pair.call(netns_pair.a, lambda: HostSockets(teller, cgroups=mounted_at()))
        stack.callback(made.close)
        yield made


def until(host: HostSockets, enough: Callable[[list[Event]], bool]) -> list[Event]:
    seen: list[Event] = []
    deadline = time.monotonic() + WAIT_S
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
        # An answer that nobody asked for may still come for the selector before.
        answers = [e for e in until(host, functools.partial(answered, selector)) if answered(selector, [e])]
        assert [len(e.sockets or ()) for e in answers if isinstance(e, Found)][-1] == wanted
        host.unwatch(selector, -1)


def test_a_child_stays_of_the_family_when_its_parent_ends(worker: Worker) -> None:
    child, _ = worker.connects("fork")
    families = Families()
    assert families.look([worker.popen.pid])[worker.popen.pid] == {child}
    worker.popen.kill()
    worker.popen.wait()
    assert families.look([worker.popen.pid])[worker.popen.pid] == {child}
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not families.look([worker.popen.pid])[worker.popen.pid])
    families.close()


def answered(selector: ProcessSelector, events: list[Event]) -> bool:
    return any(isinstance(e, Found) and e.selector == selector for e in events)


def rule_of(**more: Any) -> RuleSelector:
    return RuleSelector(Maker(**more))


def test_a_process_is_told_by_its_executable_and_by_its_user(host: HostSockets, worker: Worker, port: int) -> None:
    _, open_already = worker.connects()
    runs = os.readlink(f"/proc/{worker.popen.pid}/exe")  # noqa: PTH115
    named = [
        RuleSelector(Maker(executable=runs), None, PortRange(), PortRange(port, port)),
        RuleSelector(
            Maker(executable=f"{runs.rpartition('/')[2][:-1]}?", uid=os.geteuid()), dport=PortRange(port, port)
        ),
        RuleSelector(Maker(uid=os.geteuid(), pid=worker.popen.pid), ip_network("10.0.0.0/8")),
    ]
    others = [rule_of(executable="no-such*"), RuleSelector(Maker(uid=12345), dport=PortRange(port, port))]
    for selector in (*named, *others):
        host.watch(selector, -1, 3, 2, 2**62)
    host.look([*named, *others])
    events = until(host, lambda seen: sum(isinstance(e, Found) for e in seen) >= 5)
    answers = {e.selector: [s.cookie for s in e.sockets or ()] for e in events if isinstance(e, Found)}
    assert [open_already in answers[s] for s in (*named, *others)] == [True, True, True, False, False]
    if host.tells:
        _, later = worker.connects()
        events = until(host, lambda seen: bool(placed(seen)))
        (event,) = [e for e in events if isinstance(e, Established) and e.slot is not None]
        assert event.socket.cookie == later
        assert all(host.made_by(event.socket, s.maker) for s in named)
        assert not any(host.made_by(event.socket, s.maker) for s in others)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of our own, below one whose name is a unit's."""
    root = mounted_at()
    if root is None:
        pytest.skip("cgroup v2 is not mounted")
    unit = root / f"mfsd-test-{os.getpid()}.service"
    inner = unit / "inner"
    inner.mkdir(parents=True)
    yield inner
    for folder in (inner, unit):
        wait_for(lambda folder=folder: gone(folder), f"an empty {folder}")  # type: ignore[misc]


def gone(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def test_a_process_is_told_by_its_cgroup(host: HostSockets, worker: Worker, cgroup: Path) -> None:
    unit = rule_of(cgroup=f"*/{cgroup.parent.name}")
    other = rule_of(cgroup="/no-such/*")
    (cgroup / "cgroup.procs").write_text(f"{worker.popen.pid}\n")
    try:
        _, open_already = worker.connects()
        for selector in (unit, other):
            host.watch(selector, -1, 3, 2, 2**62)
        host.look([unit, other])
        events = until(host, lambda seen: found(seen, open_already))
        assert not any(isinstance(e, Found) and e.selector == other and e.sockets for e in events)
        if host.tells:
            _, later = worker.connects()
            events = until(host, lambda seen: bool(placed(seen)))
            assert [e.socket.cookie for e in events if isinstance(e, Established) and e.slot is not None] == [later]
    finally:
        worker.end()


def test_older_connections_are_told_by_cgroup_without_looking_into_processes(
    netns_pair: NetnsPair, worker: Worker, cgroup: Path
) -> None:
    """As after a restart of the daemon: with the unit's two capabilities, what others' processes have is hidden."""
    unit, other = rule_of(cgroup=f"*/{cgroup.parent.name}"), rule_of(cgroup="/no-such/*")
    own, _ = worker.connects()
    process = RuleSelector(Maker(pid=own))
    (cgroup / "cgroup.procs").write_text(f"{worker.popen.pid}\n")
    try:
        _, inside = worker.connects()

        def make() -> HostSockets:
            return HostSockets(None, cgroups=mounted_at())

        host = netns_pair.call(netns_pair.a, lambda: call_with(DAEMON, make))
        with contextlib.closing(host):
            host.look([unit, other, process])
            events = until(host, lambda seen: sum(isinstance(e, Found) for e in seen) >= 3)
        told = {e.selector: [s.cookie for s in e.sockets or ()] for e in events if isinstance(e, Found)}
        assert told == {unit: [inside], other: [], process: []}
    finally:
        worker.end()


THREADS: Final = """
import ctypes, socket, sys, threading
host, port = sys.argv[1:]
def work(name, sock):
    ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME
    for line in lines[name]:
        one = socket.create_connection((host, int(port)))
        print(int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder), flush=True)
        kept.append(one)
        done.set()
import queue
kept, done = [], threading.Event()
class Lines:
    def __init__(self): self.q = queue.Queue()
    def __iter__(self): return iter(self.q.get, None)
lines = {b"NCCL Service 0": Lines(), b"other": Lines()}
for name in lines:
    threading.Thread(target=work, args=(name, None), daemon=True).start()
for line in sys.stdin:
    done.clear()
    lines[line.strip().encode()].q.put(1)
    done.wait()
"""


def test_connections_are_told_by_the_thread_that_makes_them(
    host: HostSockets, netns_pair: NetnsPair, port: int
) -> None:
    command = [sys.executable, "-c", THREADS, netns_pair.addr_b, str(port)]
    popen: subprocess.Popen[str] = netns_pair.call(
        netns_pair.a, lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    assert popen.stdin is not None
    assert popen.stdout is not None

    def connect(name: str) -> int:
        assert popen.stdin is not None
        assert popen.stdout is not None
        popen.stdin.write(f"{name}\n")
        popen.stdin.flush()
        return int(popen.stdout.readline())

    try:
        early = connect("NCCL Service 0"), connect("other")
        selector = rule_of(thread="NCCL*", pid=popen.pid)
        host.watch(selector, -1, 3, 2, 2**62)
        host.look([selector])
        if not host.tells:  # a listing does not say which thread made a socket: better nobody's than everybody's
            events = until(host, lambda seen: any(isinstance(e, Found) for e in seen))
            assert not any(e.sockets for e in events if isinstance(e, Found))
            return
        events = until(host, lambda seen: found(seen, early[0]))
        assert not found(events, early[1])
        later = connect("other"), connect("NCCL Service 0")
        events = until(host, lambda seen: any(isinstance(e, Established) and e.slot is not None for e in seen))
        assert [e.socket.cookie for e in events if isinstance(e, Established) and e.slot is not None] == [later[1]]
    finally:
        popen.kill()
        popen.communicate()


@pytest.mark.parametrize("host", ["told"], indirect=True)
@pytest.mark.parametrize("how", ["a child", "a program", "a unit", "a thread"])
def test_who_has_just_started_is_looked_at_when_it_connects(
    host: HostSockets, netns_pair: NetnsPair, worker: Worker, port: int, cgroup: Path, how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not when it is time to look for processes again."""
    monkeypatch.setattr(pace, "FAMILIES_S", 600.0)
    named = rule_of(
        pid=worker.popen.pid if how == "a child" else 0,
        executable=os.readlink(f"/proc/{os.getpid()}/exe") if how == "a program" else "",  # noqa: PTH115
        cgroup=f"*/{cgroup.parent.name}/later" if how == "a unit" else "",
        thread=Path(sys.executable).name[:15] if how == "a thread" else "",
    )
    host.watch(named, -1, 3, 2, 2**62)
    host.look([named])
    until(host, lambda seen: any(isinstance(e, Found) for e in seen))
    assert host._families is not None
    host._families.result(WAIT_S)
    host.events()
    later = Worker(netns_pair, port)
    inner = cgroup.parent / "later"
    inner.mkdir()
    try:
        (inner / "cgroup.procs").write_text(f"{later.popen.pid}\n")
        _, cookie = worker.connects("fork") if how == "a child" else later.connects()
        until(host, lambda seen: found(seen, cookie))
        _, next_one = worker.connects("fork") if how == "a child" else later.connects()
        until(host, lambda seen: found(seen, next_one) or next_one in placed(seen))
        if how == "a unit":
            _, last = later.connects()  # the kernel knows it by now; of programs and threads there may be too many
            until(host, lambda seen: last in placed(seen))
    finally:
        later.end()
        wait_for(lambda: gone(inner), "an empty cgroup")


def placed(events: list[Event]) -> list[int]:
    return [e.socket.cookie for e in events if isinstance(e, Established) and e.slot is not None]
