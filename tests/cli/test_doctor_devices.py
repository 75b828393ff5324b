# SPDX-License-Identifier: Apache-2.0
"""The doctor on devices, in namespaces with something to find."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from support.examined import config, only

from mfsd import doctor
from mfsd.daemon.config import DeviceConfig
from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.attach import TCX_EGRESS, HookUser, attach
from mfsd.datapath.bpf.libbpf import BpfObject, LibbpfLoader, object_path
from mfsd.datapath.facts import read_facts
from mfsd.datapath.tc import TcSocket
from mfsd.doctor import Context, Finding, Severity, device
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from support.namespaces import NetnsPair


netns = pytest.mark.netns


def on_v0(pair: NetnsPair, context: Context, check: Callable[[Context, str], Iterable[Finding]]) -> Finding:
    return pair.call(pair.a, lambda: only(check(context, "v0")))


@netns
def test_a_plain_veth(tmp_path: Path, netns_pair: NetnsPair) -> None:
    cfg = config(tmp_path, DeviceConfig(name="v0"), DeviceConfig(name="absent"))
    found = {f.id: f for f in netns_pair.call(netns_pair.a, lambda: doctor.run((), cfg))}
    assert found["device.exists:v0"].severity is Severity.OK
    assert found["device.exists:absent"].severity is Severity.FAIL
    assert not [i for i in found if i.endswith(":absent") and not i.startswith("device.exists")]
    assert "4 transmit queues" in found["device.queues:v0"].title
    assert found["device.speed:v0"].severity is Severity.WARN  # a veth's speed is made up
    assert found["device.qdisc:v0"].severity is Severity.OK
    assert found["device.hooks:v0"].severity is Severity.OK
    assert "tx-tcp-segmentation" in found["device.offloads:v0"].detail
    assert "device.bql:v0" not in found
    assert found["host.containers"].severity is Severity.INFO
    netns_pair.run(netns_pair.a, "ip link set v0 down")
    context = Context(("v0",), cfg)
    assert on_v0(netns_pair, context, device.exists).severity is Severity.WARN


@netns
def test_a_rate_is_known_or_not(tmp_path: Path, netns_pair: NetnsPair) -> None:
    cfg = config(tmp_path, DeviceConfig(name="v0", rate=Rate.parse("1gbit")))
    assert on_v0(netns_pair, Context(("v0",), cfg), device.speed).severity is Severity.OK
    assert on_v0(netns_pair, Context(("v0",), config(tmp_path)), device.speed).severity is Severity.INFO


@netns
def test_a_root_that_cannot_be_put_back(tmp_path: Path, netns_pair: NetnsPair) -> None:
    netns_pair.run(
        netns_pair.a,
        "tc qdisc add dev v0 root handle 1: htb default 1; tc class add dev v0 parent 1: classid 1:1 htb rate 1gbit;"
        "tc filter add dev v0 parent 1: protocol ip u32 match u32 0 0 flowid 1:1",
    )
    found = on_v0(netns_pair, Context(("v0",), config(tmp_path)), device.qdisc)
    assert found.severity is Severity.FAIL
    assert "filters" in found.detail
    netns_pair.run(netns_pair.a, "tc filter del dev v0 parent 1:")
    assert on_v0(netns_pair, Context(("v0",), config(tmp_path)), device.qdisc).severity is Severity.OK


@netns
@pytest.mark.bpf
def test_foreign_programs(tmp_path: Path, netns_pair: NetnsPair, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(("v0",), config(tmp_path))

    def hang_tcx(name: str) -> int:
        with BpfObject(object_path("empty")) as obj:
            obj.load()
            fd = obj.program_fd(name)
        try:
            return netns_pair.call(
                netns_pair.a, lambda: syscall.link_create(fd, read_facts("v0").ifindex, TCX_EGRESS, 0)
            )
        finally:
            os.close(fd)

    netns_pair.run(netns_pair.a, "tc qdisc add dev v0 clsact")
    assert on_v0(netns_pair, context, device.hooks).severity is Severity.OK  # an empty clsact hurts nobody
    netns_pair.run(netns_pair.a, "tc filter add dev v0 egress prio 7 protocol ip u32 match u32 0 0 flowid 1:1")
    found = on_v0(netns_pair, context, device.hooks)
    assert found.severity is Severity.INFO
    assert "u32 filter (clsact, priority 7)" in found.detail
    netns_pair.run(netns_pair.a, "tc qdisc del dev v0 clsact")
    link = hang_tcx("mfsd_empty")
    try:
        found = on_v0(netns_pair, context, device.hooks)
        assert "mfsd_empty" in found.detail
        assert "tcx" in found.detail
        assert "Cilium" not in found.title
        monkeypatch.setattr(syscall, "prog_info", lambda _id: ("cil_to_netdev", 3))
        assert "Cilium" in on_v0(netns_pair, context, device.hooks).title
    finally:
        os.close(link)


@netns
@pytest.mark.bpf
def test_our_own_classifier_is_nobody_else(tmp_path: Path, netns_pair: NetnsPair) -> None:
    context = Context(("v0",), config(tmp_path))
    with LibbpfLoader().open_classifier(16) as classifier:
        for method in ("tcx", "clsact"):

            def look(method: str = method) -> Finding:
                index = read_facts("v0").ifindex
                with attach(classifier, index, method):  # type: ignore[arg-type]
                    return only(device.hooks(context, "v0"))

            assert netns_pair.call(netns_pair.a, look).severity is Severity.OK


def test_programs_whose_names_are_not_for_us_to_see_are_not_taken_for_others(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container without CAP_SYS_ADMIN is told of mfsd's own classifier."""
    monkeypatch.setattr(device, "hook_users", lambda _index: [HookUser("tcx", "", "bpf", 5)])
    found = only(device.hooks(context, "lo"))
    assert found.severity is Severity.INFO
    assert found.title == "Can't see whose programs hang on the egress of lo"


def test_cilium_with_its_bandwidth_manager(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel has no fq, so what is at the root is made up here."""
    user = HookUser("tcx", "cil_to_netdev", "bpf", 5)
    monkeypatch.setattr(device, "hook_users", lambda _index: [user])
    roots = [SimpleNamespace(kind="mq"), SimpleNamespace(kind="fq")]
    monkeypatch.setattr(TcSocket, "tree", lambda _self, _index: (roots, []))
    found = only(device.hooks(context, "lo"))
    assert found.severity is Severity.WARN
    assert "bandwidth manager" in found.title
