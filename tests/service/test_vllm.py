# SPDX-License-Identifier: Apache-2.0
"""The mixin of vLLM's connectors, with a real daemon.

The connector below it is a stand-in that behaves as vLLM's base class says it must. With the real ones it was run by
hand: docs/integrations/vllm.md.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import WAIT_S, wait_for

import mfsd.integrations.vllm as integration
from mfsd.client import Client
from mfsd.integrations.vllm import MfsdConnector
from mfsd.integrations.vllm.backpressure import Pressure
from mfsd.integrations.vllm.deadline import deadline_of
from mfsd.integrations.vllm.state import bytes_per_token
from mfsd.model import Stage
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemons import Running

BLOCK = 32
PER_TOKEN = 1000
PORTS = [20000, 20099]


@dataclass
class Request:
    """As vllm.v1.request.Request."""

    request_id: str
    kv_transfer_params: dict[str, Any] | None = None
    sampling_params: Any = None
    arrival_time: float = field(default_factory=time.time)
    num_prompt_tokens: int = 1000


class Connector:
    """As KVConnectorBase_V1."""

    def __init__(self, extra: dict[str, Any]) -> None:
        self._vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
            cache_config=SimpleNamespace(block_size=BLOCK),
            parallel_config=SimpleNamespace(tensor_parallel_size=2),
        )
        tensors = [SimpleNamespace(size=100 * BLOCK * PER_TOKEN // 4)] * 2
        self._kv_cache_config = SimpleNamespace(num_blocks=100, kv_cache_tensors=tensors)
        self.calls: list[str] = []

    def on_new_request(self, request: Any) -> None:
        del request
        self.calls.append("new")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        del request
        return 1000 - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        del blocks, num_external_tokens
        if request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False

    def build_connector_meta(self, scheduler_output: Any) -> str:
        del scheduler_output
        return "meta"

    def update_connector_output(self, connector_output: Any) -> None:
        del connector_output
        self.calls.append("output")

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        del block_ids
        if request.kv_transfer_params and request.kv_transfer_params.get("do_remote_decode"):
            return True, {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 5600}
        return False, None

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class Mine(MfsdConnector, Connector):
    pass


@pytest.fixture
def mine(running: Running) -> Iterator[Mine]:
    connector = Mine({"mfsd_target": running.target})
    yield connector
    connector.shutdown()


def flush(connector: Mine) -> None:
    assert connector._mfsd().client.flush(WAIT_S)


def deadlines(running: Running) -> dict[str, float]:
    return running.ask(
        lambda e: {
            r.id: float(e.books.requests.get(r, "deadline")) - time.monotonic()
            for s in e.books.sessions.values()
            for r in s.requests.values()
        }
    )


def transfers(running: Running) -> list[Any]:
    return running.ask(lambda e: [t for s in e.books.sessions.values() for t in s.transfers.values()])


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
    size = running.ask(lambda e: float(e.books.transfers.get(transfer, "size")))
    assert size == 1000 * PER_TOKEN
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


@dataclass
class Entry:
    """As NIXL's ReqMeta."""

    local_block_ids: tuple[list[int], ...]
    awaiting_kvs: bool = True


class Pulls(MfsdConnector, Connector):
    """Both sides in one, as NIXL's pull connector has them."""

    def __init__(self, extra: dict[str, Any], policy: str = "recompute") -> None:
        super().__init__(extra)
        self._vllm_config.kv_transfer_config.kv_load_failure_policy = policy
        self.to_recv: dict[str, Entry] = {}
        self.started: list[str] = []

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def step(self) -> list[str]:
        """One step of scheduler and worker; what the worker starts to read."""
        meta = self.build_connector_meta(SimpleNamespace(scheduled_new_reqs=[]))
        self._connector_metadata = meta
        self.start_load_kv(None)
        return self.started

    def expect(self, name: str, left_s: float, block: int) -> Request:
        request = Request(name, {"remote_host": "127.0.0.1", "mfsd_ttft_slo_ms": left_s * 1000})
        self.on_new_request(request)
        self.update_state_after_alloc(request, None, 100)
        self.to_recv[name] = Entry(([block, block + 1],))
        return request


class _Pull(Connector):
    """What stands below the mixin."""

    to_recv: dict[str, Entry]
    started: list[str]
    _connector_metadata: Any

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        del scheduler_output
        out, self.to_recv = SimpleNamespace(reqs_to_recv=self.to_recv), {}
        return out

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        del forward_context
        self.started = [n for n, e in self._connector_metadata.reqs_to_recv.items() if e.awaiting_kvs]

    def get_transfer_results(self, finished_req_ids: Any) -> Any:
        del finished_req_ids
        return SimpleNamespace(finished_recving=set(), failed_recving=set())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set()


class Pull(Pulls, _Pull):
    pass


def results(pull: Pull) -> tuple[set[str], set[str], set[int]]:
    out = pull.get_transfer_results(set())
    return out.finished_recving, out.failed_recving, pull.get_block_ids_with_load_errors()


def test_loose_reads_wait_for_tight_ones_and_start_when_those_are_over(running: Running) -> None:
    pull = Pull({"mfsd_target": running.target, "mfsd_hold": True})
    try:
        pull.expect("loose", 60.0, 10)
        assert pull.step() == ["loose"]
        pull.expect("tight", 1.0, 20)
        pull.expect("looser", 90.0, 30)
        pull.expect("later", 5.0, 40)
        assert pull.step() == ["tight"]  # never held back by what is due later, though that is on its way
        pull._mfsd().client.flush(WAIT_S)
        assert {t.id for t in transfers(running)} == {"loose/kv", "tight/kv"}
        assert pull.step() == []
        pull.update_connector_output(SimpleNamespace(finished_recving={"tight"}))
        assert pull.step() == ["later"]
        pull.update_connector_output(SimpleNamespace(finished_recving={"later"}))
        assert pull.step() == []
        pull.update_connector_output(SimpleNamespace(failed_recving={"loose"}))
        assert pull.step() == ["looser"]
        assert results(pull) == (set(), set(), set())
    finally:
        pull.shutdown()


def test_a_read_that_waits_is_started_when_it_can_wait_no_longer(running: Running) -> None:
    pull = Pull({"mfsd_target": running.target, "mfsd_hold": True})
    try:
        pull.expect("tight", 1.0, 10)
        pull.expect("loose", 60.0, 20)
        assert pull.step() == ["tight"]
        hold = pull._mfsd().hold
        assert hold is not None
        hold.waiting["loose"].alone_s = 31.0
        assert pull.step() == ["loose"]
        pull.expect("looser", 90.0, 30)
        assert pull.step() == []
        hold.waiting["looser"].since -= 10.0
        assert pull.step() == ["looser"]
    finally:
        pull.shutdown()


def test_what_is_aborted_while_it_waits_or_can_t_be_in_time_is_reported_as_failed(running: Running) -> None:
    pull = Pull({"mfsd_target": running.target, "mfsd_hold": True, "mfsd_recompute": True})
    try:
        pull.expect("tight", 1.0, 10)
        aborted = pull.expect("aborted", 60.0, 20)
        pull.expect("hopeless", 70.0, 30)
        assert pull.step() == ["tight"]
        pull.request_finished(aborted, [])
        hold = pull._mfsd().hold
        assert hold is not None
        hold.waiting["hopeless"].alone_s = 71.0
        assert pull.step() == []
        told = pull._connector_metadata.reqs_to_recv
        assert {n: (e.local_block_ids, e.awaiting_kvs) for n, e in told.items()} == dict.fromkeys(
            ("aborted", "hopeless"), (([],), False)
        )  # the prefill host hears that it may free their blocks
        assert results(pull) == ({"aborted", "hopeless"}, {"aborted", "hopeless"}, {20, 21, 30, 31})
        assert results(pull) == (set(), set(), set())
        assert not hold.waiting
    finally:
        pull.shutdown()


def test_nothing_is_given_up_where_vllm_would_fail_the_request(running: Running) -> None:
    pull = Pull({"mfsd_target": running.target, "mfsd_hold": True, "mfsd_recompute": True}, "fail")
    try:
        pull.expect("tight", 1.0, 10)
        pull.expect("hopeless", 70.0, 30)
        hold = pull._mfsd().hold
        assert hold is not None
        hold.expected["hopeless"].alone_s = 71.0
        assert pull.step() == ["tight", "hopeless"]
    finally:
        pull.shutdown()


def test_reads_start_whatever_fails_in_holding_them(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    pull = Pull({"mfsd_target": running.target, "mfsd_hold": True})
    try:
        pull.expect("tight", 1.0, 10)
        pull.expect("loose", 60.0, 20)
        hold = pull._mfsd().hold
        assert hold is not None
        hold.expected["tight"].deadline = "soon"  # type: ignore[assignment]  # nobody can sort that
        assert sorted(pull.step()) == ["loose", "tight"]
        assert "holding reads back" in caplog.text
    finally:
        pull.shutdown()


def advice_of(rate: float) -> Any:
    return pb.Advice(known=True, rate_bytes_per_s=rate)


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
