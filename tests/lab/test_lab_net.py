# SPDX-License-Identifier: Apache-2.0
"""Namespaces: built, used, removed; those of the dead are cleaned up, all others left alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.waiting import wait_for

from mfsd.ground.units import Rate
from mfsd.lab.hosts.enter import NETNS_DIR, inside
from mfsd.lab.hosts.governor import environment
from mfsd.lab.hosts.net import RTO_MIN, Fabric, LabError, plain_link, remove_link, remove_stale, run_id, tool
from mfsd.lab.hosts.tcp import algorithm_of, prepare, tcp_info

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make network namespaces"),
]


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


def test_a_plain_link_paces_and_counts_what_crosses_it(fabric: Fabric) -> None:
    source, sink, size = fabric.hosts["a"], fabric.hosts["d0"], 2_500_000
    plain_link(source, Rate.parse("100mbit"))
    with inside(sink.namespace):
        server = socket.create_server((sink.address, 0))
    with inside(source.namespace):
        sender = prepare(socket.create_connection(server.getsockname()))
    receiver, _ = server.accept()
    with server, sender, receiver:
        began = time.monotonic()
        thread = threading.Thread(target=sender.sendall, args=(bytes(size),))
        thread.start()
        got = 0
        while got < size:
            got += len(receiver.recv(1 << 18))
        thread.join()
        assert time.monotonic() - began > 0.8 * size / 12.5e6, "faster than the link"
        assert tcp_info(sender).rtos == 0
    sent = tool("tc", "-n", source.namespace, "-s", "class", "show", "dev", "eth0")
    assert int(sent.split("Sent ")[1].split()[0]) > size, "it went through the paced class"
    remove_link(source)
    assert "htb" not in tool("tc", "-n", source.namespace, "qdisc", "show", "dev", "eth0")


def test_sockets_have_the_stated_congestion_control(fabric: Fabric) -> None:
    with inside(fabric.hosts["a"].namespace), prepare(socket.socket()) as s:
        assert algorithm_of(s) == "cubic"


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
        wait_for(lambda: alive(child), "the child has not begun")
        runner.kill()
        runner.wait()
    wait_for(lambda: not alive(child), "the child outlives its runner")
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
    wait_for(lambda: not alive(child), "the child outlives its runner")
    assert namespace not in names()
