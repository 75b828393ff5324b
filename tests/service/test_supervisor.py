# SPDX-License-Identifier: Apache-2.0
"""What the daemon and its service manager give each other, and the sign of life for the daemon before."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.waiting import wait_for

from mfsd.daemon.config import parse
from mfsd.daemon.config_bands import bands_of, policy_of
from mfsd.daemon.devices import Devices
from mfsd.daemon.host_map import HostMap
from mfsd.daemon.predecessor import HAND_OVER_S, HOST, Predecessor, link_name
from mfsd.daemon.supervisor import Supervisor
from mfsd.datapath import _abi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MS = 1_000_000


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
        notes.bind(str(tmp_path / "notify"))
        notes.settimeout(10)
        yield notes


def received(manager: socket.socket) -> tuple[str, list[int]]:
    """One note, and inodes of the descriptors that came with it."""
    data, fds, _flags, _address = socket.recv_fds(manager, 4096, 8)
    inodes = [os.fstat(fd).st_ino for fd in fds]
    for fd in fds:
        os.close(fd)
    return data.decode(), inodes


def test_descriptors_are_kept_by_name_and_let_go(manager: socket.socket, tmp_path: Path) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "notify")}, held=["old"])
    with (tmp_path / "a").open("w") as a, (tmp_path / "b").open("w") as b:
        inode = os.fstat(a.fileno()).st_ino
        supervisor.keep({"a": a.fileno()})
        assert received(manager) == ("FDSTOREREMOVE=1\nFDNAME=old", [])
        assert received(manager) == ("FDSTORE=1\nFDNAME=a\nFDPOLL=0", [inode])
        supervisor.keep({"a": a.fileno()})  # nothing new: not said again
        supervisor.keep({"a": b.fileno()})
        assert received(manager) == ("FDSTOREREMOVE=1\nFDNAME=a", [])
        assert received(manager)[1] == [os.fstat(b.fileno()).st_ino]
    supervisor.keep({})
    assert received(manager)[0] == "FDSTOREREMOVE=1\nFDNAME=a"
    supervisor.close()


class Numbered:
    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        return self.number


def test_another_object_with_the_same_number_is_another_descriptor(manager: socket.socket, tmp_path: Path) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    paths = [tmp_path / "a", tmp_path / "b"]
    with paths[0].open("w") as a, paths[1].open("w") as b:
        first, second = Numbered(a.fileno()), Numbered(a.fileno())
        supervisor.keep({"link": first})
        os.dup2(b.fileno(), a.fileno())
        supervisor.keep({"link": second})
        supervisor.keep({"link": second})
    assert received(manager)[1] == [paths[0].stat().st_ino]
    assert received(manager) == ("FDSTOREREMOVE=1\nFDNAME=link", [])
    assert received(manager)[1] == [paths[1].stat().st_ino]
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        received(manager)
    supervisor.close()


def test_a_manager_that_does_not_read_stops_nobody(manager: socket.socket, tmp_path: Path) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    for _ in range(5000):
        supervisor.tell("WATCHDOG=1")
    manager.close()
    supervisor.tell("WATCHDOG=1")
    supervisor.close()


def test_abstract_addresses() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
        notes.bind(b"\0mfsd-test-notify")
        supervisor = Supervisor({"NOTIFY_SOCKET": "@mfsd-test-notify"})
        supervisor.tell("READY=1")
        supervisor.close()
        assert notes.recv(100) == b"READY=1"


def test_without_a_manager_nothing_happens() -> None:
    supervisor = Supervisor({})
    supervisor.tell("READY=1")
    supervisor.keep({"a": 0})
    assert not supervisor.present
    assert supervisor.watchdog_s == 0


# --- the daemon before ------------------------------------------------------------------------------------------------


def host_map(age_ms: float, timeout_ms: float = 1000) -> tuple[int, mmap.mmap]:
    """Memory that looks like the map of a daemon that gave its last sign of life so long ago."""
    fd = os.memfd_create("host")
    os.ftruncate(fd, mmap.PAGESIZE)
    pages = mmap.mmap(fd, mmap.PAGESIZE)
    struct.pack_into("=QQ", pages, 0, time.monotonic_ns() - int(age_ms * MS), int(timeout_ms * MS))
    return fd, pages


def beat_of(pages: mmap.mmap) -> int:
    return int(struct.unpack_from("=Q", pages)[0])


def test_the_layout_that_every_version_keeps() -> None:
    fields = _abi.HOST_DTYPE.fields
    assert fields is not None
    assert [(str(fields[n][0]), fields[n][1]) for n in ("heartbeat_ns", "timeout_ns")] == [("uint64", 0), ("uint64", 8)]


def test_it_is_kept_at_work_until_it_retires() -> None:
    fd, pages = host_map(age_ms=300, timeout_ms=20_000)
    made = beat_of(pages)
    link = os.memfd_create("link")
    predecessor = Predecessor({HOST: fd, link_name(3): link})
    begin = time.monotonic_ns()
    assert predecessor.at_work
    assert 0.3 <= predecessor.away_s <= (begin - made) / 1e9
    wait_for(lambda: beat_of(pages) > begin)
    assert predecessor.link(4) == -1
    taken = predecessor.link(3)
    assert os.fstat(taken).st_ino == os.fstat(link).st_ino
    assert predecessor.link(3) == -1
    predecessor.retire()
    predecessor.retire()
    last = beat_of(pages)
    time.sleep(0.1)
    assert beat_of(pages) == last
    os.fstat(taken)  # whose owner closes it
    os.close(taken)


def test_who_still_obeys_it_can_be_told_at_once() -> None:
    fd, pages = host_map(0)
    predecessor = Predecessor({HOST: fd})
    assert predecessor.at_work
    predecessor.retire(lapse=True)
    assert beat_of(pages) == 0


@pytest.mark.parametrize(("age_ms", "timeout_ms"), [(1100, 1000), (60, 50)])
def test_what_has_lapsed_stays_so(age_ms: float, timeout_ms: float) -> None:
    fd, pages = host_map(age_ms, timeout_ms)
    link = os.memfd_create("link")
    before = beat_of(pages)
    predecessor = Predecessor({HOST: fd, link_name(3): link})
    time.sleep(0.1)
    assert not predecessor.at_work
    assert beat_of(pages) == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(link)  # closed, which detaches


def test_a_daemon_that_said_goodbye_is_not_revived() -> None:
    fd, pages = host_map(0)
    struct.pack_into("=Q", pages, 0, 0)
    assert not Predecessor({HOST: fd}).at_work


def test_who_hands_over_gives_the_next_one_time() -> None:
    """More than systemd and Python need on a busy machine, and more than a crash gets."""
    config = parse({})
    devices = Devices(config, bands_of(config, policy_of(config)))
    fd = os.memfd_create("host")
    os.ftruncate(fd, mmap.PAGESIZE)
    with mmap.mmap(fd, mmap.PAGESIZE) as pages:
        devices.host = HostMap(np.frombuffer(pages, dtype=_abi.HOST_DTYPE, count=1))
        devices.host.set_timeout(config.daemon.heartbeat_timeout_ms)
        devices.leave()
        beat, timeout = struct.unpack_from("=QQ", pages)
    assert timeout == HAND_OVER_S * 1e9 > 5 * config.daemon.heartbeat_timeout_ms * MS
    # A process that begins after seconds finds it at work.
    os.pwrite(fd, struct.pack("=Q", beat - 5_000 * MS), 0)
    next_one = Predecessor({HOST: fd})
    assert next_one.at_work
    assert next_one.away_s >= 5
    next_one.retire()


def test_clients_get_as_long_as_the_daemon_was_away() -> None:
    for age_ms in (0, 1000, 60_000):
        begin = time.monotonic()
        fd, _ = host_map(age_ms, timeout_ms=100_000)
        predecessor = Predecessor({HOST: fd})
        settle_s, took_s = predecessor.settle_s, time.monotonic() - begin
        predecessor.retire()
        least = min(0.5 + 2 * age_ms / 1000, 5.0)
        # Twice, as all that it is away; and twice again while it finds out for how long that is.
        assert least <= settle_s <= min(least + 4 * took_s, 5.0)


FINDS = """
import os, sys
sys.modules["numpy"] = sys.modules["grpc"] = None  # it must do without
from mfsd.daemon.predecessor import Predecessor
found = Predecessor.find(os.environ | {"LISTEN_PID": os.environ["LISTEN_PID"].replace("me", str(os.getpid()))})
print(found.names, found.at_work)
found.retire()
"""


@pytest.mark.parametrize(("pid", "seen"), [("me", "('tcx-3', 'mfsd_host') True"), ("1", "() False")])
def test_descriptors_of_the_process(pid: str, seen: str) -> None:
    # As sd_listen_fds(3) describes: from 3 on, and only for the process that they are meant for.
    host, _pages = host_map(0, timeout_ms=60_000)
    link = os.memfd_create("link")
    become = f"os.execv({sys.executable!r}, ['python', '-c', {FINDS!r}])"
    code = f"import os\nos.dup2({link}, 3)\nos.dup2({host}, 4)\n{become}"
    environment = os.environ | {"LISTEN_FDS": "2", "LISTEN_FDNAMES": f"{link_name(3)}:{HOST}", "LISTEN_PID": pid}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, pass_fds=[link, host], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == seen
