# SPDX-License-Identifier: Apache-2.0
"""Namespaces: built, used, removed; those of the dead are cleaned up, all others left alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mfsd.lab.hosts.enter import NETNS_DIR, inside
from mfsd.lab.hosts.governor import environment
from mfsd.lab.hosts.net import RTO_MIN, Fabric, LabError, plain_link, remove_link, remove_stale, run_id, tool
from mfsd.lab.hosts.tcp import prepare, tcp_info
from mfsd.lab.traffic import Frame, Lane, Server
from mfsd.model import Stage
from mfsd.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make network namespaces"),
]


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def names() -> set[str]:
    return {p.name for p in NETNS_DIR.glob("mfsd-*")}


def own() -> set[str]:
    """Of this process: others may make and remove theirs meanwhile."""
    return {name for name in names() if name.startswith(f"mfsd-{run_id()}-")}


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with Fabric(["p0", "a", "d0"], optional={RTO_MIN: "5000", "net/ipv4/no_such_knob": "1"}) as f:
        yield f


def test_everything_is_gone_afterwards() -> None:
    with Fabric(["x", "y"]) as f:
        assert {h.namespace for h in f.hosts.values()} < own()
    assert not own()


def test_a_failure_inside_removes_everything_too() -> None:
    with pytest.raises(ZeroDivisionError), Fabric(["x"]):
        _ = 1 / 0
    with (
        pytest.raises(LabError, match="tcp_no_metrics_save = perhaps"),
        Fabric(["x"], sysctls={"net/ipv4/tcp_no_metrics_save": "perhaps"}),
    ):
        pass
    assert not own()


@pytest.mark.parametrize("bad", [["switch"], ["a", "a"], ["A"], ["x" * 12], ["a/b"]])
def test_bad_names_are_refused(bad: list[str]) -> None:
    with pytest.raises(LabError, match="host names"), Fabric(bad):
        pass


def test_sysctls_are_per_host_and_the_machines_own_stay(fabric: Fabric) -> None:
    def read() -> str:
        with open("/proc/sys/net/ipv4/tcp_no_metrics_save") as f:  # noqa: PTH123 - one line
            return f.read().strip()

    here = read()
    with inside(fabric.hosts["p0"].namespace):
        assert read() == "1"
    assert read() == here
    assert fabric.applied["net.ipv4.tcp_no_metrics_save"] == "1"
    assert "net.ipv4.no_such_knob" not in fabric.applied


def test_frames_cross_a_plain_link_and_are_counted(fabric: Fabric) -> None:
    source, sink = fabric.hosts["a"], fabric.hosts["d0"]
    plain_link(source, Rate.parse("1gbit"))
    got: list[Frame] = []
    with inside(sink.namespace):
        server = Server(0, lambda frame, _at: got.append(frame))
    with inside(source.namespace):
        lane = Lane((sink.address, server.port), 7)
    order: list[str] = []
    for layer in range(3):
        frame = Frame(Stage.P2D, 42, layer, 300_000 + layer)
        lane.put(frame, partial(order.append, f"say {layer}"), partial(order.append, f"sent {layer}"))
    until(lambda: len(got) == 3, "frames do not arrive")
    assert [(f.stage, f.key, f.layer, f.size) for f in got] == [(Stage.P2D, 42, i, 300_000 + i) for i in range(3)]
    assert [w for w in order if w.startswith("sent")] == ["sent 0", "sent 1", "sent 2"]
    assert all(order.index(f"say {i}") < order.index(f"sent {i}") for i in range(3))
    arrivals = server.arrivals()
    assert sum(a.size for a in arrivals) == 900_003
    assert {(a.lane, a.key, a.stage) for a in arrivals} == {(7, 42, Stage.P2D)}
    assert lane.queued == 0
    sent = tool("tc", "-n", source.namespace, "-s", "class", "show", "dev", "eth0")
    assert int(sent.split("Sent ")[1].split()[0]) > 900_003, "it went through the paced class"
    assert tcp_info(lane.sock).rtos == 0
    lane.close()
    server.close()
    remove_link(source)
    assert "htb" not in tool("tc", "-n", source.namespace, "qdisc", "show", "dev", "eth0")


def test_sockets_have_the_stated_congestion_control(fabric: Fabric) -> None:
    with inside(fabric.hosts["a"].namespace), prepare(socket.socket()) as s:
        name = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert name.rstrip(b"\0") == b"cubic"


def test_only_what_the_dead_left_is_removed() -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    stale, foreign = f"mfsd-{int(dead.stdout)}x1-p0", "mfsd-mine"
    reused, living = f"mfsd-{os.getpid()}x1-p0", f"mfsd-{run_id()}-p0"
    made = [stale, foreign, reused, living]
    try:
        for name in made:
            tool("ip", "netns", "add", name)
        removed = remove_stale()
        assert {stale, reused} <= set(removed), "a pid that was used again does not protect"
        assert {foreign, living} <= names()
    finally:
        for name in set(made) & names():
            tool("ip", "netns", "del", name)


RUNNER = """
import os, signal, subprocess, sys, time
# A shell starts background jobs with SIGINT ignored, and a job of a job inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from mfsd.lab.hosts.governor import python
from mfsd.lab.hosts.net import Fabric
with Fabric(["p0"]) as f:
    command = [*python("mfsd.lab.hosts.enter"), f.hosts["p0"].namespace, str(os.getpid()), "sleep", "600"]
    child = subprocess.Popen(command)
    print(child.pid, f.hosts["p0"].namespace, flush=True)
    time.sleep(600)
"""


def started() -> tuple[subprocess.Popen[str], int, str]:
    runner = subprocess.Popen([sys.executable, "-c", RUNNER], stdout=subprocess.PIPE, text=True, env=environment())
    assert runner.stdout is not None
    pid, namespace = runner.stdout.readline().split()
    return runner, int(pid), namespace


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:  # noqa: PTH123 - may vanish any time
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_runner_takes_its_processes_along_and_the_next_run_cleans_up() -> None:
    runner, child, namespace = started()
    with runner:
        until(lambda: alive(child), "the child has not begun")
        runner.kill()
        runner.wait()
    until(lambda: not alive(child), "the child outlives its runner")
    assert namespace in names()
    with Fabric(["q"]):
        assert namespace not in names()


def test_an_interrupted_runner_cleans_up_itself() -> None:
    runner, child, namespace = started()
    with runner:
        try:
            runner.send_signal(signal.SIGINT)
            runner.wait(20)
        finally:
            runner.kill()  # else a failure would wait for the runner's whole ten minutes
    until(lambda: not alive(child), "the child outlives its runner")
    assert namespace not in names()
