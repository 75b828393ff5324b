# SPDX-License-Identifier: Apache-2.0
"""The Control service, health and reflection of a daemon without devices."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.daemons import Api, Running, call_violation
from support.waiting import wait_for

import mfsd
from mfsd.client import cookie_of
from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import hints_pb2
from mfsd.v1.hints_pb2 import Hint, Request, Selector, Transfer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


@pytest.fixture
def busy(api: Api, connection: tuple[socket.socket, socket.socket]) -> int:
    """One request with two transfers on one connection; the socket's cookie."""
    cookie = cookie_of(connection[0])
    selector = Selector(cookie=cookie)
    stage = hints_pb2.STAGE_P2D
    reply = api.send(
        Hint(request=Request(id="r", ttft_left_us=30_000_000)),
        *(
            Hint(transfer=Transfer(id=name, request_id="r", stage=stage, bytes=1000, selector=selector))
            for name in ("t1", "t2")
        ),
    )
    assert reply.accepted == 3
    return cookie


def failing(call: Any, request: Any) -> Any:
    """The error of a call, which is an RpcError and a Call at the same time."""
    with pytest.raises(grpc.RpcError) as e:
        call(request, timeout=20)
    return e.value


def test_status(api: Api, running: Running, busy: int) -> None:
    assert busy
    wait_for(lambda: api.control.ListConnections(pb.ListConnectionsRequest()).connections[0].level >= 0)
    status = api.control.GetStatus(pb.GetStatusRequest())
    assert status.version == mfsd.__version__
    assert status.epoch == running.ask(lambda e: e.epoch)
    assert (status.mode, status.paused, status.policy) == (pb.MODE_OBSERVE, False, "demand-bound")
    assert (status.sessions, status.requests, status.transfers, status.connections) == (1, 1, 2, 1)
    assert status.slots == running.config.daemon.slots
    assert status.counters.hints_accepted == 3
    assert status.uptime_s > 0
    assert status.rss_bytes > 1 << 20
    assert status.tick_p99_ms >= status.tick_p50_ms > 0
    assert list(status.notices) == ["no [[device]] is configured: hints are taken, nothing is shaped"]


def test_lists(api: Api, busy: int) -> None:
    (one,) = api.control.ListConnections(pb.ListConnectionsRequest()).connections
    assert (one.cookie, one.transfers, one.bytes_left, one.session) == (busy, 2, 2000, "test")
    assert one.expires_us > 0
    transfers = api.control.ListTransfers(pb.ListTransfersRequest()).transfers
    assert {t.id for t in transfers} == {"t1", "t2"}
    assert {(t.request_id, t.stage, t.bytes, t.slot) for t in transfers} == {("r", hints_pb2.STAGE_P2D, 1000, one.slot)}
    assert all(0 < t.deadline_us <= 30_000_000 for t in transfers)
    assert not any(t.HasField("rli") for t in transfers)
    assert len(api.control.ListTransfers(pb.ListTransfersRequest(page_size=1)).transfers) == 1


def paged(call: Any, request: Any, rows: str, size: int, between: Callable[[], object] = lambda: None) -> list[Any]:
    """All rows, page by page."""
    out: list[Any] = []
    while True:
        request.page_size = size
        page = call(request, timeout=20)
        got = getattr(page, rows)
        assert len(got) <= (size or 1000)
        out += got
        if not page.next_page_token:
            return out
        request.page_token = page.next_page_token
        between()


def fill(api: Api, running: Running) -> None:
    """2,500 transfers of five requests on 200 connections; most of them tie."""
    here, there = hints_pb2.PortRange(first=1), "10.1.2.3"
    bridged = [
        Selector(tuple=hints_pb2.Tuple(src_addr=f"10.0.{i}.1", src_port=here, dst_addr=there, dst_port=here))
        for i in range(200)
    ]
    for n in range(5):
        request = Hint(request=Request(id=f"r{n}", ttft_left_us=30_000_000 + 1_000_000 * n))
        columns = hints_pb2.TransferColumns(
            ids=[f"r{n}/{i}" for i in range(500)],
            owners=[f"r{n}"],
            request=[1],
            stage=[hints_pb2.STAGE_P2D],
            bytes=[1000],
            selectors=bridged,
            selector=[i % 200 for i in range(500)],
        )
        assert not api.send(request, transfers=columns).rejected
    assert running.ask(lambda e: e.books.transfers.n) == 2500


def test_pages_make_up_the_list(api: Api, running: Running) -> None:
    fill(api, running)
    for size in (0, 7, 600, 5000):
        transfers = paged(api.control.ListTransfers, pb.ListTransfersRequest(), "transfers", size)
        assert len(transfers) == len({t.id for t in transfers}) == 2500
        order = [(t.level, t.request_id) for t in transfers]
        assert order == sorted(order)
        connections = paged(api.control.ListConnections, pb.ListConnectionsRequest(), "connections", size)
        assert len(connections) == len({c.slot for c in connections}) == 200
        assert [c.band for c in connections] == sorted(c.band for c in connections)


def test_what_comes_and_goes_between_pages_hides_nothing_else(api: Api, running: Running) -> None:
    fill(api, running)
    gone, came = iter(range(500)), iter(range(500))

    def change() -> None:
        api.send(
            Hint(cancellation=hints_pb2.Cancellation(transfer_id=f"r0/{next(gone)}")),
            Hint(
                transfer=Transfer(
                    id=f"new{next(came)}",
                    request_id="r0",
                    stage=hints_pb2.STAGE_KV_REUSE,
                    bytes=1,
                    selector=Selector(cookie=1),
                )
            ),
        )

    listed = paged(api.control.ListTransfers, pb.ListTransfersRequest(), "transfers", 100, change)
    ids = [t.id for t in listed]
    assert len(ids) == len(set(ids))
    assert set(ids) >= {f"r{n}/{i}" for n in range(1, 5) for i in range(500)}


def test_a_token_that_is_none_is_an_error(api: Api) -> None:
    for call, request in (
        (api.control.ListTransfers, pb.ListTransfersRequest(page_token="x")),  # noqa: S106 - no password
        (api.control.ListConnections, pb.ListConnectionsRequest(page_token="AAAA")),  # noqa: S106
    ):
        error = failing(call, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert call_violation(error)[1] == "page_token"


def test_selectors_that_match_nothing_are_named_and_a_few_only(api: Api, busy: int) -> None:
    assert busy
    none = "which matches no connection"

    def named(count: int) -> list[str]:
        def told() -> list[str]:
            status = api.control.GetStatus(pb.GetStatusRequest())
            return [n for n in status.notices if "match" in n] if status.pending_selectors == count else []

        return wait_for(told)

    def mark(selector: Selector, stage: Any = hints_pb2.STAGE_P2D) -> Hint:
        return Hint(connection=hints_pb2.ConnectionMark(selector=selector, stage=stage))

    ports = hints_pb2.PortRange(first=5, last=9)
    lost = [
        Selector(tuple=hints_pb2.Tuple(src_addr="fd00::1", dst_addr="fd00::2", dst_port=ports)),
        Selector(process=hints_pb2.ProcessPeer(pid=7, remote="10.0.0.0/8")),
        Selector(process=hints_pb2.ProcessPeer(pid=7, remote_port=hints_pb2.PortRange(first=3))),
    ]
    elsewhere = Selector(tuple=hints_pb2.Tuple(dst_addr="10.9.9.9", src_port=ports))
    api.send(
        *map(mark, lost),
        Hint(transfer=Transfer(id="t", request_id="r", stage=hints_pb2.STAGE_P2D, bytes=1, selector=elsewhere)),
    )
    assert set(named(4)) == {
        f"session test marks [fd00::1] -> [fd00::2]:5-9, {none}",
        f"session test marks process 7 -> 10.0.0.0/8, {none}",
        f"session test marks process 7 -> anywhere:3, {none}",
        f"session test announces transfers on any:5-9 -> 10.9.9.9, {none}",
    }
    more = [Selector(tuple=hints_pb2.Tuple(dst_addr=f"10.9.9.{i}")) for i in range(20, 28)]
    api.send(*map(mark, more))
    assert len(many := named(12)) == 9
    assert many[-1] == "4 more selectors match no connection"
    api.send(*(mark(s, hints_pb2.STAGE_UNSPECIFIED) for s in lost + more))
    assert named(1) == [f"session test announces transfers on any:5-9 -> 10.9.9.9, {none}"]


def test_explain(api: Api, busy: int) -> None:
    (one,) = api.control.ListConnections(pb.ListConnectionsRequest()).connections
    for request in (
        pb.ExplainRequest(slot=one.slot),
        pb.ExplainRequest(cookie=busy),
        pb.ExplainRequest(transfer_id="t1"),
    ):
        explanation = api.control.Explain(request)
        assert explanation.connection.cookie == busy
        assert explanation.transfers[0].id == "t1"
        assert "packets are not steered: the mode is observe" in explanation.reasons


def test_explain_tells_the_rate_of_the_peers_link(
    start: Callable[..., Running], connection: tuple[socket.socket, socket.socket]
) -> None:
    """[[peer]] reaches the policy, also for a transfer announced before its socket was located: 1 MB is 1 s there."""
    running = start(peer=[{"network": "127.0.0.0/8", "rate": "8mbit"}])
    with introduced(running.target) as channel:
        api = Api(channel)
        selector = Selector(cookie=cookie_of(connection[0]))
        transfer = Transfer(id="t", request_id="r", stage=hints_pb2.STAGE_P2D, bytes=1_000_000, selector=selector)
        api.send(Hint(request=Request(id="r", ttft_left_us=30_000_000)), Hint(transfer=transfer))
        told = wait_for(
            lambda: [e for e in (api.control.Explain(pb.ExplainRequest(transfer_id="t")),) if "peer_rate" in e.figures]
        )[0]
        assert told.figures["peer_rate"] == 1e6
        assert told.figures["needed_s"] == pytest.approx(1.0)
        assert any("the link into its peer 8 Mbit/s" in reason for reason in told.reasons)


def test_explain_errors(api: Api) -> None:
    error = failing(api.control.Explain, pb.ExplainRequest())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert call_violation(error)[1] == "target"
    for request, words in (
        (pb.ExplainRequest(slot=3), "no slot 3"),
        (pb.ExplainRequest(cookie=9), "no cookie 9"),
        (pb.ExplainRequest(transfer_id="x"), "no transfer 'x'"),
        (pb.ExplainRequest(transfer_id="x" * 30_000), "no transfer 'xxx"),
        (pb.ExplainRequest(transfer_id="\U0001f600" * 8_000), "no transfer '\U0001f600"),
    ):
        error = failing(api.control.Explain, request)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert words in error.details()
    error = failing(api.control.Explain, pb.ExplainRequest(transfer_id="x" * 100_000))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "the message has more than 32768 bytes"


def test_pause_and_mode(api: Api, running: Running) -> None:
    assert api.control.SetMode(pb.SetModeRequest(mode=pb.MODE_ENFORCE)).mode == pb.MODE_ENFORCE
    assert running.ask(lambda e: e.steers)
    for _ in range(2):
        assert api.control.Pause(pb.PauseRequest()).paused
    assert not running.ask(lambda e: e.steers)
    assert not api.control.Resume(pb.ResumeRequest()).paused
    assert running.ask(lambda e: e.steers)
    assert api.control.SetMode(pb.SetModeRequest(mode=pb.MODE_OBSERVE)).mode == pb.MODE_OBSERVE
    assert not running.ask(lambda e: e.steers)
    error = failing(api.control.SetMode, pb.SetModeRequest())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert call_violation(error)[1] == "mode"


def test_watch(api: Api, busy: int) -> None:
    watch = api.control.Watch(pb.WatchRequest(interval_us=100_000, connections=True), timeout=20)
    replies = list(itertools.islice(watch, 3))
    watch.cancel()
    assert [r.connections[0].cookie for r in replies] == [busy] * 3
    assert replies[0].status.uptime_s < replies[2].status.uptime_s
    quiet = next(api.control.Watch(pb.WatchRequest(), timeout=20))
    assert not quiet.connections
    with pytest.raises(grpc.RpcError) as e:
        next(api.control.Watch(pb.WatchRequest(interval_us=99_999), timeout=20))
    assert call_violation(e.value)[1] == "interval_us"


def test_plan_and_restore(api: Api) -> None:
    assert not api.control.GetPlan(pb.GetPlanRequest()).devices
    reply = api.control.Restore(pb.RestoreRequest())
    assert (list(reply.restored), list(reply.problems)) == ([], [])
    for call, request in (
        (api.control.GetPlan, pb.GetPlanRequest(device="eth9")),
        (api.control.Restore, pb.RestoreRequest(device="eth9")),
    ):
        error = failing(call, request)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert error.details() == "no device 'eth9' is configured; configured: none"


def test_health(api: Api) -> None:
    stub: Any = health_pb2_grpc.HealthStub(api.channel)
    for name in ("", "mfsd.v1.Hints", "mfsd.v1.Control"):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection(api: Api) -> None:
    services = set(ProtoReflectionDescriptorDatabase(api.channel).get_services())
    assert {"mfsd.v1.Hints", "mfsd.v1.Control", "grpc.health.v1.Health"} <= services


def test_a_failing_tick_is_told_and_survived(api: Api, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_now: float) -> None:
        raise ZeroDivisionError("on purpose")

    with monkeypatch.context() as m:
        m.setattr(running.daemon.engine, "tick", broken)
        wait_for(lambda: running.daemon.ticker.failure)
        notices = api.control.GetStatus(pb.GetStatusRequest()).notices
        assert notices[0] == "engine: the last tick failed: ZeroDivisionError: on purpose"
        assert api.send(Hint(request=Request(id="r", ttft_left_us=1000))).accepted == 1
    wait_for(lambda: not running.daemon.ticker.failure)
