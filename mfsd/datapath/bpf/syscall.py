# SPDX-License-Identifier: Apache-2.0
"""bpf(2): everything that is asked of the kernel once an object is loaded, and loading where there is no object.

No library is needed. The layouts are the members of union bpf_attr (include/uapi/linux/bpf.h); the kernel takes shorter
ones than its own and zero-fills the rest. Everything here raises OSError with the kernel's errno unless it says
otherwise, and LoaderError on a machine whose number of the system call is not known here.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    import numpy.typing as npt

SYSCALL: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
    "s390x": 351,
}
"""__NR_bpf by machine."""

# enum bpf_cmd
MAP_CREATE: Final = 0
MAP_LOOKUP: Final = 1
MAP_UPDATE: Final = 2
MAP_DELETE: Final = 3
MAP_NEXT_KEY: Final = 4
PROG_LOAD: Final = 5
PROG_TEST_RUN: Final = 10
PROG_FD_BY_ID: Final = 13
INFO_BY_FD: Final = 15
PROG_QUERY: Final = 16
MAP_LOOKUP_BATCH: Final = 24
LINK_CREATE: Final = 28
LINK_UPDATE: Final = 29
ITER_CREATE: Final = 33
LINK_DETACH: Final = 34

SCHED_CLS: Final = 3
"""BPF_PROG_TYPE_SCHED_CLS."""

# Members of union bpf_attr, each up to its last field that is used here.
MAP_ATTR: Final = struct.Struct("=IIIIIII16s")
"""map_type, key_size, value_size, max_entries, map_flags, inner_map_fd, numa_node, map_name."""
ELEMENT_ATTR: Final = struct.Struct("=IIQQQ")
"""map_fd, pad, key, value or next_key, flags."""
PROG_ATTR: Final = struct.Struct("=IIQQIIQII16s")
"""prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags, prog_name."""
BATCH_ATTR: Final = struct.Struct("=QQQQIIQQ")
"""batch: in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags."""
RUN_ATTR: Final = struct.Struct("=IIIIQQIIIIQQ")
"""test: prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration, ctx_size_in, ctx_size_out,
ctx_in, ctx_out."""
INFO_ATTR: Final = struct.Struct("=IIQ")
"""info: bpf_fd, info_len, info."""
QUERY_ATTR: Final = struct.Struct("=IIIIQII")
"""query: target_ifindex, attach_type, query_flags, attach_flags, prog_ids, prog_cnt, pad."""
LINK_ATTR: Final = struct.Struct("=IIII")
"""link_create: prog_fd, target_ifindex or target_fd, attach_type, flags. What depends on the type is left zero."""
UPDATE_ATTR: Final = struct.Struct("=IIII")
"""link_update: link_fd, new_prog_fd, flags, old_prog_fd."""

_ATTR_BYTES: Final = 512
"""More than any kernel's union bpf_attr. Since 6.6 BPF_PROG_QUERY writes query.revision at offset 56 however short the
caller says its own is (bpf_mprog_query, kernel/bpf/mprog.c)."""
_DELETE_BYTES: Final = 16
"""Of ELEMENT_ATTR, up to the key; there must be no value."""
_QUERY_MAX: Final = 64
"""BPF_MPROG_MAX, include/linux/bpf_mprog.h."""
_INFO: Final = struct.Struct("=II56x16s")
"""Beginning of struct bpf_prog_info: type, id, name."""
_LINK_INFO: Final = struct.Struct("=IIIII")
"""Beginning of struct bpf_link_info: type, id, prog_id, pad, tcx.ifindex."""
_PAGE: Final = 4096
_LOG_BYTES: Final = 1 << 20

# Without argument types ctypes passes an int as a C int and what byref() made as it is, in half the time.
_syscall: Final = ctypes.CDLL(None, use_errno=True).syscall
_quick: Final = ctypes.PyDLL(None, use_errno=True).syscall
"""Keeps the interpreter's lock meanwhile: for calls that never wait and take less time than giving it away."""


@functools.cache
def number() -> int:
    """__NR_bpf of this machine. Raises LoaderError when it is not known here."""
    found = SYSCALL.get(platform.machine())
    if found is None:
        raise LoaderError("bpf(2)", f"its number on {platform.machine()} is unknown", f"known are {', '.join(SYSCALL)}")
    return found


def call(command: int, attr: bytes) -> tuple[int, bytes]:
    """One command: its result, and the attributes as the kernel left them."""
    buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES)
    result = int(_syscall(number(), command, buffer, len(attr)))
    if result < 0:
        raise _error()
    return result, buffer.raw[: len(attr)]


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


# --- maps -------------------------------------------------------------------------------------------------------------


def map_create(kind: int, name: str, key_size: int, value_size: int, entries: int, flags: int = 0) -> int:
    """Make a map of any type (enum bpf_map_type); returns its descriptor. Sizes are in bytes."""
    attr = MAP_ATTR.pack(kind, key_size, value_size, entries, flags, 0, 0, name.encode()[:15])
    return call(MAP_CREATE, attr)[0]


class BpfMap:
    """Elements of one map. The descriptor stays the caller's. May be shared by threads.

    ``value_size`` is of one copy in bytes; for per-CPU maps give that of all copies (see possible_cpus), each rounded
    up to 8. Keys and values of other sizes are refused (ValueError), since the kernel would read or write beyond them.
    """

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        self.fd = fd
        self.key_size = key_size
        self._number = number()
        self._memory = _Memory(fd, key_size, value_size)

    def update(self, key: bytes, value: bytes) -> None:
        """Insert or replace one element."""
        to_key, to_value, attr = self._memory.parts
        to_key[:] = key
        to_value[:] = value
        if _quick(self._number, MAP_UPDATE, attr, ELEMENT_ATTR.size) < 0:
            raise _error()

    def delete(self, key: bytes) -> None:
        """Delete one element; ENOENT if there is none."""
        to_key, _, attr = self._memory.parts
        to_key[:] = key
        if _quick(self._number, MAP_DELETE, attr, _DELETE_BYTES) < 0:
            raise _error()

    def lookup(self, key: bytes) -> bytes | None:
        """Value of one element, None if there is none."""
        to_key, value, attr = self._memory.parts
        to_key[:] = key
        if _quick(self._number, MAP_LOOKUP, attr, ELEMENT_ATTR.size) < 0:
            e = _error()
            if e.errno == errno.ENOENT:
                return None
            raise e
        return bytes(value)

    def next_key(self, key: bytes | None) -> bytes | None:
        """Key after ``key`` (None: the first), None at the end."""
        before = None if key is None else ctypes.create_string_buffer(key, self.key_size)
        after = ctypes.create_string_buffer(self.key_size)
        at = 0 if before is None else ctypes.addressof(before)
        try:
            call(MAP_NEXT_KEY, ELEMENT_ATTR.pack(self.fd, 0, at, ctypes.addressof(after), 0))
        except OSError as e:
            if e.errno == errno.ENOENT:
                return None
            raise
        return after.raw


_BATCH: Final = 4096
"""Elements per call of map_dump; a hash map needs room for its fullest bucket (kernel/bpf/hashtab.c)."""


def map_dump(
    fd: int, key: np.dtype[Any], value: np.dtype[Any], entries: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """All elements of a hash map, at most ``entries``: keys, shape (n,), and values, shape (n,).

    What comes and goes meanwhile may be missing or come twice.
    """
    keys, values = np.zeros(entries + _BATCH, dtype=key), np.zeros(entries + _BATCH, dtype=value)
    cursor = ctypes.create_string_buffer(8)
    at, n, more = 0, 0, True
    while more and n <= entries:
        attr = BATCH_ATTR.pack(
            at, ctypes.addressof(cursor), keys[n:].ctypes.data, values[n:].ctypes.data, _BATCH, fd, 0, 0
        )
        buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES)
        if _syscall(number(), MAP_LOOKUP_BATCH, buffer, len(attr)) < 0:
            e = _error()
            if e.errno != errno.ENOENT:  # that was the last batch
                raise e
            more = False
        n += BATCH_ATTR.unpack_from(buffer.raw)[4]
        at = ctypes.addressof(cursor)
    return keys[:n], values[:n]


class _Memory(threading.local):
    """What the kernel reads and writes during a call on a map: attributes, made once, a key and a value. Per thread."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        key = ELEMENT_ATTR.size
        value = key + (key_size + 7 & ~7)
        memory = bytearray(value + value_size)
        self._fixed = (ctypes.c_char * len(memory)).from_buffer(memory)
        """Keeps it where it is."""
        start = ctypes.addressof(self._fixed)
        ELEMENT_ATTR.pack_into(memory, 0, fd, 0, start + key, start + value, 0)
        view = memoryview(memory)
        self.parts: tuple[memoryview, memoryview, Any] = (
            view[key : key + key_size],
            view[value:],
            ctypes.byref(self._fixed),
        )


def possible_cpus() -> int:
    """Copies that a per-CPU map has of each value."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")
    return 1 + max(int(part.split("-")[-1]) for part in text.strip().split(","))


# --- programs ---------------------------------------------------------------------------------------------------------


def prog_load(kind: int, name: str, code: bytes, licence: str) -> int:
    """Have a program of ready instructions verified; returns its descriptor.

    ``kind`` is its type (enum bpf_prog_type). Raises LoaderError with the verifier's words.
    """
    insns = ctypes.create_string_buffer(code, len(code))
    text = ctypes.create_string_buffer(licence.encode())

    def attr(log: int, size: int) -> bytes:
        start, words = ctypes.addressof(insns), ctypes.addressof(text)
        return PROG_ATTR.pack(kind, len(code) // 8, start, words, bool(log), size, log, 0, 0, name.encode()[:15])

    try:
        return call(PROG_LOAD, attr(0, 0))[0]
    except OSError as first:
        log = ctypes.create_string_buffer(_LOG_BYTES)  # a second time, for the log
        try:
            return call(PROG_LOAD, attr(ctypes.addressof(log), _LOG_BYTES))[0]
        except OSError:
            said = log.value.decode(errors="replace").strip()
        if first.errno in (errno.EPERM, errno.EACCES) and not said:
            fix = "mfsd needs CAP_BPF and CAP_NET_ADMIN (AmbientCapabilities= in the unit)"
            raise LoaderError(f"loading {name}", str(first), fix) from first
        fix = f"kernel {platform.release()} rejects the program; report this with the log"
        raise LoaderError(f"loading {name}", str(first), fix, said) from first


def prog_query(target: int, attach_type: int) -> list[int]:
    """Ids of the programs on a hook of a device (or, by descriptor, of a cgroup), in the order in which they run.

    64 at most: the kernel's own limit.
    """
    ids = (ctypes.c_uint32 * _QUERY_MAX)()
    _, raw = call(PROG_QUERY, QUERY_ATTR.pack(target, attach_type, 0, 0, ctypes.addressof(ids), _QUERY_MAX, 0))
    return list(ids[: QUERY_ATTR.unpack(raw)[5]])


def prog_info(prog_id: int) -> tuple[str, int]:
    """Name and type of a loaded program."""
    fd, _ = call(PROG_FD_BY_ID, struct.pack("=III", prog_id, 0, 0))
    try:
        kind, _, name = _info(fd)
    finally:
        os.close(fd)
    return name.split(b"\0", 1)[0].decode(errors="replace"), kind


def prog_id(prog_fd: int) -> int:
    """Id of a loaded program."""
    return _info(prog_fd)[1]


def _info(prog_fd: int) -> tuple[int, int, bytes]:
    info = ctypes.create_string_buffer(_INFO.size)
    call(INFO_BY_FD, INFO_ATTR.pack(prog_fd, _INFO.size, ctypes.addressof(info)))
    kind, number_, name = _INFO.unpack(info.raw)
    return kind, number_, name


class Run(NamedTuple):
    """What a test run gave. ``result`` is the program's return code, ``ns`` the mean duration of one run."""

    result: int
    data: bytes
    context: bytes
    ns: int


def prog_test_run(prog_fd: int, data: bytes, context: bytes, repeat: int = 1) -> Run:
    """Run a program ``repeat`` times on a packet and a context of its type (BPF_PROG_TEST_RUN)."""
    data_in, data_out = ctypes.create_string_buffer(data, len(data)), ctypes.create_string_buffer(len(data) + 256)
    context_in = ctypes.create_string_buffer(context, len(context))
    context_out = ctypes.create_string_buffer(len(context))
    attr = RUN_ATTR.pack(
        prog_fd, 0, len(data), len(data_out), ctypes.addressof(data_in), ctypes.addressof(data_out),
        repeat, 0, len(context), len(context), ctypes.addressof(context_in), ctypes.addressof(context_out),
    )  # fmt: skip
    _, raw = call(PROG_TEST_RUN, attr)
    _, result, _, size, _, _, _, ns, *_ = RUN_ATTR.unpack(raw)
    return Run(ctypes.c_int32(result).value, data_out.raw[:size], context_out.raw, ns)


# --- links ------------------------------------------------------------------------------------------------------------


def link_create(prog_fd: int, target: int, attach_type: int, flags: int) -> int:
    """Attach a program to a device (or, by descriptor, to a cgroup) by a link; returns the link's descriptor."""
    return call(LINK_CREATE, LINK_ATTR.pack(prog_fd, target, attach_type, flags))[0]


def iterate(link_fd: int) -> None:
    """Run an iterator to its end; what it prints is thrown away."""
    fd, _ = call(ITER_CREATE, struct.pack("=II", link_fd, 0))
    try:
        while os.read(fd, _PAGE):
            pass
    finally:
        os.close(fd)


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replace the program of a link atomically."""
    call(LINK_UPDATE, UPDATE_ATTR.pack(link_fd, prog_fd, 0, 0))


def link_detach(link_fd: int) -> None:
    """Take a link's program off, whoever else holds the link. Does nothing the second time."""
    call(LINK_DETACH, struct.pack("=I", link_fd))


def link_info(link_fd: int) -> tuple[int, int]:
    """(id of the program, index of the device) of a TCX link; of a cgroup's with the id of that, cut to 32 bits.

    Detached, or with its device gone, it has index 0.
    """
    info = ctypes.create_string_buffer(_LINK_INFO.size)
    call(INFO_BY_FD, INFO_ATTR.pack(link_fd, _LINK_INFO.size, ctypes.addressof(info)))
    _, _, number_, _, ifindex = _LINK_INFO.unpack(info.raw)
    return number_, ifindex
