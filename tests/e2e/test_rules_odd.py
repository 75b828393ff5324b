# SPDX-License-Identifier: Apache-2.0
"""Rules with unusual conditions: what they name is in its band from the first packet on, on real TCP."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.namespaces import in_thread
from support.rig import Daemon, Flow, running
from support.waiting import wait_for

from mfsd.datapath.bpf.cgroup import mounted_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

SIZE = 400_000
FEW = 2_000
"""What else may be on the wire meanwhile: neighbours that are looked for."""
ENGINE = "kv engine (v2)"
UNIT = "vllm@prefill-1.service"
PORTS = (7101, 7104)
RULES = f"""
[[rule]]
name = "a network of IPv6, a range of ports"
stage = "background"
remote = "fd77::/64"
remote_ports = "{PORTS[0]}-{PORTS[1]}"
[[rule]]
name = "within it, and more urgent"
stage = "collective"
remote = "fd77::2"
remote_ports = "{PORTS[0] + 1}-{PORTS[1] - 1}"
[[rule]]
name = "around both, and less urgent"
stage = "kv_reuse"
remote_ports = "7000-7999"
remote = "fd77::/16"
[[rule]]
name = "a program with a space in its name"
stage = "collective"
executable = "kv engine (v?)"
remote = "10.77.0.0/24"
[[rule]]
name = "an instance of a unit"
stage = "kv_reuse"
unit = "vllm@*.service"
remote = "10.77.0.0/24"
"""


@pytest.fixture
def ruled(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Daemon]:
    with running(Daemon(netns_pair, tmp_path, extra=RULES)) as d:
        yield d


class Grown:
    """Bytes by band since it was made."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._before = daemon.bands()

    def __call__(self) -> dict[str, int]:
        return {name: band.bytes - self._before[name].bytes for name, band in self._daemon.bands().items()}

    def only(self, band: str) -> None:
        """All that was sent is in this band, but for what the control band has of every connection."""
        wait_for(lambda: sum(self().values()) > SIZE, f"{SIZE} bytes on the wire")
        found = self()
        elsewhere = {name: n for name, n in found.items() if name not in (band, "control") and n > FEW}
        assert not elsewhere, found
        assert found[band] > SIZE, found


@pytest.mark.parametrize(
    ("port", "band"),
    [
        (PORTS[0], "level 1"),  # background, and what is around it: the most urgent counts
        (PORTS[0] + 1, "level 0"),
        (PORTS[1] - 1, "level 0"),
        (PORTS[1], "level 1"),
    ],
)
def test_networks_and_ranges_that_overlap(ruled: Daemon, port: int, band: str) -> None:
    grown = Grown(ruled)
    flow = Flow.open(ruled.pair, port, v6=True)
    try:
        flow.sender.sendall(bytes(SIZE))
        grown.only(band)
    finally:
        flow.close()


@contextlib.contextmanager
def engine(pair: NetnsPair, tmp_path: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """A program of that name in namespace ``a``, which sends SIZE bytes to each port that it reads."""
    bash = shutil.which("bash")
    assert bash is not None
    program = tmp_path / name
    shutil.copy(bash, program)
    script = f"""
    while read port; do
        exec 3<>/dev/tcp/{pair.addr_b}/$port
        head -c {SIZE} /dev/zero >&3
        exec 3>&-
    done
    """
    popen = pair.call(
        pair.a, lambda: subprocess.Popen([program, "-c", script], stdin=subprocess.PIPE, text=True, cwd=tmp_path)
    )
    try:
        yield popen
    finally:
        popen.kill()
        popen.communicate()


def sends(popen: subprocess.Popen[str], pair: NetnsPair) -> None:
    """Have it send once, and take what it sends."""

    def take() -> None:
        with pair.inside(pair.b), socket.create_server((pair.addr_b, 0)) as listener:
            assert popen.stdin is not None
            popen.stdin.write(f"{listener.getsockname()[1]}\n")
            popen.stdin.flush()
            with listener.accept()[0] as sock:
                while sock.recv(1 << 18):
                    pass

    in_thread(take)


def test_a_program_with_a_space_in_its_name(ruled: Daemon, tmp_path: Path) -> None:
    with engine(ruled.pair, tmp_path, ENGINE) as popen:
        found = Grown(ruled)

        def known() -> bool:  # programs are looked for once a second
            sends(popen, ruled.pair)
            return found()["level 0"] > SIZE

        wait_for(known, "the program to be found")
        grown = Grown(ruled)
        sends(popen, ruled.pair)
        grown.only("level 0")


def test_an_instance_of_a_unit(ruled: Daemon, tmp_path: Path) -> None:
    root = mounted_at()
    if root is None:
        pytest.skip("cgroup v2 is not mounted")
    unit = root / f"mfsd-test-{os.getpid()}.slice" / UNIT
    unit.mkdir(parents=True)
    try:
        with engine(ruled.pair, tmp_path, "engine") as popen:
            (unit / "cgroup.procs").write_text(f"{popen.pid}\n")
            found = Grown(ruled)

            def known() -> bool:
                sends(popen, ruled.pair)
                return found()["level 1"] > SIZE

            wait_for(known, "the unit to be found")
            grown = Grown(ruled)
            sends(popen, ruled.pair)
            grown.only("level 1")
    finally:
        for folder in (unit, unit.parent):
            wait_for(lambda folder=folder: _removed(folder))  # type: ignore[misc]


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
