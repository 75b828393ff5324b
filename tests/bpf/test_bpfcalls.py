# SPDX-License-Identifier: Apache-2.0
"""bpf(2) without a library does what libbpf does: the calls that the BCC loader uses, and its errors."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mfsd.daemon import devices
from mfsd.datapath.bpf import bcc
from mfsd.datapath.bpf.attach import TCX_EGRESS
from mfsd.datapath.bpf.bcc import BccLoader, check_headers
from mfsd.datapath.bpf.calls import SyscallCalls
from mfsd.datapath.bpf.libbpf import LibbpfCalls, LibbpfLoader
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.bpf

HASH, PERCPU_ARRAY = 1, 6
RETURN_0 = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
READ_NOTHING = struct.pack("=BBhiBBhi", 0x61, 0x20, 0, 0, 0x95, 0, 0, 0)
"""r0 = *(u32 *)r2; exit"""


@pytest.fixture
def calls() -> SyscallCalls:
    return SyscallCalls()


@pytest.fixture
def table(calls: SyscallCalls) -> Iterator[int]:
    fd = calls.map_create(HASH, "mfsd_test", 8, 4, 4, 0)
    yield fd
    os.close(fd)


def test_elements_come_and_go(calls: SyscallCalls, table: int) -> None:
    key, value = bytes(7) + b"k", b"abcd"
    assert calls.map_lookup(table, key, 4) is None
    assert calls.map_next_key(table, None, 8) is None
    calls.map_update(table, key, value)
    assert calls.map_lookup(table, key, 4) == value
    assert LibbpfCalls().map_lookup(table, key, 4) == value
    assert calls.map_next_key(table, None, 8) == key
    assert calls.map_next_key(table, key, 8) is None
    calls.map_delete(table, key)
    with pytest.raises(OSError, match="No such file") as caught:
        calls.map_delete(table, key)
    assert caught.value.errno == errno.ENOENT


def test_cpus_are_those_of_libbpf(calls: SyscallCalls) -> None:
    assert calls.possible_cpus() == LibbpfCalls().possible_cpus()
    fd = calls.map_create(PERCPU_ARRAY, "mfsd_test", 4, 8, 1, 0)
    assert calls.map_lookup(fd, bytes(4), 8 * calls.possible_cpus()) == bytes(8 * calls.possible_cpus())
    os.close(fd)


def test_a_program_is_loaded_and_known(calls: SyscallCalls) -> None:
    fd = calls.prog_load("mfsd_test", RETURN_0, "GPL")
    number = calls.prog_id(fd)
    assert number == LibbpfCalls().prog_id(fd)
    assert calls.prog_info(number) == LibbpfCalls().prog_info(number) == ("mfsd_test", 3)
    os.close(fd)


def test_the_verifiers_words_are_kept(calls: SyscallCalls) -> None:
    with pytest.raises(LoaderError, match=r"Permission denied|Invalid argument") as caught:
        calls.prog_load("mfsd_test", READ_NOTHING, "GPL")
    assert "R2" in caught.value.log_tail


def test_the_kernel_answers_within_our_buffer(calls: SyscallCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 6.6 a query is answered beyond the attributes that it came with; that has cost a heap once."""
    real, room = calls._libc, 4096
    given: list[int] = []
    reached: list[int] = []

    class Watched:
        """Has the kernel write into a larger buffer, and notes how far it goes."""

        def syscall(self, number: Any, command: Any, buffer: Any, size: Any) -> int:
            given.append(ctypes.sizeof(buffer))
            for filling in (b"\xaa", b"\x55"):  # what the kernel writes differs from one of them
                larger = ctypes.create_string_buffer(buffer.raw[: size.value] + filling * (room - size.value), room)
                result = int(real.syscall(number, command, larger, size))
                reached.extend(i + 1 for i in range(size.value, room) if larger.raw[i] != filling[0])
            ctypes.memmove(buffer, larger, ctypes.sizeof(buffer))
            return result

    monkeypatch.setattr(calls, "_libc", Watched())
    try:
        assert calls.prog_query(socket.if_nametoindex("lo"), TCX_EGRESS) == []
    except OSError:
        pytest.skip("this kernel has no TCX")
    assert reached, "the kernel has gone back to what it was: then the room is not needed any more"
    assert max(reached) <= min(given)


def test_the_classifier_works_through_it(calls: SyscallCalls) -> None:
    """What is asked of a loaded classifier, with the calls exchanged."""
    with LibbpfLoader().open_classifier(16) as c:
        assert calls.prog_info(calls.prog_id(c.prog_fd))[0] == "mfsd_classify"
        expected = c.stats().tolist()
        c.calls = calls
        assert c.stats().tolist() == expected


def test_unknown_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(LoaderError, match="pdp11"):
        SyscallCalls()


def test_missing_headers_name_the_package(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match=r"apt-get install linux-headers-9\.9\.9"):
        check_headers("9.9.9", tmp_path)
    (tmp_path / "9.9.9/build/include").mkdir(parents=True)
    check_headers("9.9.9", tmp_path)


def test_missing_bindings_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, "", "ModuleNotFoundError")

    monkeypatch.setattr(bcc, "_run", without)
    bcc.interpreter.cache_clear()
    with pytest.raises(LoaderError, match="python3-bpfcc"):
        bcc.interpreter()
    bcc.interpreter.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, "", "note\nx.c:1:1: error: no such thing\n1 error generated.\n")

    monkeypatch.setattr(bcc, "_run", failing)
    with pytest.raises(LoaderError, match="no such thing") as caught:
        bcc._compile(tmp_path / "x.c", sys.executable)
    assert caught.value.log_tail.startswith("note")


def test_without_headers_nothing_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="no headers of the running kernel"):
        BccLoader(modules=tmp_path).open_classifier(16)


def test_auto_takes_bcc_where_libbpf_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices._loader("auto")[0] == "libbpf"

    def missing() -> None:
        raise LoaderError("libbpf.so.1", "not found", "install it")

    monkeypatch.setattr(devices, "LibbpfLoader", missing)
    name, loader = devices._loader("auto")
    assert (name, type(loader)) == ("bcc", BccLoader)
    with pytest.raises(LoaderError, match="not found"):
        devices._loader("libbpf")
