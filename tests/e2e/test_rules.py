# SPDX-License-Identifier: Apache-2.0
"""Rules alone, where no program knows mfsd: two classes with floors, on real TCP between namespaces."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from support.rig import RATE_MBIT, Daemon, Flow, flows, running
from support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

LINK = RATE_MBIT * 125_000
EXCHANGE, KV, STORE = 7001, 7000, 7002
BUSY = 6
"""As many saturating connections of the lower class keep its queue filled."""
RULES = f"""
[rules]
library = ["nccl"]
[[rule]]
name = "exchange"
stage = "collective"
remote_ports = {EXCHANGE}
[[rule]]
name = "reads"
stage = "p2d"
remote_ports = {KV}
[[rule]]
name = "stores"
stage = "background"
remote = "10.77.0.0/24"
remote_ports = "{STORE}-{STORE + BUSY}"
"""


@pytest.fixture
def ruled(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Daemon]:
    with running(Daemon(netns_pair, tmp_path, extra=RULES)) as d:
        yield d


def test_two_classes_with_floors_without_a_hint(ruled: Daemon) -> None:
    opened = [Flow.open(ruled.pair, EXCHANGE), *(Flow.open(ruled.pair, STORE + n) for n in range(BUSY))]
    exchange, *stores = opened
    try:
        with flows(ruled.pair, 1) as (unhinted,):
            before = ruled.bands()
            for flow in (*stores, unhinted):
                flow.saturate()
            # Alone with default traffic, the stores get the floor of their band, or the rest of the link.
            wait_for(lambda: unhinted.rate(0.3) > 0.5 * LINK, "unhinted traffic to stand above the stores")
            assert sum(f.received for f in stores) > 0
            exchange.saturate()
            wait_for(lambda: exchange.rate(0.3) > 0.6 * LINK, "the exchange to get the link")
            time.sleep(0.5)
            assert unhinted.rate(1.0) > 0.05 * LINK  # its floor is 10 %
            after = ruled.bands()
            grown = {name: after[name].bytes - before[name].bytes for name in after}
            assert grown["level 0"] > 1_000_000
            assert grown["background"] > 100_000
    finally:
        for flow in opened:
            flow.close()


def test_kv_has_as_much_beside_an_exchange_that_never_pauses_as_by_plain_sharing(
    netns_pair: NetnsPair, tmp_path: Path
) -> None:
    daemon = Daemon(netns_pair, tmp_path)
    daemon.write_config(RULES, policy='name = "demand-bound"')
    with running(daemon):
        opened = [Flow.open(netns_pair, port) for port in (EXCHANGE, KV)]
        exchange, kv = opened
        try:
            exchange.saturate()
            wait_for(lambda: exchange.rate(0.3) > 0.6 * LINK, "the exchange to get the link")
            kv.saturate()
            wait_for(lambda: kv.rate(0.5) > 0.4 * LINK, "half of the link for what somebody waits for")
            assert exchange.rate(0.5) > 0.35 * LINK
        finally:
            for flow in opened:
                flow.close()


def test_a_connection_that_is_older_than_the_daemon_is_found(netns_pair: NetnsPair, tmp_path: Path) -> None:
    flow = Flow.open(netns_pair, EXCHANGE)
    try:
        with running(Daemon(netns_pair, tmp_path, extra=RULES)) as daemon:
            wait_for(lambda: [c.band for c in daemon.connections()] == ["level 0"], "the rule to find it")
            shown = daemon.mfsctl("--socket", str(daemon.socket), "rules", "--port", str(EXCHANGE))
            assert "exchange: names it" in shown.stdout, (shown.stdout, shown.stderr)
            assert "stores: its remote port 7001 is not 7002-7008" in shown.stdout
            table = daemon.mfsctl("--socket", str(daemon.socket), "rules")
            assert "remote port 7001" in table.stdout
    finally:
        flow.close()
