# SPDX-License-Identifier: Apache-2.0
"""The Control service, health and reflection of a daemon without devices."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.daemons import Api, Running, call_violation, wait_for

import mfsd
from mfsd.client import cookie_of
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
    assert len(api.control.ListTransfers(pb.ListTransfersRequest(limit=1)).transfers) == 1


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
    with grpc.insecure_channel(running.target) as channel:
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
        (pb.ExplainRequest(transfer_id="x"), "no transfer_id 'x'"),
    ):
        error = failing(api.control.Explain, request)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert words in error.details()


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
