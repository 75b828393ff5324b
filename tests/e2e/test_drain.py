# SPDX-License-Identifier: Apache-2.0
"""Nothing stays behind in a lane when the daemon pauses, observes, stops, hands over or dies, whatever else is sent."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from support.rig import RATE_MBIT, Daemon, Flow, flows, running
from support.waiting import wait_for

from mfsd.ground.model import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.client import Client

pytestmark = pytest.mark.netns

MB = 1_000_000
CONNECTIONS = 8
"""Deferred; each may have two packets of 64 KB in its lane: 40 ms of the link."""


def _crowd(daemon: Daemon, client: Client, waiting: list[Flow], bulk: list[Flow]) -> list[int]:
    """Bytes that each has written. Background traffic, which waits behind bulk traffic that nobody hinted."""
    for flow in waiting:
        client.mark(flow.sender, Stage.BACKGROUND)
    assert client.flush(5)
    for flow in bulk:
        flow.saturate()
    wait_for(lambda: sum(f.received for f in bulk) > 5 * MB, "the link to be busy")
    written = []
    for flow in waiting:
        flow.sender.setblocking(False)
        written.append(flow.sender.send(bytes(MB)))
    wait_for(lambda: daemon.bands()["background"].backlog_bytes > 100_000, "packets to wait in their lanes")
    return written


@pytest.mark.parametrize("how", ["pause", "observe", "stop", "hand-over", "kill -9"])
def test_lanes_drain(netns_pair: NetnsPair, tmp_path: Path, how: str) -> None:
    daemon = Daemon(netns_pair, tmp_path)
    with running(daemon), flows(netns_pair, CONNECTIONS + 4) as opened, daemon.client() as client:
        waiting, bulk = opened[:CONNECTIONS], opened[CONNECTIONS:]
        written = _crowd(daemon, client, waiting, bulk)
        before = sum(f.received for f in bulk)
        if how in {"pause", "observe"}:
            assert daemon.mfsctl("--socket", str(daemon.socket), how).returncode == 0
        else:
            daemon.end({"stop": signal.SIGTERM, "hand-over": signal.SIGUSR1, "kill -9": signal.SIGKILL}[how])
        wait_for(lambda: [f.received for f in waiting] == written, "what waited to arrive", timeout=60.0)
        # By the link's own clock: what it has carried for others meanwhile.
        meanwhile = (sum(f.received for f in bulk) - before) / (RATE_MBIT * 1e6 / 8)
        # A daemon that ends takes the qdiscs away, and with them the link's rate.
        assert how == "stop" or meanwhile < (8.0 if how == "kill -9" else 5.0)
