# SPDX-License-Identifier: Apache-2.0
"""The two hosts of the vLLM experiment: a prefill host that sends, a decode host that pulls, and who governs the link.

With mfsd both have a daemon, as they must where KV is pulled: decode's hands its workers' hints on to prefill's, with
certificates that are made for the run. The contended link is the egress of the prefill host.
"""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.ground.units import Rate
from mfsd.lab.hosts.certificates import Authority
from mfsd.lab.hosts.governor import Governor
from mfsd.lab.hosts.net import DEVICE, Fabric, plain_link, remove_link, tool
from mfsd.lab.hosts.tcp import CONGESTION, EFFICIENCY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

RATE: Final = Rate.parse("200mbit")
PAYLOAD: Final = RATE.bytes_per_s * EFFICIENCY
"""Bytes/s that a TCP stream gets of the link when it has it to itself."""
PREFILL, DECODE = "p0", "d0"
PACKET: Final = 8 << 10
"""Bytes that a packet has before it is segmented, at most. With round trips as short as here TCP makes it 64 KiB,
which take 2.6 ms of this link, a quarter of an exchange; of one of 25 Gbit/s they take 20 us."""
RELAY_PORT: Final = 5731
UCX_PORTS: Final = "20000-20099"
EXCHANGES: Final = (30_000, 30_099)
"""Local ports of connections that carry collectives."""
STORES: Final = (31_000, 31_099)
"""And of those that write to a store."""
RULES: Final[Mapping[str, Any]] = {
    "rules": {"library": ["vllm-nixl"]},
    "rule": [
        {"name": "exchanges", "stage": "collective", "local_ports": f"{EXCHANGES[0]}-{EXCHANGES[1]}"},
        {"name": "stores", "stage": "background", "local_ports": f"{STORES[0]}-{STORES[1]}"},
    ],
}
"""What an operator writes. KV, as the shipped rules have it; the others by port, since they are not real programs."""


class Arm(enum.StrEnum):
    """Who governs the link, and what is known."""

    PLAIN = "plain"
    RULES = "rules"
    CONNECTOR = "connector"

    @property
    def words(self) -> str:
        """For people."""
        return {"plain": "plain TCP", "rules": "rules only", "connector": "rules and connector"}[self.value]


class World:
    """Namespaces, certificates and a folder. A context manager; everything goes with it. Raises LabError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fabric = Fabric([PREFILL, DECODE])
        self._papers: dict[str, Mapping[str, str]] = {}

    def __enter__(self) -> Self:
        authority = Authority(self.folder / "papers")
        self.fabric.__enter__()
        try:
            for host in self.fabric.hosts.values():
                self._papers[host.name] = authority.papers(host.name, host.address).settings
                # Of the transports' own sockets: the namespace's default may not be set by sysctl.
                words = f"route replace 10.77.0.0/24 dev {DEVICE} proto kernel scope link src {host.address}"
                tool("ip", "-n", host.namespace, *words.split(), "congctl", CONGESTION)
                tool("ip", "-n", host.namespace, "link", "set", DEVICE, "gso_max_size", str(PACKET))
        except BaseException:
            self.fabric.remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.fabric.__exit__(*exc)

    @contextlib.contextmanager
    def governed(self, arm: Arm) -> Iterator[dict[str, Governor]]:
        """The link under an arm; yields the daemons by host, none for plain TCP."""
        prefill = self.fabric.hosts[PREFILL]
        if arm is Arm.PLAIN:
            plain_link(prefill, RATE)
            try:
                yield {}
            finally:
                remove_link(prefill)
            return
        place = f"{prefill.address}:{RELAY_PORT}"
        relay: dict[str, dict[str, Any]] = {PREFILL: {"listen": place, "allow": [DECODE]}, DECODE: {"peers": [place]}}
        with contextlib.ExitStack() as stack:
            governors = {}
            for name, section in relay.items():
                rules: Mapping[str, Any] = RULES if name == PREFILL else {}
                tables = {**rules, "relay": {**section, **self._papers[name]}}
                governor = Governor(self.fabric.hosts[name], self.folder / arm.value, RATE, tables)
                governors[name] = stack.enter_context(governor)
            yield governors
