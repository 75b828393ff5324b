# SPDX-License-Identifier: Apache-2.0
"""mfsctl top on a terminal of 80 columns, with a real daemon behind it; and what it can't be asked."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Final

import pytest
from support.ctl import MFSCTL, Rig
from support.daemons import Running, connected
from support.rig import Daemon, flows, running
from support.tmux import terminal
from support.waiting import wait_for

from mfsd.client import Client, Cookie, Stage, cookie_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair
    from support.tmux import Terminal

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

COLUMNS: Final = 80
ROWS: Final = 30
HEAD: Final = "connections by "


def place(lines: list[str], text: str) -> int:
    """Number of the first line with a text."""
    return next(n for n, line in enumerate(lines) if text in line)


def listed(lines: list[str]) -> list[str]:
    """Slots of the connections, as they are listed."""
    out = []
    for line in lines[place(lines, HEAD) + 1 :]:
        words = line.split()
        if not words or not words[0].isdecimal():
            break
        out.append(words[0])
    return out


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Terminal]:
    """A daemon that knows five transfers, one of them late, on as many connections; mfsctl top looks at it."""
    daemon = Running(tmp_path)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client("worker", daemon.target))
        client.request("urgent", ttft_left_s=-1.0, ttl_s=600.0)
        client.request("relaxed", ttft_left_s=500.0, ttl_s=600.0)
        for n, size in enumerate((10_000, 50_000, 20_000, 40_000, 30_000)):
            near, _ = stack.enter_context(connected())
            owner = "urgent" if n == 2 else "relaxed"
            stage = Stage.COLLECTIVE if n == 3 else Stage.P2D
            client.transfer(f"{owner}/{n}", Cookie(cookie_of(near)), size, stage=stage, request=owner, ttl_s=600.0)
        assert client.flush(10)
        argv = [*MFSCTL, "--socket", str(daemon.socket), "top", "--interval", "200ms"]
        yield stack.enter_context(terminal(tmp_path, argv, COLUMNS, ROWS))
    daemon.stop()


@pytest.mark.daemon
def test_what_it_shows_fits_and_keys_do_what_they_say(screen: Terminal) -> None:
    it = screen
    lines = it.wait("5 connections", "5 transfers, 1 can't be in time", "by rate")
    assert it.width() <= COLUMNS
    assert len(listed(lines)) == 5
    # Deadlines: the late one first.
    risk = place(lines, "least time to spare")
    assert "urgent/2" in lines[risk + 1]
    # Sorted by what is left: 50, 40, 30 kB.
    for order in ("level", "left"):
        it.press("s")
        lines = it.wait(f"{HEAD}{order}")
    first = place(lines, HEAD) + 1
    assert [lines[first + n].split()[-3:-1] for n in range(5)] == [[f"{n}", "kB"] for n in (50, 40, 30, 20, 10)]
    # The second is explained: the collective.
    it.press("Down", "Enter")
    lines = it.wait("any key: back", "relaxed/3", "bytes_left")
    assert lines[0].startswith("127.0.0.1:")
    assert it.width() <= COLUMNS
    it.press("x")
    it.wait(HEAD)
    # Only what contains the text; Esc takes it back.
    it.press("/", "urgent", "Enter")
    lines = it.wait("only 'urgent'")
    assert not any("relaxed" in line for line in lines)
    it.press("Escape")
    lines = it.wait("relaxed/", "8 min")  # all due together: which of them the room shows is nobody's business
    assert sum("relaxed/" in line for line in lines) >= 3
    it.press("/", "coll", "Enter")  # by what is to be seen in any column
    assert len(listed(it.wait("only 'coll'", "relaxed/3"))) == 1
    it.press("Escape")
    # The late one is explained from the other pane.
    it.press("Tab", "e")
    it.wait("transfers: urgent/2")
    it.press("x")
    it.press("h")
    it.wait("Keys", "explain it")
    it.press("x", "q")
    it.wait("exit 0")


@pytest.mark.daemon
def test_a_daemon_that_goes_is_told_and_one_that_comes_is_shown(tmp_path: Path) -> None:
    daemon = Running(tmp_path)
    with terminal(tmp_path, [*MFSCTL, "--socket", str(daemon.socket), "top", "--interval", "200ms"], 80, 24) as it:
        it.wait("0 connections")
        daemon.stop()
        it.wait("! mfsd is not running")
        daemon = Running(tmp_path)
        wait_for(lambda: not any("! mfsd is" in line for line in it.lines), "the daemon to be seen again")
        it.press("q")
        it.wait("exit 0")
        daemon.stop()


@pytest.mark.netns
@pytest.mark.bpf
def test_the_busiest_connection_comes_first(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """With bands, rates and promotions of real traffic."""
    with running(Daemon(netns_pair, tmp_path)) as daemon, flows(netns_pair, 3) as opened:
        quiet, slow, busy = opened
        with daemon.client() as client:
            for flow in opened:
                client.mark(flow.sender, Stage.P2D)
            client.mark(busy.sender, Stage.COLLECTIVE)
            assert client.flush(5)
            busy.saturate()
            slow.saturate()
            assert quiet.sender.send(b"x") == 1
            argv = [*MFSCTL, "--socket", str(daemon.socket), "top", "--interval", "300ms"]
            with terminal(tmp_path, argv, COLUMNS, ROWS) as it:
                it.wait("by rate", "level 0", "guaranteed", "v0: htb")
                port = busy.sender.getsockname()[1]

                def first() -> bool:
                    lines = it.lines
                    row = lines[place(lines, HEAD) + 1]
                    return f" {port} -> " in row and "Mbit/s" in row and " coll " in row

                wait_for(first, "the busiest connection to be the first")
                assert it.width() <= COLUMNS
                band = next(line for line in it.lines if line.startswith("level 0"))
                assert band.rstrip().endswith("#")
                it.press("q")
                it.wait("exit 0")


def test_it_is_for_people_on_terminals(rig: Rig) -> None:
    assert "needs a terminal" in rig.run("top").err
    assert "watch --json" in rig.run("top", "--json").err
    assert not rig.tap.asked
