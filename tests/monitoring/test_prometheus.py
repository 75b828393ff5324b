# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus reads a daemon that steers real traffic: each query of the dashboard has an answer."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from support.prometheus import DASHBOARD, FOLDER, Prometheus, programs, watching
from support.rig import Daemon, Flow, running
from support.waiting import wait_for

from mfsd.client import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.namespaces import NetnsPair

    from mfsd.client import Client

pytestmark = pytest.mark.netns

TARGET: Final = "127.0.0.1:9464"
RULES: Final = FOLDER / "rules.yml"
WINDOW: Final = "20s"
"""In place of $__rate_interval."""
BUSY: Final = 6
LAST: Final = "level 4"
"""Where stage 3 without a deadline is, by the rig's policy."""
QUERIES: Final = [(p["title"], t["expr"]) for p in DASHBOARD["panels"] for t in p.get("targets", ())]


@pytest.fixture
def prometheus(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[tuple[Daemon, Prometheus]]:
    netns_pair.run(netns_pair.a, "ip link set lo up")
    with (
        running(Daemon(netns_pair, tmp_path, extra=f'[metrics]\nlisten = "{TARGET}"\n')) as daemon,
        watching(netns_pair, tmp_path, TARGET, RULES) as found,
    ):
        yield daemon, found


def rescued(daemon: Daemon, client: Client, flows: list[Flow]) -> None:
    """A deferred connection behind saturating ones is promoted, and rescued."""
    late, *busy = flows
    for flow in busy:
        client.mark(flow.sender, Stage.KV_REUSE)
    client.mark(late.sender, Stage.P2D)
    assert client.flush(5)
    for flow in busy:
        flow.saturate()
    wait_for(lambda: sum(f.received for f in busy) > 5_000_000, "the link to be busy")
    late.saturate()
    wait_for(lambda: daemon.bands()[LAST].backlog_bytes > 0, "the deferred connection to be stuck")
    client.mark(late.sender, Stage.COLLECTIVE)
    wait_for(lambda: daemon.status().counters.rescues > 0, "its rescue")


def requests(client: Client, flow: Flow) -> None:
    """One that is in time, one that is late, one hint that is refused; and one that stays."""
    for name, left in (("in-time", 30.0), ("late", -1.0)):
        client.request(name, ttft_left_s=left)
        for stage in (Stage.KV_REUSE, Stage.COLLECTIVE, Stage.P2D):
            client.transfer(f"{name}-{stage.name}", flow.sender, 50_000, stage=stage, request=name)
        assert client.flush(5)
        flow.sender.sendall(bytes(150_000))
        client.done(request=name)
        assert client.flush(5)
    client.request("stays", ttft_left_s=60.0)
    client.transfer("stays", flow.sender, 1_000_000, stage=Stage.P2D, request="stays")
    client.layer("nobody", 3)
    client.flush(5)


def answer(prometheus: Prometheus, expression: str) -> list[float]:
    for name, value in (("$__rate_interval", WINDOW), ("$instance", ".*"), ("$device", ".*")):
        expression = expression.replace(name, value)
    assert "$" not in expression
    return [v for v in prometheus.query(expression) if not math.isnan(v)]


def test_every_query_of_the_dashboard_returns_data(prometheus: tuple[Daemon, Prometheus]) -> None:
    daemon, found = prometheus
    opened = [Flow.open(daemon.pair) for _ in range(BUSY + 2)]
    try:
        with daemon.client() as client:
            rescued(daemon, client, opened[: BUSY + 1])
            for flow in opened[: BUSY + 1]:
                flow.close()
            requests(client, opened[-1])
            wait_for(lambda: daemon.status().counters.deadlines_missed == 1, "both requests to end")
            for title, expression in QUERIES:
                wait_for(lambda e=expression: answer(found, e), f"{title}: {expression}")  # type: ignore[misc]
            for result in ("met", "missed"):
                total = f'mfsd_requests_ended_total{{result="{result}"}}'
                wait_for(lambda q=total: found.query(q) == [1.0], total)  # type: ignore[misc]
            series = found.get("query_exemplars", query="mfsd_request_slack_seconds_bucket", start="0", end="9e9")
            named = {e["labels"]["request_id"] for s in series for e in s["exemplars"]}
            assert named == {"in-time", "late"}
    finally:
        for flow in opened:
            flow.close()
    rules: list[dict[str, Any]] = [r for g in found.get("rules")["groups"] for r in g["rules"]]
    assert len(rules) == 8
    assert {r["health"] for r in rules} == {"ok"}


def test_the_rules_are_what_promtool_takes() -> None:
    done = subprocess.run([programs()[1], "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_where_it_should_and_nowhere_else() -> None:
    cases = Path(__file__).with_name("alerts.yml")
    done = subprocess.run([programs()[1], "test", "rules", str(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for alert in re.findall(r"alert: (\w+)", RULES.read_text()):
        assert f'alertname="{alert}"' in cases.read_text()
