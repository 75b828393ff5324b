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
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest
from rig import Daemon, Flow, flows, running, tc_state, wait_for

from mfsd.client import cookie_of, tuple_of
from mfsd.datapath.bcc import check_headers
from mfsd.datapath.loader import LoaderError
from mfsd.model import Stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from namespaces import NetnsPair

    from mfsd.client import Client

pytestmark = pytest.mark.netns

RATE_MBIT = 50
LINK = RATE_MBIT * 125_000
MB = 1_000_000
LONG_S = 90.0
"""Bound of waits under emulation."""
WATCH_S = 3.0
"""How long a promotion is waited for."""
TRIALS = 5
BUSY = 3


class GuestDaemon(Daemon):
    """With a slower link and whatever backend, loader and device a test is about."""

    def __init__(self, pair: NetnsPair, folder: Path, **more: Any) -> None:
        self.backend = more.pop("backend", "htb")
        self.rate = more.pop("rate", f"{RATE_MBIT}mbit")
        self.device = more.pop("device", pair.dev_a)
        self.loader = more.pop("loader", "auto")
        super().__init__(pair, folder, **more)

    def write_config(self, extra: str = "", **more: Any) -> None:
        super().write_config(extra, **{"daemon": f'loader = "{self.loader}"'} | more)
        text = self.config.read_text()
        before, _, after = text.partition("[[device]]")
        _, _, after = after.partition("[policy]")
        rate = f'rate = "{self.rate}"\n' if self.rate else ""
        device = f'[[device]]\nname = "{self.device}"\nbackend = "{self.backend}"\n{rate}'
        self.config.write_text(f"{before}{device}[policy]{after}")


def level_of(daemon: Daemon, flow: Flow) -> str:
    cookie = cookie_of(flow.sender)
    return next((c.band for c in daemon.connections() if c.cookie == cookie), "")


WANTED = {"htb": ("htb",), "prio": ("prio", "tbf", "drr")}
FAMILIES = pytest.mark.parametrize("family", ["IPv4", "IPv6"])
BACKENDS = pytest.mark.parametrize(
    ("backend", "rate"),
    [
        pytest.param("prio", None, marks=pytest.mark.feature("daemon: prio, bare")),
        pytest.param("prio", f"{RATE_MBIT}mbit", marks=pytest.mark.feature("daemon: prio under tbf")),
        pytest.param("htb", f"{RATE_MBIT}mbit", marks=pytest.mark.feature("daemon: htb")),
    ],
)


@BACKENDS
@FAMILIES
def test_each_stage_lands_in_its_queue(
    netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None], family: str, backend: str, rate: str | None
) -> None:
    needs(*WANTED[backend])
    before = tc_state(netns_pair)
    with running(GuestDaemon(netns_pair, tmp_path, backend=backend, rate=rate)) as daemon:
        grown = grown_by_stage(daemon, [Flow.open(netns_pair, v6=family == "IPv6") for _ in range(3)])
        for name in ("level 0", "level 4", "default"):
            assert MB // 2 <= grown[name] < MB, (name, grown)
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
            wait_for(lambda: level_of(daemon, opened[1]) == "level 4", "P2D to be deferred", LONG_S)
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


def promotion_ms(daemon: Daemon, client: Client, late: Flow, busy: list[Flow]) -> float:
    """From the hint to the first 50 ms in which the promoted flow gets half of the link; WATCH_S if none is."""
    client.mark(late.sender, Stage.P2D)
    assert client.flush(30)
    wait_for(lambda: level_of(daemon, late) == "level 4", "deferral", LONG_S)
    seen = sum(f.received for f in busy)
    wait_for(lambda: sum(f.received for f in busy) - seen > LINK, "a second of starvation", LONG_S)
    begin = time.monotonic()
    client.mark(late.sender, Stage.COLLECTIVE)
    time.sleep(WATCH_S)
    recent = [(at - begin, n) for at, n in list(late.arrivals) if at >= begin]
    for at, _ in recent:
        if sum(n for t, n in recent if at <= t < at + 0.05) >= 0.5 * LINK * 0.05:
            return at * 1000
    return WATCH_S * 1000


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("prio", marks=pytest.mark.feature("promotion: prio, rescue >= 10 x faster than plain at p50")),
        pytest.param("htb", marks=pytest.mark.feature("promotion: htb, rescue >= 10 x faster than plain at p50")),
    ],
)
def test_rescue_is_much_faster_than_plain_reclassification(
    netns_pair: NetnsPair,
    tmp_path: Path,
    needs: Callable[..., None],
    record_property: Callable[[str, object], None],
    backend: str,
) -> None:
    """Ratios within one guest; the processors are emulated."""
    needs(*WANTED[backend])
    p50 = {}
    for enabled in (True, False):
        folder = tmp_path / str(enabled)
        folder.mkdir()
        extra = f"[rescue]\nenabled = {str(enabled).lower()}"
        with (
            running(GuestDaemon(netns_pair, folder, backend=backend, extra=extra)) as daemon,
            flows(netns_pair, 1 + BUSY) as (late, *busy),
            daemon.client() as client,
        ):
            for flow in busy:
                client.mark(flow.sender, Stage.KV_REUSE)
            for flow in (*busy, late):
                flow.saturate(600)
            promotion_ms(daemon, client, late, busy)  # the first starves all sockets anew and is not counted
            times = [promotion_ms(daemon, client, late, busy) for _ in range(TRIALS)]
            record_property(f"{'rescue' if enabled else 'plain'}_ms", [round(t) for t in times])
            p50[enabled] = statistics.median(times)
            assert daemon.status().counters.promotions >= TRIALS
            assert bool(daemon.status().counters.rescues) == enabled
    record_property("ratio", round(p50[False] / p50[True], 1))
    assert p50[False] >= 10 * p50[True], p50


@pytest.mark.feature("VLAN device, IPv4 and IPv6")
@pytest.mark.parametrize("backend", ["prio", "htb"])
@FAMILIES
def test_a_vlan_device_is_shaped(
    netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None], family: str, backend: str
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
        grown = grown_by_stage(daemon, [Flow.open(on_vlan, v6=family == "IPv6") for _ in range(3)])
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


@pytest.mark.feature("bridged pod, matched by 5-tuple")
@FAMILIES
def test_a_bridged_pod_is_matched_by_addresses(
    netns_pair: NetnsPair, tmp_path: Path, needs: Callable[..., None], family: str
) -> None:
    """Pod, veth, bridge, v0: crossing the veth has cost the packets their socket."""
    needs("prio", "drr")
    pair, pod = netns_pair, f"{netns_pair.a}-pod"
    with contextlib.ExitStack() as stack:
        pair.run(pair.b, f"ip netns add {pod}")
        stack.callback(pair.run, pair.b, f"ip netns del {pod}")
        pair.run(pair.a, f"ip link add p0 type veth peer name eth0 netns {pod}")
        pair.run(
            pair.a,
            f"ip link add br0 type bridge && ip link set {pair.dev_a} master br0 && ip link set p0 master br0 "
            f"&& ip link set br0 up && ip link set p0 up",
        )
        pair.run(pod, "ip link set lo up; ip addr add 10.77.0.9/24 dev eth0; ip addr add fd77::9/64 dev eth0 nodad")
        pair.run(pod, "ip link set eth0 up")
        inside = type(pair)(pod, pair.b, "eth0", pair.dev_b, "10.77.0.9", pair.addr_b, "fd77::9", pair.addr6_b)
        daemon = stack.enter_context(running(GuestDaemon(pair, tmp_path, backend="prio")))
        client = stack.enter_context(daemon.client())
        here, there = (inside.addr6_a, inside.addr6_b) if family == "IPv6" else (inside.addr_a, inside.addr_b)
        flow = Flow.open(inside, port=7001, source_port=41_001, v6=family == "IPv6")
        stack.callback(flow.close)
        client.mark(tuple_of(there, 7001, here, 41_001), Stage.COLLECTIVE)
        assert client.flush(30)
        wait_for(lambda: daemon.status().connections, "the daemon to take the pod's connection", LONG_S)
        first = daemon.status().devices[0]
        flow.sender.sendall(bytes(MB // 2))
        wait_for(lambda: flow.received == MB // 2, "arrival", LONG_S)
        wait_for(lambda: daemon.bands()["level 0"].bytes >= MB // 2, "the pod's bytes in level 0", LONG_S)
        after = daemon.status().devices[0]
        assert after.stats["tuple"] > first.stats["tuple"]
        assert after.stats["cookie"] == first.stats["cookie"]


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
