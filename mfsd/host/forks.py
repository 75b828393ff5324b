# SPDX-License-Identifier: Apache-2.0
"""Which process has forked which: the kernel's process events (include/uapi/linux/cn_proc.h, drivers/connector).

/proc shows who a process's parent is now. A child whose parent ends goes to init, so that of two forks one right after
the other, the first child gone, nothing can be told later. Events are read when somebody wants to know, not when they
come; what does not fit the buffer is lost, some thousand forks.

It needs CAP_NET_ADMIN, and the initial namespaces of pids, users and network; elsewhere nobody tells.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from typing import Final

from mfsd.host import netlink as nl

NETLINK_CONNECTOR: Final = 11
_PROC: Final = 1
"""CN_IDX_PROC, CN_VAL_PROC, and the multicast group."""
_LISTEN: Final = 1
"""PROC_CN_MCAST_LISTEN."""
_FORK: Final = 1
"""PROC_EVENT_FORK."""
_CONNECTOR: Final = struct.Struct("=IIIIHH")  # struct cn_msg: idx, val, seq, ack, len, flags
_EVENT: Final = struct.Struct("=I4x8xIIII")  # what, cpu, time, parent's pid and tgid, child's pid and tgid
_AT: Final = nl.HEADER.size + _CONNECTOR.size
_ROOM: Final = 1 << 20
SO_ATTACH_FILTER: Final = 26


class Forks:
    """Hears of forks while it is open. For one thread."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._tried = False

    def open(self) -> None:
        """Hear from now on, if the kernel lets us. Idempotent."""
        if self._tried:
            return
        self._tried = True
        with contextlib.ExitStack() as undo, contextlib.suppress(OSError):
            sock = undo.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_CONNECTOR))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, nl.SO_RCVBUFFORCE, _ROOM)
            _filter(sock)
            sock.bind((0, _PROC))
            body = _CONNECTOR.pack(_PROC, _PROC, 0, 0, 4, 0) + struct.pack("=I", _LISTEN)
            sock.send(nl.request(nl.NLMSG_DONE, 0, body))
            self._sock = sock
            undo.pop_all()

    def close(self) -> None:
        """Idempotent; may be opened again."""
        if self._sock is not None:
            self._sock.close()
        self._sock, self._tried = None, False

    def read(self) -> dict[int, int]:
        """Parent by child of the processes forked since the last call, oldest first."""
        born: dict[int, int] = {}
        while self._sock is not None:
            try:
                data = self._sock.recv(256)
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:  # some are lost; those that fit are still there
                    break
                continue
            if len(data) >= _AT + _EVENT.size:
                what, _, parent, _, child = _EVENT.unpack_from(data, _AT)
                if what == _FORK:
                    born[child] = parent
        return born


def _filter(sock: socket.socket) -> None:
    """Have the kernel keep new processes only: not the many other events, nor threads, whose tgid is another's."""
    load, equal, equal_x, to_x, give = 0x20, 0x15, 0x1D, 0x07, 0x06  # BPF_LD | W | ABS, BPF_JMP | JEQ | K, ...
    child = _AT + _EVENT.size - 8
    program = [
        (load, 0, 0, _AT), (equal, 0, 5, socket.htonl(_FORK)),  # loads are big-endian
        (load, 0, 0, child), (to_x, 0, 0, 0), (load, 0, 0, child + 4), (equal_x, 0, 1, 0),
        (give, 0, 0, 0xFFFF), (give, 0, 0, 0),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *op) for op in program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))
