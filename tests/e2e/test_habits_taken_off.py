# SPDX-License-Identifier: Apache-2.0
"""Somebody takes off the programs that tell of connections, as `bpftool link detach` does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, KIB, PORT, WRONG, Grown, Sink, band, dial, settled
from support.waiting import wait_for

from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from support.rig import Daemon

pytestmark = pytest.mark.netns


def take_off(daemon: Daemon) -> None:
    """All that the daemon has hung on a cgroup."""
    links = [
        text for f in Path(f"/proc/{daemon.pid}/fdinfo").iterdir() if "link_type:\tcgroup" in (text := f.read_text())
    ]
    assert len(links) == 2
    for text in links:
        (number,) = re.findall(r"^link_id:\t(\d+)", text, flags=re.MULTILINE)
        daemon.pair.run(daemon.pair.a, f"bpftool link detach id {number}")


def test_what_tells_of_connections_is_put_back(daemon: Daemon, client: Client, sink: Sink) -> None:
    """What was connected meanwhile is found, and what is connected later is in its band from the first packet on."""
    client.mark(tuple_of(daemon.pair.addr_b, PORT), Stage.COLLECTIVE)
    assert client.flush(5)
    take_off(daemon)
    with dial(daemon.pair) as s:
        s.sendall(bytes(100 * KB))
        assert daemon.mfsctl("--socket", str(daemon.socket), "enforce").returncode == 0  # it looks after all at once
        wait_for(lambda: band(daemon, s) == "level 0", "the one that nobody had told of")
    grown = Grown(daemon)
    for _ in range(20):
        with dial(daemon.pair) as s:
            s.sendall(bytes(64 * KIB))
    wait_for(lambda: sink.received == 100 * KB + 20 * 64 * KIB, "arrival")
    assert grown.wrong(20 * 64 * KIB, right="level 0") <= WRONG
    with dial(daemon.pair) as s:
        client.transfer("t", s, 100 * KB, stage=Stage.P2D, request="r")
        s.sendall(bytes(100 * KB))
    settled(daemon, (1, 0, 0))
