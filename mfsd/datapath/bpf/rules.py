# SPDX-License-Identifier: Apache-2.0
"""Which connections the kernel puts into a band by itself: the tables behind bpf/sockets.bpf.c.

A rule is a row of ``mfsd_rules``; ``mfsd_rules_of`` leads from a peer's address to the rules that name it, and from the
address of all zeros to those that name none in particular. A rule is filled in before a list names it, and leaves the
lists before it is cleared, so the kernel never sees half of one.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import address_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.datapath.bpf.syscall import BpfMap
    from mfsd.ground.model import Address, Network, PortRange

NOBODY: Final = bytes(16)
_TOO_MANY: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Match:
    """What a connection must be like. None and -1 stand for any."""

    src: Address | None
    dst: Network | None
    sport: PortRange
    dport: PortRange
    pid: int = -1
    uid: int = -1
    tid: int = -1
    cgroup: int = 0
    asks: bool = False
    """Whose it is must be said by the daemon, which may not have looked at that process yet: the kernel tells of it."""

    @property
    def peer(self) -> bytes:
        """Key of the list that it stands in."""
        if self.dst is None or self.dst.num_addresses > 1:
            return NOBODY
        return address_bytes(self.dst.network_address)


def masked(network: Network | None) -> tuple[bytes, bytes]:
    """(address, mask) of 16 bytes each; IPv4 as IPv4-mapped."""
    if network is None:
        return NOBODY, NOBODY
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    mask = (((1 << bits) - 1) << (128 - bits)).to_bytes(16, "big")
    return address_bytes(network.network_address), mask


class Rules:
    """Rules in force, by what they match; the same match has one rule, however many ask for it."""

    def __init__(self, rows: npt.NDArray[Any], lists: BpfMap) -> None:
        """``rows``: shape (RULES,), RULE_DTYPE, the kernel's own memory."""
        self._rows = rows
        self._lists = lists
        self._free = list(range(len(rows) - 1, -1, -1))
        self._index: dict[Match, int] = {}
        self._of: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return len(self._index)

    def put(self, match: Match, band: int, lanes: int, expires_ns: int) -> bool:
        """Make a rule, or change where it leads. False when there is no room: then nobody matches."""
        band = _abi.BAND_KEEP if match.asks else band
        index = self._index.get(match)
        if index is not None:
            row = self._rows[index]
            row["band"], row["lanes"], row["expires_ns"] = band, lanes, expires_ns
            return True
        if not self._free:
            return False
        index = self._free.pop()
        row = np.zeros((), dtype=_abi.RULE_DTYPE)
        source = None if match.src is None else ipaddress.ip_network(match.src)
        for name, network in (("s", source), ("d", match.dst)):
            address, mask = masked(network)
            row[f"{name}addr"], row[f"{name}mask"] = np.frombuffer(address, "u1"), np.frombuffer(mask, "u1")
        row["sport_first"], row["sport_last"] = match.sport.first, match.sport.last
        row["dport_first"], row["dport_last"] = match.dport.first, match.dport.last
        row["pid"] = _abi.ANY_ID if match.pid < 0 else match.pid
        row["tid"] = _abi.ANY_ID if match.tid < 0 else match.tid
        row["uid"] = _abi.ANY_ID if match.uid < 0 else match.uid
        row["cgroup"], row["used"] = match.cgroup, 1
        row["band"], row["lanes"], row["expires_ns"] = band, lanes, expires_ns
        self._rows[index] = row
        self._index[match] = index
        self._of.setdefault(match.peer, []).append(index)
        self._publish(match.peer)
        return True

    def drop(self, match: Match) -> None:
        """Take a rule out of force. No error when there is none."""
        index = self._index.pop(match, None)
        if index is None:
            return
        self._of[match.peer].remove(index)
        self._publish(match.peer)
        self._rows[index] = np.zeros((), dtype=_abi.RULE_DTYPE)
        self._free.append(index)

    def _publish(self, peer: bytes) -> None:
        rules = self._of[peer]
        if not rules:
            del self._of[peer]
            self._lists.delete(peer)
            return
        entry = np.zeros((), dtype=_abi.RULES_OF_DTYPE)
        few = rules[: _abi.RULES_PER_PEER]
        entry["n"] = len(rules) if len(rules) == len(few) else _TOO_MANY
        entry["rule"][: len(few)] = few
        self._lists.update(peer, entry.tobytes())
