# SPDX-License-Identifier: Apache-2.0
"""Thirty urgent connections of one user beside one of another: shares are per user, and one user pays for itself."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest
from support.habits import MB
from support.rig import Daemon, Flow, running
from support.waiting import wait_for

from mfsd.client import EventKind, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.client import Event

pytestmark = pytest.mark.netns
A, B = 1001, 1002


@contextlib.contextmanager
def crowd(pair: NetnsPair, many: int) -> Iterator[tuple[list[Flow], Flow]]:
    opened: list[Flow] = []
    try:
        for _ in range(many):
            opened.append(Flow.open(pair, uid=A))  # noqa: PERF401 - those already open must be closed if one fails
        opened.append(Flow.open(pair, uid=B))
        yield opened[:-1], opened[-1]
    finally:
        for flow in opened:
            flow.close()


def share(flows: list[Flow], one: Flow, seconds: float) -> float:
    """Of all that arrives, how much ``one`` gets."""
    before, own = sum(f.received for f in flows), one.received
    time.sleep(seconds)
    mine = one.received - own
    return mine / (sum(f.received for f in flows) - before + mine)


def test_thirty_collectives_of_one_user_beside_one_of_another(daemon: Daemon) -> None:
    told: list[Event] = []
    with crowd(daemon.pair, 30) as (many, one), daemon.client(on_event=told.append) as client:
        for flow in (*many, one):
            client.mark(flow.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        for flow in (*many, one):
            flow.saturate()
        wait_for(lambda: daemon.status().counters.demotions, "a demotion")
        assert share(many, one, 3.0) > 0.25  # a thirtieth of it is what connections get
        status = daemon.status()
        assert {t.uid: t.connections for t in status.tenants} == {A: 30, B: 1}
        assert max(status.tenants, key=lambda t: t.demotions).uid == A
        wait_for(lambda: [e for e in told if e.kind is EventKind.DEMOTED], "the word")
        shown = daemon.mfsctl("--socket", str(daemon.socket), "status").stdout
        assert "allowed" in shown


def test_one_user_alone_is_never_demoted(daemon: Daemon) -> None:
    with crowd(daemon.pair, 4) as (many, other), daemon.client() as client:
        for flow in many:
            client.mark(flow.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        for flow in (*many, other):
            flow.saturate()
        wait_for(lambda: sum(f.received for f in many) > 40 * MB, "traffic")
        assert daemon.status().counters.demotions == 0


def test_a_fixed_share_keeps_a_user_below_unhinted_traffic(netns_pair: NetnsPair, tmp_path: Path) -> None:
    extra = "[tenants]\nurgent_share = 0.3\n"
    with (
        running(Daemon(netns_pair, tmp_path, extra=extra)) as daemon,
        crowd(netns_pair, 8) as (many, plain),
        daemon.client() as client,
    ):
        for flow in many:
            client.mark(flow.sender, Stage.COLLECTIVE)
        assert client.flush(5)
        for flow in (*many, plain):
            flow.saturate()
        wait_for(lambda: daemon.status().counters.demotions, "a demotion")
        assert share(many, plain, 3.0) > 0.4
