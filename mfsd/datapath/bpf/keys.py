# SPDX-License-Identifier: Apache-2.0
"""Keys that lead from a packet to its row of the slot table: socket cookies and 5-tuples.

Order matters when rows are taken and freed (see bpf/mfsd.h): fill the row first and add its key last; delete the keys
first and free the row last.
"""

from __future__ import annotations

import errno
import ipaddress
from typing import TYPE_CHECKING, Final

from mfsd.datapath import _abi
from mfsd.datapath.bpf.syscall import BpfMap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.ground.model import Address, Endpoints

V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_TUPLE_PAD: Final = bytes(_abi.TUPLE_DTYPE.fields["pad"][0].itemsize)  # type: ignore[index]  # it has fields


class MapFullError(RuntimeError):
    """No room for another key. Can't happen while there is at most one key of a kind per row."""


class KeyMap:
    """One of the two key maps: key -> row. Every method is one bpf(2) call unless it says otherwise (about 1 us)."""

    def __init__(self, fd: int, key_size: int) -> None:
        self.key_size = key_size
        self._map = BpfMap(fd, key_size, 4)

    def add(self, key: bytes, row: int) -> None:
        """Insert a key, or point it to another row. Raises MapFullError, OSError, ValueError (its size)."""
        try:
            self._map.update(key, row.to_bytes(4, "little"))
        except OSError as e:
            raise _full(e) from e

    def delete(self, key: bytes) -> bool:
        """Delete a key; False if it wasn't there. Raises OSError."""
        try:
            self._map.delete(key)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return False
            raise
        return True

    def get(self, key: bytes) -> int | None:
        """Row of a key, None if it isn't there. Raises OSError."""
        value = self._map.lookup(key)
        return None if value is None else int.from_bytes(value, "little")

    def __iter__(self) -> Iterator[bytes]:
        """All keys, one call each. Complete only if nobody deletes meanwhile (the kernel then starts over)."""
        key: bytes | None = None
        while (key := self._map.next_key(key)) is not None:
            yield key


def cookie_key(cookie: int) -> bytes:
    """Key of a socket cookie (SO_COOKIE, 64 bits). Raises OverflowError when it doesn't fit."""
    return cookie.to_bytes(8, "little")


def address_bytes(address: Address) -> bytes:
    """16 bytes of an address; IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    return V4_MAPPED + address.packed if isinstance(address, ipaddress.IPv4Address) else address.packed


def address_of(raw: bytes) -> Address:
    """Undo address_bytes."""
    return ipaddress.ip_address(raw[12:] if raw[:12] == V4_MAPPED else raw)


def tuple_key(endpoints: Endpoints) -> bytes:
    """Key of a connection as its packets leave the device (``struct mfsd_tuple``)."""
    return b"".join(
        (
            address_bytes(endpoints.src),
            address_bytes(endpoints.dst),
            endpoints.sport.to_bytes(2, "big"),
            endpoints.dport.to_bytes(2, "big"),
            endpoints.protocol.to_bytes(1, "little"),
            _TUPLE_PAD,
        )
    )


def _full(e: OSError) -> Exception:
    """E2BIG of a hash map means that it is full; anything else stays what it is."""
    return MapFullError("the key map is full; raise the number of slots") if e.errno == errno.E2BIG else e
