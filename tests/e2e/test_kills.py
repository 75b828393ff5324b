# SPDX-License-Identifier: Apache-2.0
"""kill -9 (and SIGTERM) at random moments: the device comes back exactly, and nothing is left.

``make kills KILLS=1000`` makes it that many; each is a daemon that starts, is killed at some moment of its start, its
life or its end, and whoever comes next: mfsctl, or another daemon that ends.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.habits import Sink, dial
from support.rig import Daemon, programs, running, tc_state
from support.waiting import wait_for

from mfsd.client import Client, Stage

if TYPE_CHECKING:
    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns
KILLS: Final = int(os.environ.get("MFSD_KILLS", "8"))
LONGEST_S: Final = 3.0
"""Within which a start is over, and something happens."""


def start(daemon: Daemon) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mfsd.daemon", "--config", str(daemon.config)]
    with daemon.log.open("ab") as log:
        return subprocess.Popen(["ip", "netns", "exec", daemon.pair.a, *command], stdout=log, stderr=log)


def test_killed_at_any_moment(netns_pair: NetnsPair, tmp_path: Path) -> None:
    netns_pair.run(netns_pair.a, f"tc qdisc add dev {netns_pair.dev_a} root handle 9: pfifo limit 77")
    before, loaded = tc_state(netns_pair), programs()
    seed = int(os.environ.get("MFSD_SEED", str(random.getrandbits(32))))
    chance = random.Random(seed)
    daemon = Daemon(netns_pair, tmp_path)
    for n in range(KILLS):
        said = f"seed {seed}, number {n}"
        process = start(daemon)
        with Client(target=f"unix:{daemon.socket}") as client, Sink(netns_pair), dial(netns_pair) as sock:
            client.mark(sock, Stage.COLLECTIVE)
            after = chance.uniform(0, LONGEST_S)
            end = time.monotonic() + after
            while time.monotonic() < end:
                sock.send(bytes(1000))
                time.sleep(0.02)
            if chance.random() < 0.3:
                process.send_signal(signal.SIGTERM)  # and the kill comes while it ends
                time.sleep(chance.uniform(0, 0.3))
            process.kill()
            process.wait()
        if chance.random() < 0.5:
            done = daemon.mfsctl("--socket", str(daemon.socket), "restore", "--state-dir", str(tmp_path))
            assert done.returncode == 0, (said, done.stdout, done.stderr)
        else:
            with running(daemon):
                assert daemon.end() == 0, said
        assert tc_state(netns_pair) == before, said
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith("qdisc-")] == [], said
        wait_for(lambda: programs() <= loaded, f"the programs to be gone: {said}")
        assert "Traceback" not in daemon.log.read_text(), said


def begun(pid: int) -> bool:
    """The daemon blocks SIGHUP before all else, and then handles it."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk:", "SigCgt:"))]
    return any(mask >> (signal.SIGHUP - 1) & 1 for mask in masks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_at_any_moment(netns_pair: NetnsPair, tmp_path: Path, number: signal.Signals) -> None:
    before, loaded = tc_state(netns_pair), programs()
    daemon = Daemon(netns_pair, tmp_path)
    for step in range(5):
        process = start(daemon)
        wait_for(partial(begun, process.pid), "its first lines: an interrupt before them is the interpreter's")
        time.sleep(0.05 + 0.35 * step)
        process.send_signal(number)
        process.send_signal(number)
        assert process.wait(timeout=30) in (0, -number, 130 if number is signal.SIGINT else 143, 1), step
        assert tc_state(netns_pair) == before, step
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith("qdisc-")] == [], step
    wait_for(lambda: programs() <= loaded, "the programs to be gone")
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_signals_that_come_before_their_handlers_wait_for_them(
    netns_pair: NetnsPair, tmp_path: Path, number: signal.Signals
) -> None:
    daemon = Daemon(netns_pair, tmp_path)
    process = daemon.process = start(daemon)
    status = Path(f"/proc/{process.pid}/status")
    wait_for(lambda: blocked(status.read_text()) >> (number - 1) & 1, "the signal to be blocked")
    process.send_signal(number)
    with running(daemon, started=True):
        assert daemon.status().devices[0].backend == "htb"
        assert daemon.end() == 0


def blocked(status: str) -> int:
    """The mask of blocked signals."""
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:"))


def test_told_to_hand_over_before_it_has_begun(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """SIGUSR1 is an end that leaves the qdiscs to the next daemon, whenever it comes."""
    before = tc_state(netns_pair)
    daemon = Daemon(netns_pair, tmp_path)
    process = start(daemon)
    status = Path(f"/proc/{process.pid}/status")
    wait_for(lambda: blocked(status.read_text()) >> (signal.SIGUSR1 - 1) & 1, "the signal to be blocked")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    with running(daemon):
        assert daemon.end() == 0
    assert tc_state(netns_pair) == before


def test_in_a_time_namespace_that_is_behind(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """Its clock is not that of the kernel's programs, which must see its sign of life all the same."""
    before = tc_state(netns_pair)
    behind = (sys.executable, "-c", BEHIND)
    daemon = Daemon(netns_pair, tmp_path, wrap=behind)
    with running(daemon), Sink(netns_pair) as sink, dial(netns_pair) as sock, daemon.client() as client:
        client.mark(sock, Stage.COLLECTIVE)
        assert client.flush(5)
        sock.sendall(bytes(1 << 20))
        wait_for(lambda: sink.received == 1 << 20, "the bytes")
        stats = daemon.status().devices[0].stats
        assert stats["stale"] == 0
        assert stats["cookie"] > 0
        assert daemon.end() == 0
    assert tc_state(netns_pair) == before


BEHIND = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).unshare(0x80):  # CLONE_NEWTIME
    sys.exit("no time namespaces")
open("/proc/self/timens_offsets", "w").write("monotonic -1000 0\\nboottime -1000 0\\n")
child = os.fork()
if not child:
    os.execvp(sys.argv[1], sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_full_disk_leaves_the_device_as_it_is(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """Without a note nothing may be changed; the lock, whose file is there, holds all the same."""
    before = tc_state(netns_pair)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], check=True)
    try:
        (small / "full").write_bytes(bytes(8192))
        daemon = Daemon(netns_pair, tmp_path)
        daemon.config.write_text(
            daemon.config.read_text().replace(f'state_dir = "{tmp_path}"', f'state_dir = "{small}"')
        )
        process = daemon.process = start(daemon)
        wait_for(lambda: process.poll() is not None or daemon.socket.exists(), "the daemon")
        if process.poll() is None:
            wait_for(lambda: any("No space left" in n for n in daemon.status().notices), "the reason")
            assert daemon.end() == 0
        assert tc_state(netns_pair) == before
        text = daemon.log.read_text()
        assert "No space left" in text
        assert "Traceback" not in text
    finally:
        subprocess.run(["umount", str(small)], check=True)
