# SPDX-License-Identifier: Apache-2.0
"""bpf(2) itself, for hosts without libbpf: what the BCC loader needs to load a program and to use it.

The layouts are the members of union bpf_attr (include/uapi/linux/bpf.h); the kernel takes shorter ones than its own and
zero-fills the rest. See ``loader.BpfCalls`` for what the methods promise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path
from typing import Any, Final

from mfsd.datapath.errors import LoaderError

SYSCALL: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
"""__NR_bpf."""
MAP_CREATE: Final = 0
MAP_LOOKUP: Final = 1
MAP_UPDATE: Final = 2
MAP_DELETE: Final = 3
MAP_NEXT_KEY: Final = 4
PROG_LOAD: Final = 5
PROG_FD_BY_ID: Final = 13
INFO_BY_FD: Final = 15
PROG_QUERY: Final = 16
LINK_CREATE: Final = 28
LINK_UPDATE: Final = 29

_ATTR_BYTES: Final = 512
"""More than any kernel's union bpf_attr. Since 6.6 BPF_PROG_QUERY writes query.revision at offset 56 however short the
caller says its own is (bpf_mprog_query, kernel/bpf/mprog.c)."""
_SCHED_CLS: Final = 3
_QUERY_MAX: Final = 64
"""BPF_MPROG_MAX, include/linux/bpf_mprog.h."""
_INFO_NAME: Final = 64
"""Offset of name in struct bpf_prog_info; type is at 0, id at 4."""
_LOG_BYTES: Final = 1 << 20


class SyscallCalls:
    """bpf(2) commands without a library."""

    def __init__(self) -> None:
        """Raises LoaderError on machines whose number of the system call is not known here."""
        number = SYSCALL.get(platform.machine())
        if number is None:
            raise LoaderError("bpf(2)", f"its number on {platform.machine()} is unknown", "use the libbpf loader")
        self._number = number
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long

    def _call(self, command: int, attr: bytes) -> tuple[int, bytes]:
        """Raw result and the attributes as the kernel left them. Raises OSError."""
        buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES)
        result = self._libc.syscall(
            ctypes.c_long(self._number), ctypes.c_int(command), buffer, ctypes.c_uint(len(attr))
        )
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(result), buffer.raw[: len(attr)]

    # --- loading ------------------------------------------------------------------------------------------------------

    def map_create(self, kind: int, name: str, key_size: int, value_size: int, entries: int, flags: int) -> int:
        """Make a map; returns its descriptor."""
        attr = struct.pack(
            "=IIIIIII16s", kind, key_size, value_size, entries, flags, 0, 0, name.encode()[:15]
        )  # fmt: skip
        return self._call(MAP_CREATE, attr)[0]

    def prog_load(self, name: str, code: bytes, licence: str) -> int:
        """Have a SCHED_CLS program verified; returns its descriptor. Raises LoaderError with the verifier's words."""
        insns = ctypes.create_string_buffer(code, len(code))
        text = ctypes.create_string_buffer(licence.encode())

        def attr(log: int, size: int) -> bytes:
            return struct.pack(
                "=IIQQIIQII16s",
                _SCHED_CLS, len(code) // 8, ctypes.addressof(insns), ctypes.addressof(text),
                1 if log else 0, size, log, 0, 0, name.encode()[:15],
            )  # fmt: skip

        try:
            return self._call(PROG_LOAD, attr(0, 0))[0]
        except OSError as first:
            log = ctypes.create_string_buffer(_LOG_BYTES)  # a second time, for the log
            try:
                return self._call(PROG_LOAD, attr(ctypes.addressof(log), _LOG_BYTES))[0]
            except OSError:
                words = log.value.decode(errors="replace").strip().splitlines()
            if first.errno in (errno.EPERM, errno.EACCES) and not words:
                fix = "mfsd needs CAP_BPF and CAP_NET_ADMIN (AmbientCapabilities= in the unit)"
                raise LoaderError(f"loading {name}", str(first), fix) from first
            tail = "\n".join(words[-25:])
            fix = f"kernel {platform.release()} rejects the program; report this with the log"
            raise LoaderError(f"loading {name}", str(first), fix, tail) from first

    # --- loader.BpfCalls ----------------------------------------------------------------------------------------------

    def map_update(self, fd: int, key: bytes, value: bytes) -> None:
        """Insert or replace one element."""
        k, v = _buffer(key), _buffer(value)
        self._call(MAP_UPDATE, _element(fd, k, v))

    def map_delete(self, fd: int, key: bytes) -> None:
        """Delete one element; ENOENT if there is none."""
        k = _buffer(key)
        self._call(MAP_DELETE, _element(fd, k, None))

    def map_lookup(self, fd: int, key: bytes, size: int) -> bytes | None:
        """Value of one element, None if there is none."""
        k, v = _buffer(key), ctypes.create_string_buffer(size)
        return v.raw if self._found(MAP_LOOKUP, _element(fd, k, v)) else None

    def map_next_key(self, fd: int, key: bytes | None, size: int) -> bytes | None:
        """Key after ``key``, None at the end."""
        k, following = None if key is None else _buffer(key), ctypes.create_string_buffer(size)
        return following.raw if self._found(MAP_NEXT_KEY, _element(fd, k, following)) else None

    def _found(self, command: int, attr: bytes) -> bool:
        try:
            self._call(command, attr)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return False
            raise
        return True

    def possible_cpus(self) -> int:
        """Copies that a per-CPU map has of each value."""
        text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")
        return 1 + max(int(part.split("-")[-1]) for part in text.strip().split(","))

    def link_create(self, prog_fd: int, ifindex: int, attach_type: int, flags: int) -> int:
        """Attach a program by a link; returns the link's descriptor."""
        # prog_fd, target_ifindex, attach_type, flags; tcx: relative_fd, pad, expected_revision
        return self._call(LINK_CREATE, struct.pack("=IIIIIIQ", prog_fd, ifindex, attach_type, flags, 0, 0, 0))[0]

    def link_update(self, link_fd: int, prog_fd: int) -> None:
        """Replace the program of a link atomically."""
        self._call(LINK_UPDATE, struct.pack("=IIII", link_fd, prog_fd, 0, 0))

    def prog_query(self, ifindex: int, attach_type: int) -> list[int]:
        """Ids of the programs on a hook, in the order in which they run."""
        ids = (ctypes.c_uint32 * _QUERY_MAX)()
        # target_ifindex, attach_type, query_flags, attach_flags, prog_ids, count, pad
        attr = struct.pack("=IIIIQII", ifindex, attach_type, 0, 0, ctypes.addressof(ids), _QUERY_MAX, 0)
        _, raw = self._call(PROG_QUERY, attr)
        (count,) = struct.unpack_from("=I", raw, 24)
        return list(ids[:count])

    def prog_info(self, prog_id: int) -> tuple[str, int]:
        """Name and program type of a loaded program."""
        fd, _ = self._call(PROG_FD_BY_ID, struct.pack("=III", prog_id, 0, 0))
        try:
            info = self._info(fd)
        finally:
            os.close(fd)
        name = info[_INFO_NAME : _INFO_NAME + 16].split(b"\0", 1)[0].decode(errors="replace")
        return name, int.from_bytes(info[:4], "little")

    def prog_id(self, prog_fd: int) -> int:
        """Id of a loaded program."""
        return int.from_bytes(self._info(prog_fd)[4:8], "little")

    def _info(self, prog_fd: int) -> bytes:
        info = ctypes.create_string_buffer(_INFO_NAME + 16)
        self._call(INFO_BY_FD, struct.pack("=IIQ", prog_fd, len(info), ctypes.addressof(info)))
        return info.raw


def _buffer(data: bytes) -> Any:
    return ctypes.create_string_buffer(data, len(data))


def _element(fd: int, key: Any, value: Any) -> bytes:
    """map_fd, pad, key, value or next_key, flags."""
    pointers = (0 if b is None else ctypes.addressof(b) for b in (key, value))
    return struct.pack("=IIQQQ", fd, 0, *pointers, 0)
