# SPDX-License-Identifier: Apache-2.0
"""Operators who turn network.yield off and on again under way."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Final

import pytest
from support.manager import managed
from support.rig import Daemon, flows, running
from support.waiting import WAIT_S, wait_for
from support.yielders import needs_it

from mfsd.client import Stage
from mfsd.client.manners import AVAILABLE
from mfsd.daemon.predecessor import HOST
from mfsd.datapath.bpf import yielding
from mfsd.lab.hosts.tcp import algorithm_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.manager import Manager
    from support.namespaces import NetnsPair

ON: Final = '[network]\nyield = "on"\nreplace = true\n'
OFF: Final = '[network]\nyield = "off"\n'

pytestmark = [pytest.mark.netns, needs_it]


def ours() -> set[str]:
    return {name for name in AVAILABLE.read_text().split() if name.startswith(yielding.NAME)}


def change(daemon: Daemon, manager: Manager, extra: str) -> None:
    """Restart it with another configuration."""
    wait_for(lambda: set(manager.stored) >= {HOST}, "the descriptors to be stored")
    daemon.write_config(extra)
    daemon.end(signal.SIGUSR1)
    daemon.start()


def test_off_and_on_again_over_restarts(netns_pair: NetnsPair, tmp_path: Path) -> None:
    before = ours()
    with managed(tmp_path) as manager, flows(netns_pair, 1) as (flow,), contextlib.ExitStack() as stack:
        daemon = Daemon(netns_pair, tmp_path, extra=ON)
        daemon.manager = manager
        stack.enter_context(running(daemon))
        with daemon.client() as client:
            client.mark(flow.sender, Stage.P2D)
            assert client.flush(WAIT_S)
            flow.saturate(600)
            wait_for(lambda: algorithm_of(flow.sender) in ours(), "yielding")
            change(daemon, manager, OFF)
            assert ours() == before
            wait_for(lambda: algorithm_of(flow.sender) == "cubic", "cubic again")
            change(daemon, manager, ON)
            wait_for(lambda: algorithm_of(flow.sender) in ours() - before, "yielding again")
        daemon.end(signal.SIGTERM)
        wait_for(lambda: ours() == before, "the algorithm to go")
        wait_for(lambda: algorithm_of(flow.sender) == "cubic", "cubic again")
