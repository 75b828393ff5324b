# SPDX-License-Identifier: Apache-2.0
"""Which daemon answers for which address: from the configuration, and from DNS again and again."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.ground.units import host_port

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mfsd.ground.model import Address, Network

LOOK_UP_S: Final = 10.0
"""How often names are looked up."""
KEPT_S: Final = 60.0
"""How long an address counts that its name has stopped to stand for: a headless service drops pods that restart, or
that send their last bytes."""
PEERS_MAX: Final = 256
"""Each has a connection and two threads."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One daemon."""

    address: Address
    port: int
    name: str
    """What its certificate must say; empty: its address."""

    @property
    def target(self) -> str:
        """For gRPC."""
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{'ipv6' if self.address.version == 6 else 'ipv4'}:{host}:{self.port}"

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """Of a channel to it."""
        return (("grpc.ssl_target_name_override", self.name),) if self.name else ()


@dataclass(slots=True)
class Table:
    """See the module. ``look_up`` waits for DNS; the rest does not, and is for one thread."""

    entries: tuple[str, ...]
    peers: dict[Address, Peer] = field(default_factory=dict)
    """By the address that they send from."""
    networks: list[tuple[Network, Peer]] = field(default_factory=list)
    named: dict[Peer, float] = field(default_factory=dict)
    """When somebody was last found under the name that leads to it."""
    problems: list[str] = field(default_factory=list)
    """Names that can't be looked up, in words."""

    def of(self, address: Address) -> Peer | None:
        """Whose daemon it is; None: nobody's that we know."""
        found = self.peers.get(address)
        if found is None:
            found = next((p for network, p in self.networks if address in network), None)
        return found

    def sends(self, host: Address, address: Address) -> bool:
        """The host at an address has that other one, too."""
        return host == address or any(p.address == host and address in network for network, p in self.networks)

    def look_up(self, now: float, connected: Collection[Peer] = ()) -> Table:
        """The same with what names stand for now; what could not be looked up stays as it was.

        So does, for KEPT_S, who is not named any more, and for as long as there is a connection to it.
        """
        out = Table(self.entries)
        for entry in self.entries:
            place, *networks = entry.split()
            host, port = host_port(place)
            try:
                found = list(_addresses(host, port))
            except OSError as e:
                out.problems.append(f"relay.peers: {host} can't be looked up: {e.strerror or e}")
                found = [a for a, p in self.peers.items() if p.name == host]
            for address in found[: PEERS_MAX - len(out.peers)]:
                peer = out.peers[address] = Peer(address, port, "" if str(address) == host else host)
                out.networks += [(ipaddress.ip_network(n), peer) for n in networks]
                out.named[peer] = now
        for peer, at in self.named.items():
            if (
                peer.address not in out.peers
                and len(out.peers) < PEERS_MAX
                and (now < at + KEPT_S or peer in connected)
            ):
                out.peers[peer.address], out.named[peer] = peer, at
                out.networks += [(n, p) for n, p in self.networks if p == peer]
        out.networks.sort(key=lambda n: -n[0].prefixlen)
        return out


def _addresses(host: str, port: int) -> Iterable[Address]:
    seen: dict[Address, None] = {}
    for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if family in (socket.AF_INET, socket.AF_INET6):
            seen[ipaddress.ip_address(str(place[0]).partition("%")[0])] = None
    return seen
