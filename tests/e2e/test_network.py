# SPDX-License-Identifier: Apache-2.0
"""Deferred connections yield in the network, from the configuration to the socket, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import re
import signal
from typing import TYPE_CHECKING, Final

import pytest
from support.manager import managed
from support.privileges import SETPRIV
from support.rig import Daemon, flows, running
from support.waiting import WAIT_S, wait_for
from support.yielders import needs_it

from mfsd.client import Stage, cookie_of
from mfsd.client.manners import AVAILABLE
from mfsd.daemon.predecessor import HOST
from mfsd.datapath.bpf import yielding
from mfsd.lab.hosts.tcp import algorithm_of
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from support.namespaces import NetnsPair

ON: Final = '[network]\nyield = "on"\nreplace = true\n'
"""The rig's connections choose cubic, which may not be the default here."""
MOVED: Final = 4_000_000
"""Bytes that a connection sends between two daemons: a sixth of a second at the link's rate."""

pytestmark = pytest.mark.netns


def ours() -> set[str]:
    return {name for name in AVAILABLE.read_text().split() if name.startswith(yielding.NAME)}


@needs_it
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_from_the_hint_to_the_socket_and_back(netns_pair: NetnsPair, tmp_path: Path, end: signal.Signals) -> None:
    before, made = ours(), Daemon(netns_pair, tmp_path)
    made.write_config(
        ON, daemon="heartbeat_timeout_ms = 5000"
    )  # on emulated processors it is late by a second at times
    with flows(netns_pair, 1) as older, running(made) as daemon:
        assert len(ours() - before) == 1
        with flows(netns_pair, 1) as newer, daemon.client() as client:
            for flow in (*older, *newer):
                flow.saturate(600)
                client.mark(flow.sender, Stage.P2D)
            assert client.flush(WAIT_S)
            for flow in (*older, *newer):
                wait_for(lambda flow=flow: algorithm_of(flow.sender) in ours(), "yielding")  # type: ignore[misc]
            rows = wait_for(lambda: daemon.status().yielding, "a row of the band")
            assert [(row.band, row.hosts) for row in rows] == [("level 4", 1)]
            request = pb.ExplainRequest(cookie=cookie_of(newer[0].sender))
            why = wait_for(
                lambda: [r for r in daemon.control(lambda c: c.Explain(request)).reasons if r.startswith("yields:")],
                "an explanation",
            )
            assert netns_pair.addr_b in why[0]
            plan = daemon.control(lambda c: c.GetPlan(pb.GetPlanRequest()))
            assert any("network.yield" in reason for reason in plan.devices[0].reasons)
            client.mark(newer[0].sender, Stage.COLLECTIVE)
            assert client.flush(WAIT_S)
            wait_for(lambda: not daemon.status().yielding or daemon.connections()[0].level == 0, "the promotion")
            assert algorithm_of(newer[0].sender) in ours()  # whose urgent part is cubic
            daemon.end(end)
            wait_for(lambda: ours() == before, "the algorithm to go")
            for flow in (*older, *newer):
                wait_for(lambda flow=flow: algorithm_of(flow.sender) == "cubic", "cubic again")  # type: ignore[misc]


@needs_it
def test_over_a_restart_they_go_on_yielding(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """The algorithm's link goes with the old daemon; who runs it keeps it, and obeys what was decided last."""
    before = ours()
    with managed(tmp_path) as manager, flows(netns_pair, 1) as (flow,), contextlib.ExitStack() as stack:
        daemon = Daemon(netns_pair, tmp_path, extra=ON)
        daemon.manager = manager
        stack.enter_context(running(daemon))
        with daemon.client() as client:
            client.mark(flow.sender, Stage.P2D)
            assert client.flush(WAIT_S)
            flow.saturate(600)
            name = wait_for(lambda: algorithm_of(flow.sender) in ours() and algorithm_of(flow.sender), "yielding")
            wait_for(lambda: set(manager.stored) >= {HOST}, "the descriptors to be stored")
            daemon.end(signal.SIGUSR1)
            assert name not in ours()
            arrived = flow.received
            wait_for(lambda: flow.received > arrived + MOVED, "traffic without a daemon")
            assert algorithm_of(flow.sender) == name
            daemon.start()
            wait_for(lambda: algorithm_of(flow.sender) in ours() - before, "the next one's")
            wait_for(lambda: daemon.status().yielding, "a row of the band")
        daemon.end(signal.SIGTERM)
        wait_for(lambda: ours() == before, "the algorithm to go")
        wait_for(lambda: algorithm_of(flow.sender) == "cubic", "cubic again")


@needs_it
def test_where_the_peers_link_is_slower_the_queue_may_be_longer(netns_pair: NetnsPair, tmp_path: Path) -> None:
    slower = f'[[peer]]\nnetwork = "{netns_pair.addr_b}"\nrate = "20mbit"\n'
    made = Daemon(netns_pair, tmp_path, extra=ON + slower)
    with running(made) as daemon, flows(netns_pair, 1) as (flow,), daemon.client() as client:
        client.mark(flow.sender, Stage.P2D)
        assert client.flush(WAIT_S)
        flow.saturate(600)
        # A quarter to all of 20 ms; 2 ms would be the own link's.
        wait_for(lambda: any(row.target_ms >= 5.0 for row in daemon.status().yielding), "the peer's target")


def test_without_the_capability_it_runs_without(netns_pair: NetnsPair, tmp_path: Path) -> None:
    wrap = ("setpriv", *SETPRIV)
    with running(Daemon(netns_pair, tmp_path, extra='[network]\nyield = "auto"\n', wrap=wrap)) as daemon:
        (notice,) = [n for n in daemon.status().notices if "yield" in n]
        assert (yielding.missing() or "CAP_PERFMON") in notice
        assert not daemon.status().yielding


def test_on_refuses_to_start_without_it(netns_pair: NetnsPair, tmp_path: Path) -> None:
    daemon = Daemon(netns_pair, tmp_path, extra=ON, wrap=("setpriv", *SETPRIV))
    with pytest.raises(AssertionError, match=re.escape(yielding.missing() or "CAP_PERFMON")), running(daemon):
        pass


def test_off_is_off(daemon: Daemon) -> None:
    with flows(daemon.pair, 1) as opened, daemon.client() as client:
        client.mark(opened[0].sender, Stage.P2D)
        assert client.flush(WAIT_S)
        opened[0].saturate()
        wait_for(lambda: daemon.bands()["level 4"].bytes > 1_000_000, "deferred traffic")
        assert algorithm_of(opened[0].sender) == "cubic"
        assert not daemon.status().yielding
