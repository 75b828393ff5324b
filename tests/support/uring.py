# SPDX-License-Identifier: Apache-2.0
"""io_uring by its system calls, as much of it as it takes to make a socket and to send on it (io_uring(7))."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from typing import Final, Self

# The same on every architecture but alpha (include/uapi/asm-generic/unistd.h).
SETUP: Final = 425
ENTER: Final = 426
# include/uapi/linux/io_uring.h
SQPOLL: Final = 2
"""A thread of the kernel's takes what is submitted, and sends it."""
CONNECT: Final = 16
SEND: Final = 26
SOCKET: Final = 45
SEND_ZC: Final = 47
_GETEVENTS: Final = 1
_SQ_WAKEUP: Final = 2
_MORE: Final = 2
_SQES: Final = 0x10000000
_PARAMS: Final = 120
_ENTRY: Final = struct.Struct("=BBHiQQIIQ24x")
_TAKEN: Final = struct.Struct("=QiI")


class Ring:
    """One request at a time. Raises OSError where io_uring is not to be had."""

    def __init__(self, flags: int = 0) -> None:
        params = ctypes.create_string_buffer(struct.pack("=IIII", 0, 0, flags, 0), _PARAMS)
        self._polled = bool(flags & SQPOLL)
        self._fd = _call(SETUP, 8, params)
        entries, _ = struct.unpack_from("=2I", params, 0)
        _, self._tail, mask, *_, self._array, _ = struct.unpack_from("=8I", params, 40)
        self._head, self._end, _, _, _, self._cqes, _, _ = struct.unpack_from("=8I", params, 80)
        size = max(self._array + 4 * entries, self._cqes + 2 * entries * _TAKEN.size)
        self._rings = mmap.mmap(self._fd, size, mmap.MAP_SHARED)
        self._sqes = mmap.mmap(self._fd, entries * _ENTRY.size, mmap.MAP_SHARED, offset=_SQES)
        self._mask, self._cq_mask = self._word(mask), 2 * entries - 1

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("=I", self._rings, at)[0])

    def do(self, operation: int, fd: int, address: int = 0, length: int = 0, more: int = 0) -> int:
        """Submit one request and wait for what comes of it. Raises OSError."""
        tail = self._word(self._tail)
        slot = tail & self._mask
        _ENTRY.pack_into(self._sqes, slot * _ENTRY.size, operation, 0, 0, fd, more, address, length, 0, 1)
        struct.pack_into("=I", self._rings, self._array + 4 * slot, slot)
        struct.pack_into("=I", self._rings, self._tail, tail + 1)
        flags = _GETEVENTS | (_SQ_WAKEUP if self._polled else 0)
        _call(ENTER, self._fd, 0 if self._polled else 1, 1, flags, None, 0)
        result, told = self._next()
        if told & _MORE:
            self._next()  # the kernel has no more need of the memory
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def _next(self) -> tuple[int, int]:
        while (head := self._word(self._head)) == self._word(self._end):
            _call(ENTER, self._fd, 0, 1, _GETEVENTS, None, 0)
        _, result, flags = _TAKEN.unpack_from(self._rings, self._cqes + (head & self._cq_mask) * _TAKEN.size)
        struct.pack_into("=I", self._rings, self._head, head + 1)
        return result, flags

    def connect(self, address: str, port: int) -> socket.socket:
        """A connection whose socket the ring has made."""
        sock = socket.socket(fileno=self.do(SOCKET, socket.AF_INET, more=socket.SOCK_STREAM))
        raw = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, socket.inet_aton(address))
        kept = ctypes.create_string_buffer(raw, len(raw))
        self.do(CONNECT, sock.fileno(), ctypes.addressof(kept), more=len(raw))
        return sock

    def send(self, operation: int, sock: socket.socket, size: int) -> None:
        """So many bytes, by SEND or SEND_ZC."""
        data = ctypes.create_string_buffer(size)
        sent = 0
        while sent < size:
            sent += self.do(operation, sock.fileno(), ctypes.addressof(data) + sent, size - sent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._rings.close()
        self._sqes.close()
        os.close(self._fd)


def _call(number: int, *arguments: object) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
