# SPDX-License-Identifier: Apache-2.0
"""bpf(2) by ourselves: layouts, maps, programs, and what the kernel writes back."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.attach import TCX_EGRESS
from mfsd.datapath.bpf.syscall import BpfMap
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.bpf

HASH, PERCPU_ARRAY = 1, 6
RETURN_0 = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
READ_NOTHING = struct.pack("=BBhiBBhi", 0x61, 0x20, 0, 0, 0x95, 0, 0, 0)
"""r0 = *(u32 *)r2; exit"""

LAYOUTS = {
    syscall.MAP_ATTR: "map_type key_size value_size max_entries map_flags inner_map_fd numa_node map_name",
    syscall.ELEMENT_ATTR: "map_fd - key value flags",
    syscall.PROG_ATTR: (
        "prog_type insn_cnt insns license log_level log_size log_buf kern_version prog_flags prog_name"
    ),
    syscall.RUN_ATTR: (
        "test.prog_fd test.retval test.data_size_in test.data_size_out test.data_in test.data_out test.repeat "
        "test.duration test.ctx_size_in test.ctx_size_out test.ctx_in test.ctx_out"
    ),
    syscall.INFO_ATTR: "info.bpf_fd info.info_len info.info",
    syscall.QUERY_ATTR: (
        "query.target_fd query.attach_type query.query_flags query.attach_flags query.prog_ids query.prog_cnt"
    ),
    syscall.LINK_ATTR: "link_create.prog_fd link_create.target_ifindex link_create.attach_type link_create.flags",
    syscall.UPDATE_ATTR: "link_update.link_fd link_update.new_prog_fd link_update.flags link_update.old_prog_fd",
}
"""Fields of union bpf_attr that stand for the values of a layout; "-" is padding."""


@pytest.fixture
def table() -> Iterator[BpfMap]:
    fd = syscall.map_create(HASH, "mfsd_test", 8, 4, 64)
    yield BpfMap(fd, 8, 4)
    os.close(fd)


@pytest.mark.parametrize(("layout", "fields"), LAYOUTS.items(), ids=lambda value: str(value).split()[0])
def test_layouts_are_those_of_the_headers(tmp_path: Path, layout: struct.Struct, fields: str) -> None:
    sizes = [struct.calcsize(f"={code}") for code in re.findall(r"\d*[A-Za-z]", layout.format)]
    lines = ["#include <linux/bpf.h>", "#include <stddef.h>"]
    for n, name in enumerate(fields.split()):
        if name != "-":
            lines += [
                f'_Static_assert(offsetof(union bpf_attr, {name}) == {sum(sizes[:n])}, "{name}");',
                f'_Static_assert(sizeof(((union bpf_attr *)0)->{name}) == {sizes[n]}, "{name}");',
            ]
    source = tmp_path / "layout.c"
    source.write_text("\n".join(lines))
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    argv = ["clang", "-fsyntax-only", include, str(source)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_elements_come_and_go(table: BpfMap) -> None:
    key, value = bytes(7) + b"k", b"abcd"
    assert table.lookup(key) is None
    assert table.next_key(None) is None
    table.update(key, value)
    table.update(bytes(8), b"efgh")
    table.update(key, b"ABCD")
    assert (table.lookup(key), table.lookup(bytes(8))) == (b"ABCD", b"efgh")
    first = table.next_key(None)
    assert first is not None
    assert {first, table.next_key(first)} == {key, bytes(8)}
    table.delete(bytes(8))
    assert (table.next_key(None), table.next_key(key)) == (key, None)
    table.delete(key)
    with pytest.raises(OSError, match="No such file") as caught:
        table.delete(key)
    assert caught.value.errno == errno.ENOENT


def test_a_full_or_closed_map_says_so(table: BpfMap) -> None:
    for i in range(64):
        table.update(i.to_bytes(8, "little"), bytes(4))
    with pytest.raises(OSError, match="too long") as caught:
        table.update(b"one more", bytes(4))
    assert caught.value.errno == errno.E2BIG
    with pytest.raises(OSError, match="Bad file descriptor"):
        BpfMap(9999, 8, 4).lookup(bytes(8))


def test_keys_and_values_of_other_sizes_are_refused(table: BpfMap) -> None:
    """The kernel would read what is behind them."""
    for key, value in ((bytes(7), bytes(4)), (bytes(9), bytes(4)), (bytes(8), bytes(3)), (bytes(8), bytes(5))):
        with pytest.raises(ValueError, match="different"):
            table.update(key, value)
    for call in (table.lookup, table.delete):
        with pytest.raises(ValueError, match="different"):
            call(bytes(4))


def test_threads_do_not_disturb_each_other(table: BpfMap) -> None:
    """The interpreter may change threads between laying out a call and making it."""

    def work(n: int) -> None:
        key = n.to_bytes(8, "little")
        for i in range(1000):
            value = (n << 16 | i).to_bytes(4, "little")
            table.update(key, value)
            assert table.lookup(key) == value
            table.delete(key)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_a_per_cpu_map_has_as_many_copies_as_we_think() -> None:
    cpus = syscall.possible_cpus()
    fd = syscall.map_create(PERCPU_ARRAY, "mfsd_test", 4, 8, 1)
    wide = BpfMap(fd, 4, 8 * cpus + 64)
    wide._memory.parts[1][:] = b"\xaa" * (8 * cpus + 64)
    assert wide.lookup(bytes(4)) == bytes(8 * cpus) + b"\xaa" * 64, "the kernel writes this far and no farther"
    wide = BpfMap(fd, 4, 8 * cpus)
    wide.update(bytes(4), b"".join(i.to_bytes(8, "little") for i in range(cpus)))
    assert wide.lookup(bytes(4)) == b"".join(i.to_bytes(8, "little") for i in range(cpus))
    os.close(fd)


def test_a_program_is_loaded_and_known() -> None:
    fd = syscall.prog_load(syscall.SCHED_CLS, "mfsd_test", RETURN_0, "GPL")
    number = syscall.prog_id(fd)
    assert f"prog_id:\t{number}\n" in _fdinfo(fd)
    assert syscall.prog_info(number) == ("mfsd_test", syscall.SCHED_CLS)
    assert syscall.prog_test_run(fd, bytes(60), bytes(192)).result == 0
    os.close(fd)
    with pytest.raises(OSError, match="No such file"):
        syscall.prog_info(2**31 - 1)


def _fdinfo(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:  # noqa: PTH123 - no path of the file system
        return file.read()


def test_the_verifiers_words_are_kept() -> None:
    with pytest.raises(LoaderError, match=r"Permission denied|Invalid argument") as caught:
        syscall.prog_load(syscall.SCHED_CLS, "mfsd_test", READ_NOTHING, "GPL")
    assert "R2" in caught.value.log_tail


def test_the_kernel_answers_within_our_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 6.6 a query is answered beyond the attributes that it came with; that has cost a heap once."""
    real, room = syscall._syscall, 4096
    given: list[int] = []
    reached: list[int] = []

    def watched(number: int, command: int, buffer: Any, size: int) -> int:
        """Has the kernel write into a larger buffer, and notes how far it goes."""
        given.append(ctypes.sizeof(buffer))
        for filling in (b"\xaa", b"\x55"):  # what the kernel writes differs from one of them
            larger = ctypes.create_string_buffer(buffer.raw[:size] + filling * (room - size), room)
            result = int(real(number, command, larger, size))
            reached.extend(i + 1 for i in range(size, room) if larger.raw[i] != filling[0])
        ctypes.memmove(buffer, larger, ctypes.sizeof(buffer))
        return result

    monkeypatch.setattr(syscall, "_syscall", watched)
    try:
        assert syscall.prog_query(socket.if_nametoindex("lo"), TCX_EGRESS) == []
    except OSError:
        pytest.skip("this kernel has no TCX")
    assert reached, "the kernel has gone back to what it was: then the room is not needed any more"
    assert max(reached) <= min(given)


def test_unknown_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    syscall.number.cache_clear()
    try:
        with pytest.raises(LoaderError, match="pdp11"):
            BpfMap(0, 4, 4)
    finally:
        syscall.number.cache_clear()
