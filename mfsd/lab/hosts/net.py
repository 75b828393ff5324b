# SPDX-License-Identifier: Apache-2.0
"""Hosts and links of a lab: network namespaces around a switch.

Namespaces are called ``mfsd-<run>-<host>``; ``<run>`` names the process that owns them (its pid and start time), so
that the next run can tell what a killed one has left behind. Everything lives inside them - veths, addresses, qdiscs,
sysctls - and goes with them; the machine's own devices and settings are not touched.

    host p0 [eth0] ---- [p0]                [d0] ---- [eth0] host d0
                            switch (bridge)
    host p1 [eth0] ---- [p1]

The contended link of a host is the egress of its eth0; the switch forwards at the speed of memory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from mfsd.lab.hosts.enter import NETNS_DIR, inside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.ground.units import Rate

DEVICE: Final = "eth0"
SWITCH: Final = "switch"
BRIDGE: Final = "br0"
_HOST_RE: Final = re.compile(r"[a-z][a-z0-9]{0,10}")
_OURS_RE: Final = re.compile(r"mfsd-(?P<pid>\d+)x(?P<start>[0-9a-f]+)-[a-z0-9]+")
_NET: Final = int(IPv4Address("10.77.0.0"))

TCP_SYSCTLS: Final[Mapping[str, str]] = {
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
}
"""What every host of a lab has: no memory of earlier connections, and windows that survive a pause.

The congestion control is set per socket (tcp.py): a namespace may only take one that the machine allows to all."""
RTO_MIN: Final = "net/ipv4/tcp_rto_min_us"
"""Since Linux 6.11; the receiver's delayed ACKs follow it, so set it at both ends or not at all."""
RTO_MIN_US: Final = 5000
"""What the labs' hosts have there unless told otherwise."""


class LabError(RuntimeError):
    """The lab can't be built; the text names what is missing."""


def run_id() -> str:
    """Name of this process's namespaces."""
    return f"{os.getpid()}x{_start(os.getpid()):x}"


def _start(pid: int) -> int:
    """Start time of a process in clock ticks since boot, which tells it from a later one of its pid; 0: none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])  # field 22, proc_pid_stat(5)


def tool(*command: str, stdin: str | None = None) -> str:
    """Run ip or tc and return what it prints. Raises LabError with its complaint."""
    path = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin")
    if path is None:
        raise LabError(f"{command[0]} is not installed; on Debian: apt-get install iproute2")
    done = subprocess.run([path, *command[1:]], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def batch(program: str, namespace: str, lines: Sequence[str]) -> None:
    """Have ip or tc do all of these in a namespace, up to the first that fails. Raises LabError."""
    tool(program, "-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")


def remove_stale() -> list[str]:
    """Remove namespaces whose owner is dead. Returns their names. Those of living owners, and all others, stay."""
    removed = []
    for name in sorted(p.name for p in NETNS_DIR.glob("mfsd-*")):
        match = _OURS_RE.fullmatch(name)
        if match is None:
            continue
        if _start(int(match["pid"])) != int(match["start"], 16):
            tool("ip", "netns", "del", name)
            removed.append(name)
    return removed


@dataclass(frozen=True, slots=True)
class Host:
    """One host: its namespace and the address of its eth0."""

    name: str
    namespace: str
    address: str


@dataclass(slots=True)
class Fabric:
    """The hosts named, joined by a switch. A context manager: entering builds, leaving removes.

    ``sysctls`` (path below /proc/sys -> value) are set in every host; those in ``optional`` only where the kernel has
    them. Raises LabError without root or iproute2.
    """

    names: Sequence[str]
    sysctls: Mapping[str, str] = field(default_factory=lambda: dict(TCP_SYSCTLS))
    optional: Mapping[str, str] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    applied: dict[str, str] = field(default_factory=dict)
    """Sysctls in force in the hosts."""
    _made: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _build(self) -> None:
        if os.geteuid() != 0:
            raise LabError("the lab makes network namespaces and needs root")
        bad = [n for n in self.names if not _HOST_RE.fullmatch(n) or n == SWITCH]
        if bad or len(set(self.names)) != len(self.names) or len(self.names) > 200:
            raise LabError(
                f"host names {bad or list(self.names)}: lower-case letters and digits, 11 at most, once each"
            )
        remove_stale()
        run = run_id()
        switch = f"mfsd-{run}-{SWITCH}"
        self._add(switch)
        lines = [f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up", "link set lo up"]
        for i, name in enumerate(self.names):
            host = Host(name, f"mfsd-{run}-{name}", str(IPv4Address(_NET + i + 1)))
            self._add(host.namespace)
            self.hosts[name] = host
            lines.append(f"link add name {name} type veth peer name {DEVICE} netns {host.namespace}")
            lines.append(f"link set dev {name} master {BRIDGE} up")
        batch("ip", switch, lines)
        for host in self.hosts.values():
            lines = ["link set lo up", f"addr add {host.address}/24 dev {DEVICE}", f"link set {DEVICE} up"]
            batch("ip", host.namespace, lines)
            self._configure(host)

    def _add(self, namespace: str) -> None:
        self._made.append(namespace)
        tool("ip", "netns", "add", namespace)

    def _configure(self, host: Host) -> None:
        with inside(host.namespace):
            for name, value in {**self.sysctls, **self.optional}.items():
                path = Path("/proc/sys") / name
                if not path.exists() and name in self.optional:
                    continue
                try:
                    path.write_text(value)
                except OSError as e:
                    raise LabError(f"sysctl {name.replace('/', '.')} = {value}: {e.strerror}") from e
                self.applied[name.replace("/", ".")] = value

    def remove(self) -> None:
        """Remove what was made. Idempotent; goes on after an error and raises the first in the end."""
        first: Exception | None = None
        while self._made:
            namespace = self._made.pop()
            if not (NETNS_DIR / namespace).exists():
                continue
            try:
                tool("ip", "netns", "del", namespace)
            except LabError as e:
                first = first or e
        self.hosts.clear()
        if first is not None:
            raise first


def htb_shape(rate: Rate) -> str:
    """What tc wants to hear, after the guaranteed rate, of an htb class that may use the whole link.

    Burst and quantum are those of mfsd's own htb tree, so that both differ in scheduling alone.
    """
    burst = max(65536, int(rate.bytes_per_s) // 1000)
    return f"ceil {int(rate.bits_per_s)}bit burst {burst} cburst {burst} quantum 65536"


def plain_link(host: Host, rate: Rate) -> None:
    """Pace a host's egress with one htb class and one FIFO: what TCP makes of a link that nobody governs."""
    lines = [
        f"qdisc replace dev {DEVICE} root handle 1: htb default 1",
        f"class add dev {DEVICE} parent 1: classid 1:1 htb rate {int(rate.bits_per_s)}bit {htb_shape(rate)}",
        f"qdisc add dev {DEVICE} parent 1:1 handle 10: pfifo limit 1000",
    ]
    batch("tc", host.namespace, lines)


def remove_link(host: Host) -> None:
    """Take the root qdisc off a host's egress; the kernel's default returns."""
    tool("tc", "-n", host.namespace, "qdisc", "del", "dev", DEVICE, "root")
