# SPDX-License-Identifier: Apache-2.0
"""The doctor in namespaces with something to find, and on made-up /proc and /sys."""

from __future__ import annotations

import dataclasses
import gzip
import platform
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import pytest
from support.ctl import run
from support.examined import config, only, put

from mfsd import doctor
from mfsd.daemon.config import Config, DaemonConfig, parse
from mfsd.datapath.errors import LoaderError
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.datapath.undo.notes import Owner
from mfsd.doctor import Context, Finding, Severity, checkup, device, host, kernel, leftovers, loaders, tcp
from mfsd.ground.bands import Bands
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from support.namespaces import NetnsPair

netns = pytest.mark.netns


# --- the machine ------------------------------------------------------------------------------------------------------


def test_all_of_it_on_this_machine(tmp_path: Path) -> None:
    """Nothing trips, everything is worded, ids are unique."""
    findings = doctor.run((), config(tmp_path))
    assert len(findings) > 12
    assert not [f for f in findings if f.id.startswith("doctor.")]
    ids = [f.id for f in findings]
    assert len(set(ids)) == len(ids)
    for f in findings:
        assert f.title
        assert f.severity is Severity.OK or f.meaning or f.detail, f
        assert f.severity not in (Severity.WARN, Severity.FAIL) or (f.meaning and f.fix), f


@pytest.mark.parametrize(("release", "severity"), [("5.10.0-8-amd64", Severity.FAIL), ("6.1.0-18", Severity.OK)])
def test_kernel_version(context: Context, monkeypatch: pytest.MonkeyPatch, release: str, severity: Severity) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    assert only(kernel.version(context)).severity is severity


@pytest.mark.parametrize(
    ("text", "severity", "words"),
    [
        (
            "CONFIG_NET_SCHED=y\nCONFIG_NET_SCH_HTB=y\n# CONFIG_NET_SCH_PRIO is not set\n",
            Severity.OK,
            "htb yes, ets no, prio no",
        ),
        (
            "CONFIG_NET_SCH_INGRESS=y\nCONFIG_NET_SCH_PRIO=n\n",
            Severity.FAIL,
            "htb no, ets no, prio no, tbf no, drr no, clsact yes",
        ),
        ("CONFIG_NET_SCH_HTB=m\n", Severity.OK, "htb yes, ets no, prio no"),
        ("CONFIG_NET_SCH_ETS=y\n", Severity.OK, "htb no, ets yes, prio no"),
    ],
)
def test_qdiscs_of_a_kernel_configuration(
    context: Context, monkeypatch: pytest.MonkeyPatch, text: str, severity: Severity, words: str
) -> None:
    asked: list[str] = []

    def loadable(module: str) -> bool:
        asked.append(module)
        return True

    monkeypatch.setattr(kernel, "loadable", loadable)
    (context.root / "proc").mkdir()
    (context.root / "proc/config.gz").write_bytes(gzip.compress(text.encode()))
    found = only(kernel.qdiscs(context))
    assert found.severity is severity
    assert words in found.detail
    assert asked == (["sch_htb"] if "=m" in text else [])


@netns
@pytest.mark.parametrize("qdisc", ["htb", "prio", "tbf rate 1mbit burst 10kb latency 10ms", "drr", "fq", "no-such"])
def test_qdiscs_by_asking_the_kernel(context: Context, netns_pair: NetnsPair, qdisc: str) -> None:
    """Without a configuration to read the kernel is asked; both agree with what tc can install."""
    assert kernel.config_text(context) is None
    of_this_kernel = kernel.config_text(dataclasses.replace(context, root=Path("/")))
    kind, *_ = qdisc.split()
    argv = ["ip", "netns", "exec", netns_pair.a, "tc", "qdisc", "replace", "dev", "v0", "root", *qdisc.split()]
    installed = subprocess.run(argv, capture_output=True, check=False).returncode == 0
    assert kernel.has_qdisc(kind, None) is installed
    assert of_this_kernel is None or kernel.has_qdisc(kind, of_this_kernel) is installed
    assert installed or kind != "htb"  # all tests of enforcement need it


@pytest.mark.parametrize(("value", "severity"), [("0", Severity.WARN), ("1", Severity.OK), (None, Severity.INFO)])
def test_jit(context: Context, value: str | None, severity: Severity) -> None:
    if value is not None:
        put(context, "proc/sys/net/core/bpf_jit_enable", value)
    assert only(kernel.jit(context)).severity is severity


@pytest.mark.parametrize("table", ["iptables", "ip6tables"])
@pytest.mark.parametrize("whose", ["everybody's", "the bridge's own"])
def test_netfilter_sees_bridged_packets(context: Context, whose: str, table: str) -> None:
    assert not list(device.bridged(context, "eth0"))
    own, general = f"sys/devices/br7/bridge/nf_call_{table}", f"proc/sys/net/bridge/bridge-nf-call-{table}"
    for path in (own, general):
        put(context, path, "0")
    port = context.root / "sys/class/net/eth0/brport/bridge"
    port.parent.mkdir(parents=True)
    port.symlink_to(context.root / "sys/devices/br7")
    assert not list(device.bridged(context, "eth0"))
    put(context, general if whose == "everybody's" else own, "1")
    found = only(device.bridged(context, "eth0"))
    assert (found.severity, "br7" in found.title) == (Severity.WARN, True)
    assert not list(device.bridged(context, "eth1"))


def test_capabilities(context: Context) -> None:
    for mask, severity in ((0, Severity.WARN), (1 << 12 | 1 << 39, Severity.INFO), (0x1FFFFFFFFFF, Severity.OK)):
        put(context, "proc/self/status", f"Name:\tx\nCapEff:\t{mask:016x}\nCapBnd:\t0")
        found = only(loaders.capabilities(context))
        assert found.severity is severity
        assert ("CAP_BPF" in found.detail) == bool(mask)
    put(context, "proc/self/status", f"CapEff:\t{1 << 12 | 1 << 21:016x}")  # CAP_SYS_ADMIN stands in for CAP_BPF
    assert only(loaders.capabilities(context)).severity is Severity.INFO


def test_yielding_takes_one_capability_more(context: Context) -> None:
    put(context, "proc/self/status", f"CapEff:\t{1 << 12 | 1 << 19 | 1 << 39:016x}")
    assert only(loaders.capabilities(context)).severity is Severity.OK
    yields = dataclasses.replace(context, config=parse({"network": {"yield": "auto"}}))
    found = only(loaders.capabilities(yields))
    assert found.severity is Severity.INFO
    assert "CAP_PERFMON" in found.meaning


@netns
def test_connections_that_keep_their_congestion_control(context: Context, netns_pair: NetnsPair) -> None:
    put(context, "proc/sys/net/ipv4/tcp_congestion_control", "cubic")
    yields = dataclasses.replace(context, config=parse({"network": {"yield": "auto"}}))

    def seen(context: Context = yields) -> list[Finding]:
        return netns_pair.call(netns_pair.a, lambda: list(tcp.choices(context)))

    server = netns_pair.call(netns_pair.b, lambda: socket.create_server((netns_pair.addr_b, 0)))
    sock = netns_pair.call(netns_pair.a, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with server, sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        sock.connect(server.getsockname())
        assert only(seen()).severity is Severity.OK
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        found = only(seen())
        assert (found.severity, found.detail) == (Severity.INFO, "1 run reno; the default is cubic")
        assert not seen(context), "nobody yields anyhow"
        replaces = parse({"network": {"yield": "auto", "replace": True}})
        assert not seen(dataclasses.replace(context, config=replaces)), "it keeps nothing"


def test_rdma(context: Context) -> None:
    assert only(host.rdma(context)).severity is Severity.OK
    base = "sys/class/infiniband/mlx5_0/"
    put(context, base + "ports/1/gid_attrs/ndevs/0", "eth7")
    (context.root / base / "device/net/eth8").mkdir(parents=True)
    (context.root / "sys/class/infiniband/rxe0").mkdir()
    found = only(host.rdma(context))
    assert found.severity is Severity.INFO
    assert found.detail == "mlx5_0 (eth7, eth8); rxe0 (no netdev, in software)"
    shared = only(host.rdma(dataclasses.replace(context, devices=("eth8", "eth0"))))
    assert shared.severity is Severity.WARN
    assert "eth8" in shared.title
    assert "eth0" not in shared.title


def test_tcp(context: Context) -> None:
    ipv4 = "proc/sys/net/ipv4/"
    for name, value in (("tcp_sack", "1"), ("tcp_recovery", "1"), ("tcp_early_retrans", "3")):
        put(context, ipv4 + name, value)
    assert only(tcp.recovery(context)).severity is Severity.OK
    put(context, ipv4 + "tcp_sack", "0")
    found = only(tcp.recovery(context))
    assert found.severity is Severity.WARN
    assert found.fix == "sysctl -w net.ipv4.tcp_sack=1"
    for value, severity in (("cubic", Severity.OK), ("bbr", Severity.INFO)):
        put(context, ipv4 + "tcp_congestion_control", value)
        assert only(tcp.congestion_control(context)).severity is severity


@pytest.mark.parametrize(
    ("names", "counts", "seen"),
    [
        ("MPCapableSYNRX MPCapableSYNACKRX MPCapableACKRX MPCurrEstab", "4 3 4 2", "2 established"),
        ("MPCapableSYNRX MPCapableSYNACKRX MPCapableACKRX MPCurrEstab", "4 3 4 0", ""),
        ("MPCapableSYNRX MPCapableSYNACKRX MPCapableACKRX", "4 3 4", "7 made since the start"),
        ("MPCapableSYNRX MPCapableSYNACKRX MPCapableACKRX", "4 0 0", ""),
    ],
)
def test_mptcp(context: Context, names: str, counts: str, seen: str) -> None:
    put(context, "proc/net/netstat", f"TcpExt: SyncookiesSent\nTcpExt: 0\nMPTcpExt: {names}\nMPTcpExt: {counts}")
    assert [(f.severity, f.detail) for f in tcp.mptcp(context)] == ([(Severity.INFO, seen)] if seen else [])


@netns
def test_rto_min(context: Context, netns_pair: NetnsPair) -> None:
    def look() -> Finding:
        return only(tcp.rto_min(context))

    assert netns_pair.call(netns_pair.a, look).severity is Severity.INFO
    netns_pair.run(netns_pair.a, "ip route add 10.99.0.0/16 via 10.77.0.2 rto_min 10ms")
    found = netns_pair.call(netns_pair.a, look)
    assert found.severity is Severity.OK
    assert "routes: 10 ms" in found.detail
    put(context, "proc/sys/net/ipv4/tcp_rto_min_us", "5000")
    assert "5 ms" in netns_pair.call(netns_pair.b, look).detail


def test_a_check_that_trips_does_not_hide_the_others(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Context) -> Iterable[Finding]:
        raise RuntimeError("unforeseen")

    def refused(_: Context) -> Iterable[Finding]:
        raise PermissionError("not for you")

    monkeypatch.setattr(checkup, "CHECKS", (broken, refused, kernel.version))
    found = doctor.examine(context)
    assert [f.severity for f in found[:3]] == [Severity.WARN, Severity.INFO, Severity.OK]
    assert "unforeseen" in found[0].detail
    assert found[3].id == "device.none"


# --- what a daemon has left -------------------------------------------------------------------------------------------


@netns
def test_leftovers(tmp_path: Path, netns_pair: NetnsPair, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path)
    context = Context(("v0",), cfg)
    assert only(leftovers.notes_left(context)).severity is Severity.OK
    bands = Bands.build(2, default_after=1, lanes=2)

    def at_home(function: Callable[[], Iterable[Finding]]) -> Finding:
        return netns_pair.call(netns_pair.a, lambda: only(function()))

    def apply() -> None:
        with DeviceEnforcer("v0", bands, "htb", Rate.parse("1gbit"), cfg.daemon.state_dir) as enforcer:
            enforcer.apply()

    netns_pair.call(netns_pair.a, apply)
    assert only(leftovers.notes_left(context)).title == "A running daemon has v0"
    assert at_home(lambda: device.qdisc(context, "v0")).severity is Severity.OK
    with monkeypatch.context() as m:
        m.setattr(Owner, "alive", property(lambda _: False))
        found = only(leftovers.notes_left(context))
        assert "A daemon that is gone has left its qdiscs on v0" in at_home(lambda: leftovers.notes_left(context)).title
    assert found.severity is Severity.WARN
    assert "mfsctl restore" in found.fix
    (note,) = cfg.daemon.state_dir.glob("qdisc-*.json")
    text = note.read_text()
    note.write_text("{")
    assert only(leftovers.notes_left(context)).severity is Severity.FAIL
    note.unlink()
    lost = at_home(lambda: device.qdisc(context, "v0"))
    assert lost.severity is Severity.FAIL
    assert "tc qdisc del dev v0 root" in lost.fix
    assert "mfsctl restore v0 --delete" in at_home(lambda: leftovers.trees_left(context)).fix
    note.write_text(text)
    assert not netns_pair.call(netns_pair.a, lambda: list(leftovers.trees_left(context)))


# --- mfsctl doctor ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    conf = tmp_path / "c.toml"
    conf.write_text(f'[daemon]\nsocket = "{tmp_path}/s"\nstate_dir = "{tmp_path}"\n')
    good = run("doctor", "--device", "lo", "--config", str(conf))
    assert good.code == 0, good.out
    assert good.out.splitlines()[-1].endswith(", 0 fail")
    assert len(run("doctor", "--device", "lo", "--config", str(conf), "--all").out) > len(good.out)
    bad = run("doctor", "--device", "mfsd-none", "--config", str(conf), "--json")
    assert bad.code == 1
    found = {f["id"]: f for f in bad.json["findings"]}
    assert found["device.exists:mfsd-none"]["severity"] == "fail"
    assert set(found["kernel.version"]) == {"id", "severity", "title", "detail", "meaning", "fix"}
    assert run("doctor", "--config", str(tmp_path / "absent.toml")).code == 1
    conf.write_text("[daemon]\nslots = 3\n")
    assert "daemon.slots" in run("doctor", "--config", str(conf)).err


# --- how connections become known -------------------------------------------------------------------------------------


class NotThere:
    """A classifier, or a teller, as far as the doctor looks at one."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def open_classifier(self, _rows: int) -> NotThere:
        return self


def test_sockets_that_are_listed_as_configured(tmp_path: Path) -> None:
    wanted = Config(daemon=DaemonConfig(socket=tmp_path / "s", state_dir=tmp_path / "state", sockets="listing"))
    found = only(loaders.sockets(Context((), wanted, tmp_path)))
    assert (found.id, found.severity) == ("loader.sockets", Severity.INFO)
    assert "inet_diag" in found.title


@pytest.mark.parametrize(("wanted", "severity"), [("auto", Severity.WARN), ("kernel", Severity.FAIL)])
def test_sockets_that_can_not_be_told_are_a_finding_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Literal["auto", "kernel"], severity: Severity
) -> None:
    def fail(_: object) -> None:
        raise LoaderError("finding the root of cgroup v2", "only a part of it is to be seen here")

    configured = Config(daemon=DaemonConfig(socket=tmp_path / "s", state_dir=tmp_path / "state", sockets=wanted))
    context = Context((), configured, tmp_path)
    assert not list(loaders.sockets(context))  # nothing is tried without the capabilities
    put(context, "proc/self/status", f"CapEff:\t{1 << 39 | 1 << 12:016x}")
    monkeypatch.setattr(loaders, "LibbpfLoader", NotThere)
    monkeypatch.setattr(loaders, "Teller", fail)
    found = only(loaders.sockets(context))
    assert (found.id, found.severity) == ("loader.sockets", severity)
    assert "only a part of it" in found.detail
    assert "cgroup v2" in found.fix
    monkeypatch.setattr(loaders, "Teller", NotThere)
    assert only(loaders.sockets(context)).severity is Severity.OK
