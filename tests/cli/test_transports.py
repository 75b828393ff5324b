# SPDX-License-Identifier: Apache-2.0
"""mfsctl transports and the doctor's look at paths: a tree laid out as the kernel does, real TCP, a dcb that answers.

The tree: Documentation/ABI/stable/sysfs-class-infiniband; tc/ as NVIDIA's driver has it; /proc as proc(5) says. dcb's
answers have the form of iproute2's dcb_app.c and dcb_ets.c.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

import pytest
from support.ctl import run
from support.daemons import connected

from mfsd.client import cookie_of
from mfsd.daemon.config import Config
from mfsd.doctor import Context, Severity, paths, transports

if TYPE_CHECKING:
    from pathlib import Path

    from mfsd.doctor import Finding, Report

DCB: Final = """#!/bin/sh
[ "$5" = eth0 ] || exit 1
case $2 in
app) echo '{"dscp_prio":[[26,3],[46,6]]}' ;;
ets) echo '{"willing":false,"ets_cap":8,"cbs":false,"tc_bw":[0,0,0,50,0,0,50,0],"prio_tc":[0,1,2,3,4,5,6,7],'
     echo '"tc_tsa":["strict","strict","strict","ets","strict","strict","ets","strict"]}' ;;
esac
"""


class Tree:
    """A root with /sys and /proc in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.context = Context((), Config(), root)

    def put(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{text}\n")

    def port(self, link: str, netdev: str, *, state: str = "4: ACTIVE", sent: int = 0) -> None:
        base = f"sys/class/infiniband/{link}/ports/1"
        for name, value in {
            "state": state, "phys_state": "5: LinkUp", "link_layer": "Ethernet", "rate": "100 Gb/sec (4X EDR)",
            "gid_attrs/ndevs/0": netdev, "counters/port_xmit_data": str(sent // 4), "counters/port_rcv_data": "0",
        }.items():  # fmt: skip
            self.put(f"{base}/{name}", value)

    def nic(self, name: str, sent: int, *, hardware: bool = True, state: str = "up") -> None:
        self.put(f"sys/class/net/{name}/operstate", state)
        self.put(f"sys/class/net/{name}/statistics/tx_bytes", str(sent))
        if hardware:
            self.put(f"sys/class/net/{name}/device/vendor", "0x15b3")

    def process(
        self, pid: int, name: str, *, inodes: tuple[int, ...] = (), verbs: bool = False, **environ: str
    ) -> None:
        self.put(f"proc/{pid}/comm", name)
        (self.root / f"proc/{pid}/environ").write_bytes(b"".join(f"{k}={v}\0".encode() for k, v in environ.items()))
        folder = self.root / f"proc/{pid}/fd"
        folder.mkdir(exist_ok=True)
        targets = [f"socket:[{i}]" for i in inodes] + (["/dev/infiniband/uverbs0"] if verbs else [])
        for n, target in enumerate(targets, 3):
            (folder / str(n)).symlink_to(target)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tool = tmp_path / "bin" / "dcb"
    tool.parent.mkdir()
    tool.write_text(DCB)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return Tree(tmp_path / "root")


def between(tree: Tree, what: object = None, seconds: float = 1.0) -> Report:
    """A report of two looks; ``what`` is done between."""
    before = transports.look(tree.context)
    if callable(what):
        what()
    after = transports.look(tree.context)
    after.at = before.at + seconds
    return transports.compare(tree.context, before, after)


def by_id(report: Report, bulk: float = paths.BULK) -> dict[str, Finding]:
    return {f.id: f for f in paths.judge(report, bulk)}


def test_tcp_beside_an_idle_rdma_link_is_found_with_the_process_and_the_peer(tree: Tree) -> None:
    """Real TCP through the real kernel; who holds its socket is the tree's."""
    tree.port("mlx5_0", "eth0")
    with connected() as (near, far):
        inode = os.fstat(near.fileno()).st_ino
        tree.process(4711, "python3", inodes=(inode,), verbs=True, NCCL_IB_HCA="mlx5_9", HF_HOME="/hidden")

        def move() -> None:
            left = 4_000_000
            near.settimeout(20)
            while left:
                left -= near.send(bytes(min(left, 100_000)))
                far.recv(1 << 20)
            while transports.look(tree.context).tcp[cookie][2] < 4_000_000:
                far.setblocking(False)
                try:
                    far.recv(1 << 20)
                except BlockingIOError:
                    time.sleep(0.01)

        cookie = cookie_of(near)
        report = between(tree, move)
    (flow,) = [f for f in report.flows if f.pid == 4711]
    assert (flow.process, flow.peer, flow.connections, flow.local) == ("python3", "127.0.0.1", 1, True)
    assert flow.bytes_per_s >= 4_000_000
    assert "paths.tcp" in by_id(report, 1e6)
    assert by_id(report, 1e6)["paths.tcp"].severity is Severity.OK  # within the host: no link could have carried it
    object.__setattr__(flow, "local", False)
    found = by_id(report, 1e6)["paths.tcp"]
    assert (found.severity, found.title) == (Severity.WARN, "Bulk bytes go over TCP while RDMA is idle")
    assert "python3 (4711) to 127.0.0.1" in found.detail
    assert "has an RDMA device open, NCCL_IB_HCA=mlx5_9" in found.detail
    assert "mlx5_0/1 active, 100 Gb/sec (4X EDR), out 0, in 0" in found.detail
    assert "hidden" not in str(report)


def test_rdma_that_moves_is_no_fall_back(tree: Tree) -> None:
    tree.port("mlx5_0", "eth0", sent=1000)
    report = between(tree, lambda: tree.port("mlx5_0", "eth0", sent=1000 + 8_000_000_000), seconds=2.0)
    ((port, sent, received),) = report.ports
    assert (port.name, port.netdevs, port.layer, port.active) == ("mlx5_0/1", ("eth0",), "Ethernet", True)
    assert (sent, received) == (4e9, 0.0)
    report.flows.append(transports.Flow(1, "p", "10.0.0.2", 1, 20e6, local=False))
    assert by_id(report)["paths.tcp"].severity is Severity.INFO
    tree.port("mlx5_0", "eth0", state="1: DOWN")
    assert "paths.tcp" not in by_id(between(tree))


def test_one_of_several_nics(tree: Tree) -> None:
    for n in range(4):
        tree.nic(f"eth{n}", 0)
        tree.port(f"mlx5_{n}", f"eth{n}")
    tree.nic("docker0", 0, hardware=False)
    tree.nic("eth9", 0, state="down")

    def one() -> None:
        tree.nic("eth2", 10**9)
        tree.nic("docker0", 10**9, hardware=False)
        tree.port("mlx5_1", "eth1", sent=10**9)

    found = by_id(between(tree, one))
    assert found["paths.one_nic"].title == "One of 4 NICs carries everything"
    assert found["paths.one_nic"].detail == "eth2 8 Gbit/s; idle: eth0, eth1, eth3"
    assert found["paths.one_rdma"].detail.startswith("mlx5_1/1 8 Gbit/s; idle: mlx5_0/1, mlx5_2/1")

    def two() -> None:
        tree.nic("eth0", 10**9)
        tree.nic("eth1", 10**9)

    assert "paths.one_nic" not in by_id(between(tree, two))


def test_classes_that_agree_and_are_mapped(tree: Tree) -> None:
    tree.port("mlx5_0", "eth0")
    tree.process(5, "vllm", NCCL_IB_TC="106", MC_IB_TC="106")
    tree.process(6, "vllm", NCCL_IB_TC="106")
    report = between(tree)
    assert {(c.who, c.dscp, c.device, c.priority, c.queue) for c in report.classes} == {
        ("NCCL_IB_TC of vllm (5)", 26, "eth0", 3, 3),
        ("MC_IB_TC of vllm (5)", 26, "eth0", 3, 3),
        ("NCCL_IB_TC of vllm (6)", 26, "eth0", 3, 3),
    }
    found = by_id(report)["paths.roce_classes"]
    assert found.severity is Severity.OK
    assert "DSCP 26 to priority 3, DSCP 46 to priority 6" in found.detail


def test_classes_that_lead_nowhere_or_apart_or_have_no_effect(tree: Tree) -> None:
    tree.port("mlx5_0", "eth0")
    tree.put("sys/class/infiniband/mlx5_0/tc/1/traffic_class", "Global tclass=106")
    tree.put("sys/kernel/config/rdma_cm/mlx5_0/ports/1/default_roce_tos", "0")
    tree.process(5, "vllm", NCCL_IB_TC="160")
    tree.process(6, "vllm", NCCL_IB_TC="106")
    found = by_id(between(tree))["paths.roce_classes"]
    assert found.severity is Severity.WARN
    problems = found.detail.split("; ")
    assert problems[0] == "NCCL_IB_TC of vllm (5): DSCP 40 is mapped to no priority on eth0"
    assert "processes disagree about NCCL_IB_TC" in problems
    assert "NCCL_IB_TC of vllm (5) has no effect: the link gives all its packets another class" in problems
    assert "mlx5_0/1 (all its packets): class 106, DSCP 26" in problems


@pytest.mark.daemon
def test_the_command_and_the_doctor(tree: Tree) -> None:
    tree.port("mlx5_0", "eth0")
    tree.process(5, "vllm", NCCL_IB_TC="106")
    ran = run("transports", "--root", str(tree.root), "--for", "0s")
    assert ran.code == 0
    assert "mlx5_0/1  active  Ethernet  100 Gb/sec (4X EDR)    0   0  eth0" in ran.out
    assert "NCCL_IB_TC of vllm (5)    106    26  eth0         3   3" in ran.out
    told = run("transports", "--root", str(tree.root), "--for", "0s", "--json").json
    assert told["rdma"][0]["link"] == "mlx5_0"
    assert told["classes"][0]["dscp"] == 26
    assert {f["id"] for f in told["findings"]} == {"paths.tcp", "paths.roce_classes"}
    assert {f.id for f in paths.check(tree.context)} == {"paths.tcp", "paths.roce_classes"}
    empty = Tree(tree.root / "empty")
    empty.root.mkdir()
    (none,) = paths.check(empty.context)
    assert none.severity is Severity.OK
    ran = run("transports", "--root", str(empty.root), "--for", "0s")
    assert "no RDMA links" in ran.out


@pytest.mark.daemon
def test_the_names_of_processes_move_no_cursor(tree: Tree) -> None:
    tree.port("mlx5_0", "eth0")
    tree.process(5, "\x1b[2J\u202evllm", NCCL_IB_TC="160")
    ran = run("transports", "--root", str(tree.root), "--for", "0s")
    assert "NCCL_IB_TC of ?[2J?vllm (5): DSCP 40 is mapped to no priority on eth0" in ran.out
    as_json = run("transports", "--root", str(tree.root), "--for", "0s", "--json")
    assert any("\x1b[2J\u202evllm" in str(value) for value in as_json.json["classes"][0].values())
    assert [line for line in (ran.out + as_json.out).splitlines() if not line.isprintable()] == []
