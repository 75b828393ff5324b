# SPDX-License-Identifier: Apache-2.0
"""The real daemon on a stock kernel.

Every backend and loader, promotion against plain re-classification, the devices that hosts have (VLAN, a bridged pod),
and the doctor's word about the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.promotions import LONG_S, RATE_MBIT, WATCH_S, GuestDaemon, compare
from support.rig import Daemon, Flow, flows, running, tc_state
from support.waiting import wait_for

from mfsd.client import cookie_of, tuple_of
from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.attach import TCX_EGRESS, hook_users
from mfsd.datapath.bpf.bcc import check_headers
from mfsd.datapath.bpf.libbpf import BpfObject, object_path
from mfsd.datapath.errors import LoaderError
from mfsd.ground.model import Stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.client import Client

pytestmark = pytest.mark.netns

MB = 1_000_000
WANTED = {"htb": ("htb",), "prio": ("prio", "ets", "tbf", "drr")}
LIMIT = f"{RATE_MBIT}mbit"
BACKENDS = pytest.mark.parametrize(
    ("backend", "rate", "floors"),
    [
        pytest.param("prio", None, True, marks=pytest.mark.feature("daemon: prio (ets), bare")),
        pytest.param("prio", LIMIT, True, marks=pytest.mark.feature("daemon: prio (ets) under tbf")),
        pytest.param("prio", LIMIT, False, marks=pytest.mark.feature("daemon: prio under htb, no ets")),
        pytest.param("htb", LIMIT, True, marks=pytest.mark.feature("daemon: htb")),
    ],
)


@BACKENDS
def test_each_stage_lands_in_its_queue(
    netns_pair: NetnsPair,
    tmp_path: Path,
    needs: Callable[..., None],
    request: pytest.FixtureRequest,
    backend: str,
    rate: str | None,
    *,
    floors: bool,
) -> None:
    """IPv4 and IPv6."""
    if floors:
        needs(*WANTED[backend])
    else:
        needs("prio", "htb", "drr")
        request.getfixturevalue("without_ets")
    before = tc_state(netns_pair)
    with running(GuestDaemon(netns_pair, tmp_path, backend=backend, rate=rate)) as daemon:
        for v6 in (False, True):
            grown = grown_by_stage(daemon, [Flow.open(netns_pair, v6=v6) for _ in range(3)])
            # prio itself can't give any, whatever the configuration says; without a rate nobody knows how much it is.
            assert (daemon.bands()["default"].floor_bytes_per_s > 0) == (floors and rate is not None)
            for name in ("level 0", "level 4", "default"):
                assert MB // 2 <= grown[name] < MB, (name, v6, grown)
            assert not any(grown[name] for name in ("level 1", "level 2", "level 3", "scavenger"))
        assert daemon.end() == 0
    assert tc_state(netns_pair) == before


def grown_by_stage(daemon: Daemon, opened: list[Flow]) -> dict[str, int]:
    """Bytes per band of half a megabyte each: a collective's, a deferred and an unhinted connection's."""
    try:
        with daemon.client() as client:
            client.mark(opened[0].sender, Stage.COLLECTIVE)
            client.mark(opened[1].sender, Stage.P2D)
            assert client.flush(30)
            wait_for(lambda: daemon.band_of(opened[1]) == "level 4", "P2D to be deferred", LONG_S)
            first = daemon.bands()
            for flow in opened:
                flow.sender.sendall(bytes(MB // 2))
            wait_for(lambda: all(f.received == MB // 2 for f in opened), "everything to arrive", LONG_S)
            wait_for(
                lambda: (
                    sum(b.bytes for b in daemon.bands().values()) - sum(b.bytes for b in first.values()) >= 3 * MB // 2
                ),
                "the counters",
                LONG_S,
            )
            after = daemon.bands()
            return {name: after[name].bytes - first[name].bytes for name in after}
    finally:
        for flow in opened:
            flow.close()


@pytest.mark.feature("promotion: prio without ets, each takes effect, by a rescue alone")
@pytest.mark.usefixtures("without_ets")
def test_a_promotion_takes_effect_by_a_rescue_alone(
    netns_pair: NetnsPair,
    tmp_path: Path,
    needs: Callable[..., None],
    record_property: Callable[[str, object], None],
) -> None:
    """Bands are strict: what is stuck below a busy one stays there."""
    needs("prio", "htb", "drr")
    times = compare(netns_pair, tmp_path, record_property, backend="prio")
    assert max(times[True]) < WATCH_S * 1000, times
    assert min(times[False]) > max(times[True]), times


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("prio", marks=pytest.mark.feature("promotion: prio (ets), each takes effect, by a rescue")),
        pytest.param("htb", marks=pytest.mark.feature("promotion: htb, each takes effect, by a rescue")),
    ],
)
def test_every_promotion_takes_effect_where_bands_have_floors(
    netns_pair: NetnsPair,
    tmp_path: Path,
    needs: Callable[..., None],
    record_property: Callable[[str, object], None],
    backend: str,
) -> None:
    """Floors move what is stuck, too, sooner or later: how much sooner a rescue is depends on the processor."""
    needs(*WANTED[backend])
    times = compare(netns_pair, tmp_path, record_property, backend=backend)
    assert max(times[True]) < WATCH_S * 1000, times


@pytest.mark.feature("VLAN device, IPv4 and IPv6")
@pytest.mark.parametrize("backend", ["prio", "htb"])
def test_a_vlan_device_is_shaped(
    netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None], backend: str
) -> None:
    needs(*WANTED[backend])
    pair = netns_pair
    for name, dev, host in ((pair.a, pair.dev_a, 1), (pair.b, pair.dev_b, 2)):
        pair.run(name, f"ip link add link {dev} name vlan7 type vlan id 7 && ip link set vlan7 up")
        pair.run(name, f"ip addr add 10.78.0.{host}/24 dev vlan7; ip addr add fd78::{host}/64 dev vlan7 nodad")
    on_vlan = type(pair)(
        pair.a, pair.b, "vlan7", "vlan7", "10.78.0.1", "10.78.0.2", "fd78::1", "fd78::2"
    )  # fmt: skip
    before = tc_state(on_vlan)
    with running(GuestDaemon(on_vlan, tmp_path, backend=backend)) as daemon:
        for v6 in (False, True):
            grown = grown_by_stage(daemon, [Flow.open(on_vlan, v6=v6) for _ in range(3)])
            assert MB // 2 <= grown["level 0"] < MB
            assert MB // 2 <= grown["level 4"] < MB
        assert daemon.end() == 0
    assert tc_state(on_vlan) == before


@pytest.mark.feature("tagged frames of a VLAN through the physical device")
def test_traffic_of_a_vlan_on_a_governed_lower_device(
    netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None]
) -> None:
    needs("prio", "drr")
    pair = netns_pair
    for name, dev, host in ((pair.a, pair.dev_a, 1), (pair.b, pair.dev_b, 2)):
        pair.run(name, f"ip link add link {dev} name vlan7 type vlan id 7 && ip link set vlan7 up")
        pair.run(name, f"ip addr add 10.78.0.{host}/24 dev vlan7")
    on_vlan = type(pair)(pair.a, pair.b, "vlan7", "vlan7", "10.78.0.1", "10.78.0.2")
    with running(GuestDaemon(pair, tmp_path, backend="prio")) as daemon:
        grown = grown_by_stage(daemon, [Flow.open(on_vlan) for _ in range(3)])
        assert MB // 2 <= grown["level 0"] < MB
        assert MB // 2 <= grown["level 4"] < MB


BRIDGED = """
ip link add br0 type bridge; ip link set v0 master br0; ip link set p0 master br0; ip link set br0 up; ip link set p0 up
sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0
"""
ROUTED = """
ip addr add 10.79.0.1/24 dev p0; ip addr add fd79::1/64 dev p0 nodad; ip link set p0 up
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("bridged", marks=pytest.mark.feature("bridged pod, hinted by 5-tuple, matched by socket")),
        pytest.param("routed", marks=pytest.mark.feature("routed pod, hinted and matched by 5-tuple")),
    ],
)
def test_a_pod_is_matched_by_addresses(
    netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None], how: str
) -> None:
    """Pod, veth, bridge or routes, v0. Routing costs packets their socket; a veth or a bridge does not."""
    needs("prio", "drr")
    pair, pod = netns_pair, f"{netns_pair.a}-pod"
    net = 77 if how == "bridged" else 79
    with contextlib.ExitStack() as stack:
        # Not inside a namespace: what `ip netns exec` mounts is not seen outside.
        subprocess.run(["ip", "netns", "add", pod], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", pod], check=True)
        subprocess.run(
            ["ip", "-n", pair.a, "link", "add", "p0", "type", "veth", "peer", "name", "eth0", "netns", pod], check=True
        )
        pair.run(pair.a, BRIDGED if how == "bridged" else ROUTED)
        pair.run(
            pod,
            f"ip link set lo up; ip addr add 10.{net}.0.9/24 dev eth0; ip addr add fd{net}::9/64 dev eth0 nodad; "
            "ip link set eth0 up",
        )
        if how == "routed":
            pair.run(pod, "ip route add default via 10.79.0.1; ip route add default via fd79::1")
            pair.run(pair.b, f"ip route add 10.79.0.0/24 via {pair.addr_a}; ip route add fd79::/64 via {pair.addr6_a}")
        inside = type(pair)(pod, pair.b, "eth0", pair.dev_b, f"10.{net}.0.9", pair.addr_b, f"fd{net}::9", pair.addr6_b)
        daemon = stack.enter_context(running(GuestDaemon(pair, tmp_path, backend="prio")))
        client = stack.enter_context(daemon.client())
        for v6 in (False, True):
            pod_traffic(daemon, client, inside, v6=v6, routed=how == "routed")


def pod_traffic(daemon: Daemon, client: Client, pod: NetnsPair, *, v6: bool, routed: bool) -> None:
    """Half a megabyte of a connection out of a pod that is hinted by its addresses ends up in level 0."""
    here, there = (pod.addr6_a, pod.addr6_b) if v6 else (pod.addr_a, pod.addr_b)
    flow = Flow.open(pod, port=7001, source_port=41_001, v6=v6)
    try:
        client.mark(tuple_of(there, 7001, here, 41_001), Stage.COLLECTIVE)
        assert client.flush(30)
        cookie = cookie_of(flow.sender)
        wait_for(lambda: [c for c in daemon.connections() if c.cookie == cookie], "the pod's connection", LONG_S)
        first, before = daemon.status().devices[0], daemon.bands()["level 0"].bytes
        flow.sender.sendall(bytes(MB // 2))
        wait_for(lambda: flow.received == MB // 2, "arrival", LONG_S)
        wait_for(lambda: daemon.bands()["level 0"].bytes >= before + MB // 2, "the pod's bytes in level 0", LONG_S)
        stats = daemon.status().devices[0].stats
        tuples, cookies = (stats[name] - first.stats[name] for name in ("tuple", "cookie"))
        assert (tuples > 0, cookies > 0) == ((True, False) if routed else (False, True)), (tuples, cookies)
    finally:
        flow.close()


def hits(pair: NetnsPair) -> int:
    """Packets that the foreign filter of a test has seen."""
    shown = pair.run(pair.a, f"tc -s -j filter show dev {pair.dev_a} egress")
    (stats,) = (
        action["stats"]
        for f in json.loads(shown)
        if f["kind"] == "matchall"
        for action in f.get("options", {}).get("actions", [])
    )
    return int(stats["packets"])


@pytest.mark.feature("foreign clsact filter and foreign TCX program beside a running daemon")
@pytest.mark.parametrize("when", ["before", "after"])
def test_programs_of_others_stay_and_go_on(
    netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None], when: str
) -> None:
    """A counting filter in clsact, and where there is TCX a program there: set up before us, or while we run."""
    needs("htb")
    pair = netns_pair
    has_tcx = "tcx" in os.environ["MFSD_VM_FEATURES"].split()
    index = pair.call(pair.a, lambda: socket.if_nametoindex(pair.dev_a))

    def names() -> list[str]:
        return [u.name for u in pair.call(pair.a, lambda: hook_users(index)) if u.hook == "tcx"]

    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(BpfObject(object_path("empty")))
        theirs.load()

        def move_in() -> None:
            pair.run(
                pair.a,
                f"tc qdisc show dev {pair.dev_a} | grep -q clsact || tc qdisc add dev {pair.dev_a} clsact; "
                f"tc filter add dev {pair.dev_a} egress pref 9 matchall action pass",
            )
            if has_tcx:
                link = pair.call(
                    pair.a, lambda: syscall.link_create(theirs.program_fd("mfsd_empty"), index, TCX_EGRESS, 0)
                )
                stack.callback(os.close, link)

        if when == "before":
            move_in()
        daemon = stack.enter_context(running(GuestDaemon(pair, tmp_path)))
        if when == "after":
            move_in()
        flow = stack.enter_context(flows(pair, 1))[0]
        client = stack.enter_context(daemon.client())
        client.mark(flow.sender, Stage.COLLECTIVE)
        assert client.flush(30)
        wait_for(lambda: daemon.band_of(flow) == "level 0", "the mark", LONG_S)
        seen = hits(pair)
        flow.sender.sendall(bytes(MB // 2))
        wait_for(lambda: daemon.bands()["level 0"].bytes >= MB // 2, "our classifier to run", LONG_S)
        assert hits(pair) > seen, "their filter sees the traffic"
        assert names() == (["mfsd_classify", "mfsd_empty"] if has_tcx else [])
        assert daemon.end() == 0
        assert names() == (["mfsd_empty"] if has_tcx else [])
        left = pair.run(pair.a, f"tc filter show dev {pair.dev_a} egress")
        assert "mfsd" not in left
        assert "matchall" in left
        seen = hits(pair)
        flow.sender.sendall(bytes(MB // 2))
        wait_for(lambda: flow.received == MB, "traffic after us", LONG_S)
        assert hits(pair) > seen, "and still does when we are gone"


@pytest.mark.feature("daemon with the BCC loader")
def test_the_daemon_with_bcc(netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None]) -> None:
    needs("htb")
    try:
        check_headers(os.uname().release)
    except LoaderError:
        pytest.skip("this kernel has no headers")
    with running(GuestDaemon(netns_pair, tmp_path, loader="bcc")) as daemon:
        grown = grown_by_stage(daemon, [Flow.open(netns_pair) for _ in range(3)])
        assert MB // 2 <= grown["level 0"] < MB
        assert daemon.end() == 0


@pytest.mark.feature("doctor")
def test_the_doctor_tells_the_truth_about_this_kernel(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """What it says must be what the kernel's own configuration says, which the runner hands over."""
    daemon = GuestDaemon(netns_pair, tmp_path)
    said = daemon.mfsctl("--json", "doctor", "--device", netns_pair.dev_a, "--config", str(daemon.config))
    findings = {f["id"]: f for f in json.loads(said.stdout)["findings"]}
    has = set(os.environ["MFSD_VM_FEATURES"].split())
    assert findings["kernel.version"]["severity"] == "ok"
    assert findings["kernel.tcx"]["severity"] == ("ok" if "tcx" in has else "info")
    assert findings["loader.classifier"]["severity"] == "ok"
    assert findings["loader.bcc"]["severity"] == ("ok" if "headers" in has else "info")
    qdiscs = findings["kernel.qdiscs"]["detail"]
    for kind in ("htb", "prio", "tbf", "drr", "fq", "ets"):
        assert (f"{kind} yes" in qdiscs) == (kind in has), qdiscs
    assert "4 transmit queues" in findings[f"device.queues:{netns_pair.dev_a}"]["detail"]
    broken = [f for f in findings.values() if f["severity"] == "fail"]
    assert broken == []
    assert said.returncode == 0


def test_sockets_of_the_guest_have_cookies() -> None:
    """Or nothing here would mean anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        assert cookie_of(s) > 0
