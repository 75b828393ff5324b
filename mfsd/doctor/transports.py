# SPDX-License-Identifier: Apache-2.0
"""Who moves bulk bytes over TCP, next to the RDMA links that could have carried them, and the classes that RoCE is in.

Two looks, some time apart, and what lies between them. Nothing is changed. What is read: inet_diag, /proc/PID (fd,
environ, comm), /sys/class/infiniband (Documentation/ABI/stable/sysfs-class-infiniband; tc/ is of NVIDIA's driver
only), /sys/class/net, /sys/kernel/config/rdma_cm, and what dcb(8) shows.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.host.sockets import SocketResolver

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from mfsd.doctor.finding import Context
    from mfsd.ground.model import Endpoints

VARIABLES: Final = (
    "NCCL_IB_TC", "MC_IB_TC", "UCX_IB_TRAFFIC_CLASS", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME",
    "NCCL_NET", "UCX_TLS", "UCX_NET_DEVICES", "MC_FORCE_TCP",
)  # fmt: skip
"""Of the environments of processes only these are looked at."""
CLASSES: Final = VARIABLES[:3]
"""Those that say a traffic class: the DSCP is its upper six bits (RFC 2474)."""
OCTETS: Final = 4
"""port_xmit_data and port_rcv_data count units of so many."""
DCB_S: Final = 5.0
"""For dcb to answer."""
PROBE_S: Final = 1.0
"""Between the two looks."""


@dataclass(frozen=True, slots=True)
class Port:
    """One port of an RDMA link; bytes since the driver was loaded."""

    link: str
    number: int
    state: str
    layer: str
    """Ethernet (RoCE) or InfiniBand."""
    rate: str
    """In the kernel's words: "100 Gb/sec (4X EDR)"."""
    sent: int
    received: int
    netdevs: tuple[str, ...]
    forced: tuple[int, ...]
    """Traffic classes that the driver gives to all its packets, or to those of connections made by rdma_cm."""

    @property
    def active(self) -> bool:
        """It can carry something."""
        return self.state == "ACTIVE"

    @property
    def name(self) -> str:
        """As RDMA tools call it."""
        return f"{self.link}/{self.number}"


@dataclass(frozen=True, slots=True)
class Process:
    """A process that sends over TCP or has an RDMA device open."""

    pid: int
    name: str
    verbs: bool
    """It has /dev/infiniband/uverbsN open."""
    variables: Mapping[str, str]


@dataclass(slots=True)
class Look:
    """What is to be seen at one moment."""

    at: float
    ports: list[Port]
    tcp: dict[int, tuple[Endpoints, int, int]]
    """By cookie: (endpoints, inode, bytes acknowledged)."""
    netdevs: dict[str, int]
    """Bytes sent by each device with hardware behind it that is up."""


@dataclass(frozen=True, slots=True)
class Flow:
    """TCP from one process to one host. ``pid`` 0: whose it is can't be seen from here."""

    pid: int
    process: str
    peer: str
    connections: int
    bytes_per_s: float
    local: bool
    """Within this host."""


@dataclass(frozen=True, slots=True)
class Class:
    """A traffic class that somebody gives to RDMA packets."""

    who: str
    traffic_class: int
    device: str
    """The netdev whose mapping was asked; empty: none."""
    priority: int
    """By `dcb app`; -1: not mapped, or unknown."""
    queue: int
    """The device's own traffic class by `dcb ets`; -1: unknown."""

    @property
    def dscp(self) -> int:
        """0 to 63."""
        return self.traffic_class >> 2


@dataclass(slots=True)
class Report:
    """What lies between two looks."""

    seconds: float
    flows: list[Flow]
    """The busiest first."""
    ports: list[tuple[Port, float, float]]
    """With bytes/s sent and received."""
    netdevs: dict[str, float]
    """Bytes/s sent."""
    processes: list[Process]
    classes: list[Class] = field(default_factory=list)
    mapped: dict[str, str] = field(default_factory=dict)
    """By netdev, what dcb says, in words."""


# --- looking ----------------------------------------------------------------------------------------------------------


def look(context: Context) -> Look:
    """Take one. Raises DiagError."""
    with SocketResolver() as resolver:
        known = {s.cookie: s for s in resolver.all()}
        progress = resolver.tcp_progress((s.cookie, s.endpoints) for s in known.values())
    found = {c: (known[c].endpoints, known[c].inode, p.bytes_acked) for c, p in progress.items() if p is not None}
    return Look(time.monotonic(), list(ports(context)), found, netdevs(context))


def ports(context: Context) -> Iterable[Port]:
    """Ports of all RDMA links."""
    base = context.root / "sys/class/infiniband"
    for link in sorted(base.iterdir()) if base.is_dir() else ():
        for port in sorted(link.glob("ports/*")):
            read = _reader(context, port)
            yield Port(
                link.name,
                int(port.name),
                read("state").rpartition(": ")[2],
                read("link_layer") or "InfiniBand",
                read("rate"),
                _number(read("counters/port_xmit_data")) * OCTETS,
                _number(read("counters/port_rcv_data")) * OCTETS,
                tuple(netdevs_of(context, link.name)),
                tuple(_forced(context, link.name, port.name)),
            )


def netdevs_of(context: Context, link: str) -> list[str]:
    """Network devices that share a NIC with an RDMA link."""
    base = context.root / "sys/class/infiniband" / link
    out = {p.name for p in (base / "device/net").glob("*")}
    for ndev in base.glob("ports/*/gid_attrs/ndevs/*"):
        try:
            out.add(ndev.read_text().strip())
        except OSError:  # an unused GID: EINVAL
            continue
    return sorted(out - {""})


def _forced(context: Context, link: str, port: str) -> Iterable[int]:
    # "Global tclass=106", or rules of their own behind it (NVIDIA's driver).
    text = context.read(f"sys/class/infiniband/{link}/tc/{port}/traffic_class") or ""
    yield from (int(n) for n in re.findall(r"tclass=(\d+)", text))
    yield from ([int(text)] if text.isdecimal() else [])
    tos = context.read(f"sys/kernel/config/rdma_cm/{link}/ports/{port}/default_roce_tos") or ""
    yield from ([int(tos)] if tos.isdecimal() and int(tos) else [])


def netdevs(context: Context) -> dict[str, int]:
    """Bytes sent by each network device that has hardware behind it and is up."""
    out = {}
    for device in sorted((context.root / "sys/class/net").glob("*")):
        if (device / "device").exists() and context.read(f"sys/class/net/{device.name}/operstate") == "up":
            out[device.name] = _number(context.read(f"sys/class/net/{device.name}/statistics/tx_bytes") or "")
    return out


def processes(context: Context) -> tuple[list[Process], dict[int, int]]:
    """Those that can be looked into, as they are now; and the process by inode of a socket."""
    found: list[Process] = []
    owners: dict[int, int] = {}
    for folder in (context.root / "proc").glob("[0-9]*"):
        pid = int(folder.name)
        open_files = _open_files(folder)
        inodes = {int(f[8:-1]) for f in open_files if f.startswith("socket:[")}
        owners |= dict.fromkeys(inodes, pid)
        variables = _variables(folder)
        verbs = any("/infiniband/uverbs" in f for f in open_files)
        if inodes or verbs or variables:
            found.append(Process(pid, context.read(f"proc/{pid}/comm") or "?", verbs, variables))
    return found, owners


def _variables(folder: Path) -> dict[str, str]:
    try:
        words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    pairs = (word.partition("=") for word in words)
    return {name: value for name, _, value in pairs if name in VARIABLES}


def _open_files(folder: Path) -> list[str]:
    """Where its descriptors lead; none of a process that is gone or not ours to look into."""
    out = []
    with contextlib.suppress(OSError):
        for fd in (folder / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                out.append(str(fd.readlink()))
    return out


def _reader(context: Context, base: Path) -> Any:
    return lambda name: context.read(str((base / name).relative_to(context.root))) or ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


# --- what lies between ------------------------------------------------------------------------------------------------


def compare(context: Context, before: Look, after: Look) -> Report:
    """Put two looks together."""
    seconds = max(after.at - before.at, 1e-9)
    known, owners = processes(context)
    names = {p.pid: p.name for p in known}
    flows: dict[tuple[int, str], list[float]] = defaultdict(list)
    local = set()
    for cookie, (ends, inode, acked) in after.tcp.items():
        moved = acked - before.tcp.get(cookie, (ends, inode, 0))[2]
        if moved > 0:
            key = owners.get(inode, 0), str(ends.dst)
            flows[key].append(moved / seconds)
            if ends.dst.is_loopback or ends.src == ends.dst:
                local.add(key)
    sent = {p.name: (p.sent, p.received) for p in before.ports}
    report = Report(
        seconds,
        sorted(
            (Flow(k[0], names.get(k[0], "?"), k[1], len(r), sum(r), k in local) for k, r in flows.items()),
            key=lambda f: -f.bytes_per_s,
        ),
        [
            (p, max(p.sent - sent.get(p.name, (p.sent, 0))[0], 0) / seconds,
             max(p.received - sent.get(p.name, (0, p.received))[1], 0) / seconds)
            for p in after.ports
        ],
        {name: max(n - before.netdevs.get(name, n), 0) / seconds for name, n in after.netdevs.items()},
        known,
    )  # fmt: skip
    _classes(report)
    return report


def measure(context: Context, seconds: float = PROBE_S) -> Report:
    """Look, wait, look again."""
    before = look(context)
    time.sleep(seconds)
    return compare(context, before, look(context))


def _classes(report: Report) -> None:
    """Who gives RDMA packets which class, and where that leads on each NIC."""
    roce = [p for p, _, _ in report.ports if p.layer == "Ethernet"]
    maps = {name: _dcb(name) for name in sorted({n for p in roce for n in p.netdevs})}
    report.mapped = {name: _words(found) for name, found in maps.items()}
    givers: list[tuple[str, int, list[str]]] = [
        (f"{p.name} (all its packets)", tc, list(p.netdevs)) for p in roce for tc in p.forced
    ]
    for process in report.processes:
        for name in CLASSES:
            value = process.variables.get(name, "")
            if value.isdecimal() and int(value) < 256:
                givers.append((f"{name} of {process.name} ({process.pid})", int(value), sorted(maps)))
    for who, tc, names in givers:
        for name in names or [""]:
            priority = maps.get(name, {}).get("dscp", {}).get(tc >> 2, -1)
            queues = maps.get(name, {}).get("prio_tc", [])
            queue = queues[priority] if 0 <= priority < len(queues) else -1
            report.classes.append(Class(who, tc, name, priority, queue))


def _dcb(name: str) -> dict[str, Any]:
    """Mappings of a device: {"dscp": {DSCP: priority}, "prio_tc": [...], "tc_tsa": [...]}; empty where it has none."""
    program = shutil.which("dcb")
    if program is None:
        return {}
    out: dict[str, Any] = {}
    for what in ("app", "ets"):
        argv = [program, "-j", what, "show", "dev", name]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=DCB_S)  # noqa: S603 - of iproute2
            answer = json.loads(done.stdout or "{}")
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
        if "dscp_prio" in answer:
            out["dscp"] = {int(dscp): int(priority) for dscp, priority in answer["dscp_prio"]}
        out |= {key: answer[key] for key in ("prio_tc", "tc_tsa", "tc_bw") if key in answer}
    return out


def _words(found: Mapping[str, Any]) -> str:
    if not found:
        return "dcb tells nothing"
    words = [
        ", ".join(f"DSCP {d} to priority {p}" for d, p in sorted(found.get("dscp", {}).items())) or "no DSCP mapped"
    ]
    if "prio_tc" in found:
        words.append("priorities 0-7 to classes " + " ".join(map(str, found["prio_tc"])))
    if "tc_tsa" in found:
        words.append("classes are " + " ".join(map(str, found["tc_tsa"])))
    return "; ".join(words)
