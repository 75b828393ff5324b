# SPDX-License-Identifier: Apache-2.0
"""Hints that cross hosts, of what is due at no time."""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING

import pytest
from support.relays import SENDER, WAITER, Hosts, connection, from_sender, transfers
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Stage
from mfsd.lab.hosts.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.daemon

KB, MB = 1000, 1_000_000


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    authority = Authority(tmp_path / "ca")
    made = Hosts(tmp_path, authority.papers("sender.test", SENDER), authority.papers("waiter.test", WAITER))
    yield made
    made.stop()


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
