# SPDX-License-Identifier: Apache-2.0
"""Requests that are late when they are heard of, or not yet, and sockets that were never connected."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, MB, WRONG, Grown, band, counted, dial, settled, transfers
from support.rig import Daemon, flows, running
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Event, Rejected, Stage

if TYPE_CHECKING:
    from support.habits import Sink
    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns


def test_requests_that_turn_out_to_be_late(daemon: Daemon, client: Client, sink: Sink) -> None:
    """Their bytes may have arrived by when that is heard."""
    with dial(daemon.pair) as s:
        for i in range(20):
            client.request(f"q{i}", ttft_left_s=600)
            client.transfer(f"t{i}", s, 20 * KB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            client.request(f"q{i}", ttft_left_s=-0.5)
            s.sendall(bytes(20 * KB))
            client.done(request=f"q{i}")
        settled(daemon, (20, 0, 20))
    sink.gets(20 * 20 * KB)


@pytest.mark.parametrize("met", [True, False])
def test_what_was_due_before_the_daemon_could_be_reached(daemon: Daemon, sink: Sink, *, met: bool) -> None:
    """It hears of it when all has arrived, and goes by when that was."""
    elsewhere = daemon.folder / "later.sock"
    with Client(target=elsewhere) as client, dial(daemon.pair) as s:
        client.request("q", ttft_left_s=1.0 if met else -0.2)
        client.transfer("t", s, 100 * KB, stage=Stage.P2D, request="q")
        s.sendall(bytes(100 * KB))
        wait_for(lambda: sink.received == 100 * KB, "arrival")
        time.sleep(1.5)  # no hint is heard before it is due
        assert counted(daemon) == (0, 0, 0)
        for ending in (".id", ""):
            Path(f"{elsewhere}{ending}").symlink_to(f"{daemon.socket}{ending}")
        assert client.flush(20)
        client.done(request="q")
        settled(daemon, (1, met, not met))


def test_kv_without_a_deadline_beside_bulk_and_beside_what_is_due(
    netns_pair: NetnsPair, sink: Sink, tmp_path: Path
) -> None:
    """It goes before unhinted bytes, costs nobody a deadline, and has none to meet or to miss."""
    pair, daemon = netns_pair, Daemon(netns_pair, tmp_path)
    daemon.write_config(policy='name = "demand-bound"')
    with (
        running(daemon),
        daemon.client() as client,
        flows(pair, 1) as (bulk,),
        dial(pair) as never,
        dial(pair) as soon,
    ):
        bulk.saturate()
        client.request("never", no_deadline=True)
        client.request("soon", ttft_left_s=2.0)
        client.transfer("kv", never, 8 * MB, stage=Stage.P2D, request="never", interleaved=True)
        client.transfer("due", soon, 2 * MB, stage=Stage.P2D, request="soon")
        assert client.flush(5)
        assert band(daemon, never) == "level 3"
        sends = [threading.Thread(target=s.sendall, args=(bytes(n * MB),)) for s, n in ((never, 8), (soon, 2))]
        for one in sends:
            one.start()
        for one in sends:
            one.join(WAIT_S)
        wait_for(lambda: sink.received == 10 * MB, "arrival")
        client.done(request="never")
        client.done(request="soon")
        settled(daemon, (2, 1, 0))
        assert daemon.status().counters.ended_no_deadline == 1


@pytest.mark.parametrize("why", ["refused", "no answer"])
def test_another_socket_for_one_that_could_not_be_connected(
    daemon: Daemon, client: Client, sink: Sink, why: str, events: list[Event], rejected: list[Rejected]
) -> None:
    """For the same transfer; nobody has said that it won't come on the first one."""
    pair = daemon.pair
    nobody = (pair.addr_b, 6999) if why == "refused" else ("10.77.0.77", 6999)
    pair.run(pair.a, f"ip neigh replace 10.77.0.77 lladdr 02:00:00:00:00:77 dev {pair.dev_a}")

    def in_vain() -> None:
        with socket.socket() as s, contextlib.suppress(OSError):
            client.transfer("t", s, 200 * KB, stage=Stage.P2D, request="r")
            s.settimeout(0.3)
            s.connect(nobody)

    pair.call(pair.a, in_vain)
    with dial(pair) as s:
        client.transfer("t", s, 200 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        assert transfers(daemon) == {"t": 200 * KB}
        grown = Grown(daemon)
        s.sendall(bytes(200 * KB))
        client.done(request="r")
        settled(daemon, (1, 1, 0))
    assert grown.wrong(200 * KB) <= WRONG
    sink.gets(200 * KB)
    assert not events
    assert not rejected
    wait_for(lambda: daemon.status().connections == 0, "the slots to be free")
