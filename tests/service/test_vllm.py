# SPDX-License-Identifier: Apache-2.0
"""The mixin of vLLM's connectors, with a real daemon.

The connector below it is a stand-in that behaves as vLLM's base class says it must. With the real ones it was run by
hand: docs/integrations/vllm.md.
"""

from __future__ import annotations

import math
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.vllm import PER_TOKEN, PORTS, Mine, Request, advice_of, deadlines, flush, transfers
from support.waiting import wait_for

import mfsd.integrations.vllm as integration
from mfsd.client import Client
from mfsd.ground.model import Stage
from mfsd.integrations.vllm import MfsdConnector
from mfsd.integrations.vllm.backpressure import Pressure
from mfsd.integrations.vllm.deadline import AGREE_S, KEPT, STEP_MOST, SURE, Clocks, Computing, deadline_of
from mfsd.integrations.vllm.state import bytes_per_token
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemons import Running


@pytest.fixture
def mine(running: Running) -> Iterator[Mine]:
    connector = Mine({"mfsd_target": running.target})
    yield connector
    connector.shutdown()


def test_prefill_passes_the_deadline_on_and_decode_announces_its_kv(
    mine: Mine, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = time.time()
    xargs = SimpleNamespace(extra_args={"mfsd_ttft_slo_ms": 5000})
    first = Request("p", {"do_remote_decode": True}, xargs, arrived)
    mine.on_new_request(first)
    assert mine.calls == ["new"]
    flush(mine)
    assert deadlines(running)["p"] == pytest.approx(5.0, abs=0.5)
    mine._mfsd().ports = (PORTS[0], PORTS[1])
    delay, params = mine.request_finished(first, [1])
    assert delay
    assert params is not None
    assert params["mfsd_ports"] == PORTS
    assert params["mfsd_deadline_unix_ms"] == pytest.approx((arrived + 5) * 1000, abs=1)
    flush(mine)
    assert not deadlines(running)

    monkeypatch.setattr(mine._mfsd(), "ports", (0, 0))
    mine._mfsd().computing._took.append(1.0)
    second = Request("d", dict(params), None, arrived + 1)  # decode has seen nothing but what prefill has passed on
    mine.on_new_request(second)
    assert mine.get_num_new_matched_tokens(second, 0) == (1000, True)
    mine.update_state_after_alloc(second, None, 1000)
    mine.update_state_after_alloc(second, None, 0)  # as vLLM does when the blocks are there
    flush(mine)
    assert deadlines(running)["d"] == pytest.approx(arrived + 5 - time.time(), abs=0.5)
    (transfer,) = transfers(running)
    assert (transfer.id, transfer.stage) == ("d/kv", Stage.P2D)
    selector = transfer.stream.selector
    assert (str(selector.src), str(selector.dst)) == ("127.0.0.1", "127.0.0.1")
    assert (selector.sport.first, selector.sport.last) == tuple(PORTS)
    assert not transfer.stream.ordered
    size, due = running.ask(lambda e: [float(e.books.transfers.get(transfer, what)) for what in ("size", "deadline")])
    assert size == 1000 * PER_TOKEN
    assert due - time.monotonic() == pytest.approx(arrived + 4 - time.time(), abs=0.5)  # a second is for computing
    assert mine.build_connector_meta(SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(req_id="d")])) == "meta"
    flush(mine)
    batches = running.ask(lambda e: [len(b.requests) for s in e.books.sessions.values() for b in s.batches.values()])
    assert batches == [1]
    mine.update_connector_output(SimpleNamespace(finished_recving={"d", "other"}))
    mine.request_finished(second, [])
    flush(mine)
    assert "output" in mine.calls
    handed = running.ask(lambda e: [t.handed_over for s in e.books.sessions.values() for t in s.transfers.values()])
    assert handed in ([], [True])


def test_where_nobody_has_set_an_slo_kv_has_no_deadline(mine: Mine, running: Running) -> None:
    """Nor is one made up for the next host. Its end counts as neither met nor missed."""
    for how in ("arrives", "fails", "abort"):
        request = Request(how, {"remote_host": "127.0.0.1"})
        mine.on_new_request(request)
        assert mine.get_num_new_matched_tokens(request, 0) == (1000, True)
        mine.update_state_after_alloc(request, None, 1000)
    flush(mine)
    assert mine._mfsd().client.stats.rejected == 0
    assert deadlines(running) == dict.fromkeys(("arrives", "fails", "abort"), math.inf)
    due = running.ask(lambda e: {t.id: float(e.books.transfers.get(t, "deadline")) for t in e.books.transfers.objects})
    assert due == dict.fromkeys(("arrives/kv", "fails/kv", "abort/kv"), math.inf)
    mine.update_connector_output(SimpleNamespace(finished_recving={"arrives"}, failed_recving={"fails"}))
    for how in ("arrives", "fails", "abort"):
        again = Request(how, {"do_remote_decode": True})
        _, params = mine.request_finished(again, [])
        assert params is not None
        assert not {"mfsd_deadline_unix_ms", "mfsd_ttft_left_ms"} & params.keys()
    flush(mine)
    counters = running.ask(lambda e: e.books.counters)
    assert (counters.deadlines_met, counters.deadlines_missed) == (0, 0)


def test_what_is_aborted_or_fails_is_cancelled(mine: Mine, running: Running) -> None:
    for how in ("abort", "fail"):
        request = Request(how, {"remote_host": "127.0.0.1", "mfsd_ttft_slo_ms": 60_000})
        mine.on_new_request(request)
        mine.update_state_after_alloc(request, None, 10)
    flush(mine)
    assert len(transfers(running)) == 2
    mine.request_finished(Request("abort"), [])
    mine.update_connector_output(SimpleNamespace(failed_recving={"fail"}))
    flush(mine)
    assert not transfers(running)
    assert list(deadlines(running)) == ["fail"]  # which goes on, by recomputing


def test_kv_of_a_store_is_stage_1(running: Running) -> None:
    mine = Mine({"mfsd_target": running.target, "mfsd_store": "127.0.0.1:6379", "mfsd_ttft_slo_ms": 1000})
    try:
        request = Request("r")
        mine.on_new_request(request)
        mine.update_state_after_alloc(request, None, 10)
        flush(mine)
        (transfer,) = transfers(running)
        assert transfer.stage is Stage.KV_REUSE
        assert transfer.stream.selector.sport.first == transfer.stream.selector.sport.last == 6379
    finally:
        mine.shutdown()


def test_kv_that_would_be_late_is_not_loaded_if_so_configured(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Mine({"mfsd_target": running.target, "mfsd_recompute": True, "mfsd_ttft_slo_ms": 1000})
    try:
        request = Request("r", {"remote_host": "127.0.0.1"})
        assert mine.get_num_new_matched_tokens(request, 0) == (1000, True)  # nothing is known yet

        def advise(rate: float) -> None:
            monkeypatch.setattr("mfsd.api.advice.advice", lambda *_: advice_of(rate))
            mine._mfsd().client.advice("127.0.0.1", source="127.0.0.1")
            client = mine._mfsd().client
            wait_for(lambda: (a := client.advice("127.0.0.1", source="127.0.0.1")) is not None and a.rate == rate)

        advise(1000 * PER_TOKEN / 0.5)
        assert mine.get_num_new_matched_tokens(request, 0) == (1000, True)
        advise(1000 * PER_TOKEN / 2.0)
        assert mine.get_num_new_matched_tokens(request, 0) == (0, False)
    finally:
        mine.shutdown()


class Old:
    """A connector that lacks what came later."""

    def __init__(self, target: str) -> None:
        self._vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config={"mfsd_target": target})
        )

    def update_state_after_alloc(self, *_: Any) -> str:
        return "as before"


class Ancient(MfsdConnector, Old):
    pass


def test_nothing_of_ours_ever_reaches_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    for target in ("unix:/nowhere/mfsd.sock", "not a target", ""):
        one = Ancient(target)
        one.on_new_request(object())  # without any attribute that we need
        one.on_new_request(Request("r", {"mfsd_ttft_slo_ms": "soon"}, None, float("nan")))
        one.update_connector_output(object())
        for odd in ({"remote_host": 7}, {"remote_host": "no such host"}, {"mfsd_ports": "x", "remote_host": "::1"}):
            assert one.update_state_after_alloc(Request("r", odd), None, 10) == "as before"
        one.shutdown()
    assert all("serving goes on" in r.message or "mfsd" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("params", "xargs", "config", "deadline"),
    [
        ({"mfsd_deadline_unix_ms": 5e6}, {"mfsd_deadline_unix_ms": 6e6}, {}, 5000.0),
        (None, {"mfsd_deadline_unix_ms": "6000000"}, {"mfsd_ttft_slo_ms": 1}, 6000.0),
        ({"mfsd_ttft_slo_ms": 500}, {"x-llm-d-slo-ttft-ms": "900"}, {}, 100.5),
        ({}, {"x-llm-d-slo-ttft-ms": "900"}, {"mfsd_ttft_slo_ms": 1}, 100.9),
        (None, {"x-slo-ttft-ms": 900, "mfsd_ttft_slo_ms": True}, {}, 100.9),
        (None, None, {"mfsd_ttft_slo_ms": 200, "mfsd_ttft_slo_ms_per_token": 1}, 101.2),
        ({"mfsd_ttft_slo_ms": "soon"}, {"mfsd_ttft_slo_ms": "inf"}, {}, None),
        (None, None, {}, None),
    ],
)
def test_where_a_deadline_comes_from(params: Any, xargs: Any, config: Any, deadline: float | None) -> None:
    assert deadline_of(params, xargs, config, 100.0, 1000) == (None if deadline is None else pytest.approx(deadline))


def test_a_clock_that_is_set_changes_no_deadline(mine: Mine, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a host, nor between two, from the first request on if decode's is behind."""

    def by(seconds: float) -> None:
        real = time.time
        monkeypatch.setattr("mfsd.integrations.vllm.state.time", SimpleNamespace(
            time=lambda: real() + seconds, monotonic=time.monotonic))  # fmt: skip

    def due(name: str) -> float:
        flush(mine)
        return deadlines(running)[name]

    first = Request("p", {"do_remote_decode": True}, SimpleNamespace(extra_args={"mfsd_ttft_slo_ms": 60_000}))
    mine.on_new_request(first)
    by(-3600.0)
    _, params = mine.request_finished(first, [1])
    assert params is not None
    assert params["mfsd_ttft_left_ms"] == pytest.approx(60_000, abs=5_000)
    for number, behind in enumerate((3600.0, 7200.0)):
        by(-3600.0 - behind)
        second = Request(f"d{number}", dict(params))
        mine.on_new_request(second)
        assert due(second.request_id) == pytest.approx(60.0, abs=5.0)
        by(+3600.0)
        mine.update_state_after_alloc(second, None, 1000)  # says the deadline again
        assert due(second.request_id) == pytest.approx(60.0, abs=5.0)


def test_clocks_that_disagree_are_found_out() -> None:
    clocks, now = Clocks(), 1000.0

    def ahead(by: float, took: float, host: str = "p") -> float:
        """Decode's clock by so much, of a request with 2 s left."""
        params = {"mfsd_deadline_unix_ms": (now + 2.0) * 1e3, "mfsd_ttft_left_ms": 2e3}
        return clocks.ahead(params, host, now + took + by)

    assert ahead(-3.0, 0.01) == pytest.approx(-2.99)  # at once
    assert [ahead(-3.0, took) for took in (0.7, 0.001)] == pytest.approx([-2.99, -2.999])
    assert ahead(0.0, 0.01, "q") == 0.0
    # One that is ahead when none of several has taken less than that;
    assert [ahead(9.0, 0.2 + 0.01 * i, "r") for i in range(SURE - 1)] == [0.0] * (SURE - 1)
    assert ahead(9.0, 0.4, "r") == pytest.approx(9.2)
    # what took long is no other clock once one has been quick, nor what requests may always take.
    assert [ahead(0.0, took, "q") for took in (9.0,) * SURE] == [0.0] * SURE
    assert [ahead(0.0, AGREE_S * 0.9, "s") for _ in range(SURE)] == [0.0] * SURE
    # Set forward, it is found out when the old ones are forgotten.
    assert [ahead(5.0, 0.01, "q") for _ in range(KEPT)][-1] == pytest.approx(5.01)
    # Absolute deadlines of somebody else are taken at their word.
    assert clocks.ahead({"mfsd_deadline_unix_ms": 1.0}, "t", now) == clocks.ahead(None, "", now) == 0.0


def test_kv_is_due_before_its_token_by_what_computing_that_takes() -> None:
    computing = Computing()
    assert computing.before(2.0) == 2.0  # nobody knows
    computing.loaded("a", 10.0)
    computing.step(10.001)  # with it
    computing.loaded("b", 10.02)
    computing.step(10.04)  # its token is there; and with b
    assert computing.before(2.0) == pytest.approx(1.96)
    computing.over("b", 10.1)
    computing.over("b", 11.0)
    computing.step(12.0)
    assert computing.before(2.0) == pytest.approx(2.0 - (0.04 + 0.08) / 2)
    computing.loaded("aborted", 13.0)
    computing.over("aborted", 19.0)
    assert computing.before(2.0) == pytest.approx(1.94)
    assert computing.before(0.1) == pytest.approx(0.1 * (1 - STEP_MOST))
    assert computing.before(-0.1) == -0.1


def test_bytes_per_token() -> None:
    cache = SimpleNamespace(num_blocks=10, kv_cache_tensors=[SimpleNamespace(size=320 * 7)])
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=32), parallel_config=object())
    assert bytes_per_token(config, cache, {}) == 7
    assert bytes_per_token(config, cache, {"mfsd_bytes_per_token": 9}) == 9
    assert bytes_per_token(object(), object(), {}) == 0


def test_stores_give_way_while_what_is_announced_needs_the_link(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(target=running.target) as client:
        pressure = Pressure(client, "127.0.0.1", spare=0.2, busy_s=0.01)
        assert not pressure.there()  # nobody knows yet
        for spare, queued, want in ((0.1, 0.5, True), (0.5, 0.5, False), (0.1, 0.001, False)):
            answer = pb.Advice(
                known=True, rate_bytes_per_s=1e6, spare_bytes_per_s=spare * 1e6, device_queued_bytes=queued * 1e6
            )
            monkeypatch.setattr("mfsd.api.advice.advice", lambda *_, answer=answer: answer)
            wait_for(lambda queued=queued, spare=spare: (a := client.advice("127.0.0.1")) is not None  # type: ignore[misc]
                     and (a.spare, a.device_queued) == (spare * 1e6, queued * 1e6))  # fmt: skip
            assert pressure.there() is want
    assert not Pressure(Client(target=""), "127.0.0.1", 0.2, 0.01).there()


@pytest.mark.skipif("vllm" in sys.modules, reason="needs an environment without vLLM")
def test_without_vllm_the_module_can_be_imported_and_says_what_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        _ = integration.MfsdNixlConnector
    with pytest.raises(AttributeError):
        _ = integration.MfsdOther
