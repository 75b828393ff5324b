# SPDX-License-Identifier: Apache-2.0
"""Ethernet frames by hand, and a plain reading of them that the classifier is compared with.

The reader is written from the RFCs, not from the C source: it slices bytes and raises on what isn't there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from mfsd.datapath.bpf.keys import tuple_key
from mfsd.ground.model import Endpoints

if TYPE_CHECKING:
    from mfsd.ground.model import Address

SRC4, DST4 = "10.0.0.1", "10.0.0.2"
SRC6, DST6 = "fd00::1", "fd00::2"
SPORT, DPORT = 40001, 5001
TCP, UDP = 6, 17
HOPOPTS, ROUTING, FRAGMENT, ICMP6, DSTOPTS = 0, 43, 44, 58, 60
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << i for i in range(8))
TYPE_IP4, TYPE_IP6, TYPE_ARP, TYPE_VLAN, TYPE_QINQ = 0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8
MAX_EXTENSIONS: Final = 4
"""What classifier.bpf.c promises to step over."""


def shortest(frame: bytes) -> int:
    """Bytes of a frame that BPF_PROG_TEST_RUN wants at least; behind a tag it lets everything pass."""
    return {TYPE_IP4: 34, TYPE_IP6: 54}.get(int.from_bytes(frame[12:14], "big"), 15)


def eth(ethertype: int, payload: bytes, vlans: tuple[int, ...] = ()) -> bytes:
    """Ethernet header; ``vlans`` are the tag types, outermost first."""
    kinds = [*vlans, ethertype]
    tags = b"".join(struct.pack("!HH", 100 + i, kind) for i, kind in enumerate(kinds[1:]))
    return bytes.fromhex("020000000002020000000001") + struct.pack("!H", kinds[0]) + tags + payload


def checksum(header: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ip4(
    proto: int,
    payload: bytes,
    *,
    src: str = SRC4,
    dst: str = DST4,
    tos: int = 0,
    options: bytes = b"",
    frag: int = 0,
    more: bool = False,
) -> bytes:
    """IPv4 packet with a right checksum; ``frag`` in units of 8 bytes."""
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | (5 + len(options) // 4), tos, 20 + len(options) + len(payload), 7,
        (0x2000 if more else 0) | frag, 64, proto, 0, ip_address(src).packed, ip_address(dst).packed,
    ) + options  # fmt: skip
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def ip6(proto: int, payload: bytes, *, src: str = SRC6, dst: str = DST6, tclass: int = 0) -> bytes:
    """IPv6 packet; ``payload`` includes extension headers."""
    word = 6 << 28 | tclass << 20 | 0xABCDE
    return (
        struct.pack("!IHBB", word, len(payload), proto, 64) + ip_address(src).packed + ip_address(dst).packed + payload
    )


def options6(following: int, units: int = 0) -> bytes:
    """Hop-by-hop or destination options of 8 + 8 * units bytes, all padding (PadN)."""
    return struct.pack("!BBBB", following, units, 1, 4 + 8 * units) + bytes(4 + 8 * units)


def fragment6(following: int, offset: int = 0, *, more: bool = False) -> bytes:
    """Fragment header; ``offset`` in units of 8 bytes."""
    return struct.pack("!BBHI", following, 0, offset << 3 | more, 99)


def tcp(payload: bytes = b"", *, flags: int = ACK, options: bytes = b"", seq: int = 1) -> bytes:
    """TCP segment; checksum left 0, nobody looks."""
    offset = (5 + len(options) // 4) << 4
    return struct.pack("!HHIIBBHHH", SPORT, DPORT, seq % 2**32, 1, offset, flags, 64, 0, 0) + options + payload


def udp(payload: bytes = b"") -> bytes:
    """UDP datagram."""
    return struct.pack("!HHHH", SPORT, DPORT, 8 + len(payload), 0) + payload


def frame4(payload: bytes = bytes(100), *, vlans: tuple[int, ...] = (), **kwargs: object) -> bytes:
    """IPv4 TCP frame with data, long enough to be no control packet unless ``payload`` says otherwise."""
    return eth(TYPE_IP4, ip4(TCP, tcp(payload), **kwargs), vlans)  # type: ignore[arg-type]  # passed through


def frame6(payload: bytes = bytes(100), *, vlans: tuple[int, ...] = (), **kwargs: object) -> bytes:
    """IPv6 TCP frame with data."""
    return eth(TYPE_IP6, ip6(TCP, tcp(payload), **kwargs), vlans)  # type: ignore[arg-type]  # passed through


def key4(protocol: int = TCP) -> bytes:
    """Tuple key of the default IPv4 frame."""
    return tuple_key(Endpoints(ip_address(SRC4), SPORT, ip_address(DST4), DPORT, protocol))


def key6(protocol: int = TCP) -> bytes:
    """Tuple key of the default IPv6 frame."""
    return tuple_key(Endpoints(ip_address(SRC6), SPORT, ip_address(DST6), DPORT, protocol))


# --- the other reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """What a reader finds in a frame."""

    endpoints: Endpoints | None = None
    """None where there are no ports."""
    later_fragment: bool = False
    pure_ack: bool = False


class CutShort(Exception):  # noqa: N818 - not an error of anybody, it is what the reader found
    """Not IP, or its headers end early."""


def take(data: bytes, start: int, size: int) -> bytes:
    """Slice that must be there."""
    if start + size > len(data):
        raise CutShort
    return data[start : start + size]


def read(frame: bytes) -> Seen:
    """Read a frame as the classifier should. Raises CutShort."""
    kind, at = int.from_bytes(take(frame, 12, 2), "big"), 14
    for _ in range(2):
        if kind in (TYPE_VLAN, TYPE_QINQ):
            kind, at = int.from_bytes(take(frame, at + 2, 2), "big"), at + 4
    if kind == TYPE_IP4:
        return _read4(frame, at)
    if kind == TYPE_IP6:
        return _read6(frame, at)
    raise CutShort


def _read4(frame: bytes, at: int) -> Seen:
    head = take(frame, at, 20)
    size = head[0] % 16 * 4
    if head[0] // 16 != 4 or size < 20:
        raise CutShort
    take(frame, at, size)
    offset, more = int.from_bytes(head[6:8], "big") & 0x1FFF, bool(head[6] & 0x20)
    if offset:
        return Seen(later_fragment=True)
    end = at + int.from_bytes(head[2:4], "big")
    addresses = (ip_address(head[12:16]), ip_address(head[16:20]))
    return _ports(frame, at + size, end, head[9], addresses, fragment=more)


def _read6(frame: bytes, at: int) -> Seen:
    head = take(frame, at, 8)
    if head[0] // 16 != 6:
        raise CutShort
    addresses = (ip_address(take(frame, at + 8, 16)), ip_address(take(frame, at + 24, 16)))
    proto, l4, fragment = head[6], at + 40, False
    for _ in range(MAX_EXTENSIONS):
        if proto not in (HOPOPTS, DSTOPTS, FRAGMENT):
            break
        ext = take(frame, l4, 8)
        if proto == FRAGMENT:
            field = int.from_bytes(ext[2:4], "big")
            if field >> 3:
                return Seen(later_fragment=True)
            fragment |= bool(field & 1)
        l4 += 8 if proto == FRAGMENT else 8 + 8 * ext[1]
        proto = ext[0]
    end = at + 40 + int.from_bytes(head[4:6], "big")
    return _ports(frame, l4, end, proto, addresses, fragment=fragment)


def _ports(frame: bytes, l4: int, end: int, proto: int, addresses: tuple[Address, Address], *, fragment: bool) -> Seen:
    if proto not in (TCP, UDP):
        return Seen()
    sport, dport = struct.unpack("!HH", take(frame, l4, 4))
    pure_ack = False
    if proto == TCP and not fragment and l4 + 14 <= len(frame) and len(frame) <= 14 + 8 + 40 + 64 + 60:
        size, flags = frame[l4 + 12] // 16 * 4, frame[l4 + 13]
        pure_ack = flags & ~(PSH | ECE | CWR) == ACK and l4 + size == end
    return Seen(Endpoints(addresses[0], sport, addresses[1], dport, proto), False, pure_ack)
