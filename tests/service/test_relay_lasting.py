# SPDX-License-Identifier: Apache-2.0
"""Hints that cross hosts, of what is due at no time, or takes longer than its time to live."""

from __future__ import annotations

import math
import socket
import time
from typing import Any

import pytest
from support.relays import Hosts, connection, from_sender, transfers
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Event, EventKind, Stage
from mfsd.ground.wire import OVERTIME_S

pytestmark = pytest.mark.daemon

KB, MB = 1000, 1_000_000


def test_a_request_without_a_deadline_has_none_on_the_other_host_either(hosts: Hosts) -> None:
    with connection() as (sends, waits), Client(target=hosts.waiter.target) as client:
        client.request("r", no_deadline=True)
        client.transfer("r/kv", from_sender(sends), KB, stage=Stage.P2D, request="r")
        assert client.flush(WAIT_S)
        assert list(wait_for(lambda: transfers(hosts.sender)).values()) == [math.inf]
        client.request("r", ttft_left_s=50.0)  # somebody has said when
        wait_for(lambda: 40 < next(iter(transfers(hosts.sender).values())) < 50)
        client.request("r", no_deadline=True)
        wait_for(lambda: list(transfers(hosts.sender).values()) == [math.inf])
        sends.sendall(bytes(KB))
        assert len(waits.recv(KB, socket.MSG_WAITALL)) == KB
        client.done(request="r")
        wait_for(lambda: hosts.sender.ask(lambda e: e.books.counters.ended_no_deadline) == 1)
        assert hosts.waiter.ask(lambda e: e.books.counters.ended_no_deadline) == 1


def test_what_outlives_its_time_on_the_other_host_is_kept_by_link_and_worker(hosts: Hosts) -> None:
    """For either daemon may restart. It is no event for who is served."""
    events: list[Event] = []
    with connection() as (sends, _), Client(target=hosts.waiter.target, on_event=events.append) as client:
        client.request("r", ttft_left_s=0.2, ttl_s=3.0)
        client.transfer("r/kv", from_sender(sends), MB, stage=Stage.P2D, request="r", ttl_s=3.0)
        (name,) = wait_for(lambda: transfers(hosts.sender))

        def tell(engine: Any) -> None:
            (session,) = [s for s in engine.books.sessions.values() if name in s.transfers]
            session.tell(Event(EventKind.OVERTIME, name.removesuffix("/kv"), name, ""))

        hosts.sender.ask(tell)
        assert client._link is not None
        ours = client._link._ledger
        wait_for(lambda: "r/kv" in ours._overtime)
        outgoing: Any = hosts.waiter.daemon.engine.elsewhere
        (link,) = outgoing._links.values()
        assert list(link._ledger._overtime) == [name]
        later = time.monotonic() + OVERTIME_S - 5.0
        assert {getattr(hint, "id", "") for hint in ours.alive(later)} == {"r", "r/kv"}
        wait_for(lambda: EventKind.EXPIRED in {e.kind for e in events})  # it did not really move
        wait_for(lambda: not ours._overtime and not link._ledger._overtime)
        assert "r/kv" not in {getattr(hint, "id", "") for hint in ours.alive(time.monotonic())}
    assert EventKind.OVERTIME not in {e.kind for e in events}
