# SPDX-License-Identifier: Apache-2.0
"""Hints over a real server: every error with its field, and bad hints that cost only themselves."""

from __future__ import annotations

import math
import queue
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import code_pb2
from support.daemons import Api, Running, call_violation, connected, violation
from support.waiting import wait_for

from mfsd.client import cookie_of
from mfsd.engine.settings import LimitsConfig
from mfsd.v1.hints_pb2 import (
    STAGE_BACKGROUND,
    STAGE_COLLECTIVE,
    STAGE_KV_REUSE,
    STAGE_P2D,
    Batch,
    Cancellation,
    Completion,
    ConnectionMark,
    Event,
    Hint,
    LayerProgress,
    PortRange,
    ProcessPeer,
    Request,
    Selector,
    Transfer,
    Tuple,
    Written,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    Start = Callable[..., Running]
    Reach = Callable[[Running], Api]

LIMITS = LimitsConfig()
LONG = "x" * 257
BACKWARDS = PortRange(first=9, last=3)


def request(**fields: Any) -> Hint:
    values: dict[str, Any] = {"id": "r", "ttft_left_us": 500_000} | fields
    return Hint(request=Request(**values))


def lasting() -> Hint:
    """A request that nothing in a test makes infeasible."""
    return request(ttft_left_us=600_000_000)


def transfer(**fields: Any) -> Hint:
    good: dict[str, Any] = {"id": "t", "request_id": "r", "stage": STAGE_P2D, "bytes": 1000}
    good["selector"] = Selector(cookie=1)
    return Hint(transfer=Transfer(**(good | fields)))


def on(selector: Any) -> Hint:
    return transfer(selector=selector)


def process(**fields: Any) -> Hint:
    return on(Selector(process=ProcessPeer(**fields)))


def mark(**fields: Any) -> Hint:
    return Hint(connection=ConnectionMark(**fields))


def tuple_(**fields: Any) -> Hint:
    good: dict[str, Any] = {"src_addr": "10.0.0.1", "dst_addr": "10.0.0.2"}
    good |= {"src_port": PortRange(first=1), "dst_port": PortRange(first=2)}
    return on(Selector(tuple=Tuple(**(good | fields))))


CASES = [
    (Hint(), "body", "is not set"),
    (request(id=""), "request.id", "is empty"),
    (request(id=LONG), "request.id", "257 bytes"),
    (request(id="ä" * 129), "request.id", "258 bytes"),
    (request(ttft_left_us=0), "request.ttft_left_us", "or set no_deadline where nobody has said"),
    (request(no_deadline=True), "request.no_deadline", "is set together with ttft_left_us"),
    (request(ttft_left_us=10**15), "request.ttft_left_us", "1000000000 s from now"),
    (request(ttft_left_us=-(10**15)), "request.ttft_left_us", "1000000000 s ago"),
    (request(batch_id=LONG), "request.batch_id", "257 bytes"),
    (request(compute_left_us=10**15), "request.compute_left_us", "at most 600000000"),
    (Hint(batch=Batch()), "batch.id", "is empty"),
    (Hint(batch=Batch(id="b", request_ids=["a", ""])), "batch.request_ids[1]", "is empty"),
    (Hint(batch=Batch(id="b", layers=5000)), "batch.layers", "at most 4096"),
    (Hint(batch=Batch(id="b", layers=2, current_layer=3)), "batch.current_layer", "at most layers (2)"),
    (Hint(batch=Batch(id="b", layer_compute_us=10**15)), "batch.layer_compute_us", "at most 600000000"),
    (Hint(progress=LayerProgress(current_layer=1)), "progress.batch_id", "is empty"),
    (Hint(progress=LayerProgress(batch_id="b", current_layer=5000)), "progress.current_layer", "at most 4096"),
    (Hint(progress=LayerProgress(batch_id="nobody")), "progress.batch_id", "no batch or request 'nobody'"),
    (transfer(id=""), "transfer.id", "is empty"),
    (transfer(request_id=""), "transfer.request_id", "is empty, and so is batch_id"),
    (transfer(request_id="nobody"), "transfer.request_id", "no request or batch 'nobody'"),
    (transfer(request_id="", batch_id="nobody"), "transfer.batch_id", "no request or batch 'nobody'"),
    (transfer(stage=0), "transfer.stage", "unknown stage 0"),
    (transfer(stage=9), "transfer.stage", "unknown stage 9"),
    (transfer(bytes=0), "transfer.bytes", "0 bytes"),
    (transfer(bytes=-5), "transfer.bytes", "-5 bytes"),
    (transfer(bytes=LIMITS.max_transfer_bytes + 1), "transfer.bytes", "limits.max_transfer_bytes"),
    (transfer(target_layer=5000), "transfer.target_layer", "at most 4096"),
    (transfer(deadline_us=10**15), "transfer.deadline_us", "limits.max_deadline_s"),
    (transfer(max_defer_us=10**15), "transfer.max_defer_us", "at most 300000000 us (limits.max_defer_s)"),
    (on(Selector()), "transfer.selector", "is not set"),
    (on(Selector(cookie=0)), "transfer.selector.cookie", "0 is no socket cookie"),
    (on(Selector(cookie=(1 << 64) - 1)), "transfer.selector.cookie", "is no socket cookie"),
    (tuple_(dst_addr=""), "transfer.selector.tuple.dst_addr", "is empty"),
    (tuple_(dst_addr="example.com"), "transfer.selector.tuple.dst_addr", "'example.com' is no IP address"),
    (tuple_(dst_addr="fe80::1%eth0", src_addr=""), "transfer.selector.tuple.dst_addr", "has a zone"),
    (tuple_(dst_addr="224.0.0.1"), "transfer.selector.tuple.dst_addr", "no peer's address"),
    (tuple_(dst_addr="0.0.0.0"), "transfer.selector.tuple.dst_addr", "no peer's address"),  # noqa: S104 - refused
    (tuple_(src_addr="fd00::1"), "transfer.selector.tuple.src_addr", "different families"),
    (tuple_(protocol=1), "transfer.selector.tuple.protocol", "unknown protocol 1"),
    (tuple_(src_port=BACKWARDS), "transfer.selector.tuple.src_port", "9..3 is no port range"),
    (tuple_(dst_port=PortRange(first=70000)), "transfer.selector.tuple.dst_port", "70000 is no port;"),
    (tuple_(protocol=17, src_addr=""), "transfer.selector.tuple.src_addr", "UDP needs both addresses"),
    (tuple_(protocol=17, src_port=PortRange()), "transfer.selector.tuple.src_port", "exact ports"),
    (tuple_(protocol=17, dst_port=PortRange(first=1, last=2)), "transfer.selector.tuple.dst_port", "exact ports"),
    (process(pid=0), "transfer.selector.process.pid", "0 is no process id"),
    (process(pid=1, remote="10.0.0.7/24"), "transfer.selector.process.remote", "has host bits set"),
    (process(pid=1, remote_port=BACKWARDS), "transfer.selector.process.remote_port", "is no port range"),
    (process(pid=1, remote="::"), "transfer.selector.process.remote", "no peer's"),
    (Hint(completion=Completion()), "completion.transfer_id", "is empty, and no other id"),
    (Hint(completion=Completion(transfer_id="a", batch_id="b")), "completion.transfer_id", "set together with another"),
    (Hint(cancellation=Cancellation()), "cancellation.transfer_id", "is empty, and no other id"),
    (Hint(cancellation=Cancellation(request_id=LONG)), "cancellation.request_id", "257 bytes"),
    (
        Hint(cancellation=Cancellation(transfer_id="a", written=[Written(cookie=1)] * 257)),
        "cancellation.written",
        "names 257 sockets",
    ),
    (mark(stage=7, selector=Selector(cookie=1)), "connection.stage", "unknown stage 7"),
    (mark(stage=STAGE_COLLECTIVE), "connection.selector", "is not set"),
]


@pytest.mark.parametrize(("bad", "field", "problem"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_hint_costs_only_itself_and_names_its_field(
    api: Api, running: Running, bad: Hint, field: str, problem: str
) -> None:
    reply = api.send(request(id="r"), bad, request(id="after"))
    assert (reply.seq, reply.accepted) == (1, 2)
    (rejected,) = reply.rejected
    assert rejected.index == 1
    code, where, description = violation(rejected.status)
    assert code == code_pb2.INVALID_ARGUMENT
    assert where == field
    assert problem in description
    assert running.ask(lambda e: set(e.books.sessions["test"].requests)) == {"r", "after"}
    assert running.ask(lambda e: (e.books.counters.hints_accepted, e.books.counters.hints_rejected)) == (2, 1)


def test_good_hints_of_every_kind(api: Api, running: Running, connection: tuple[socket.socket, socket.socket]) -> None:
    cookie = cookie_of(connection[0])
    reply = api.send(
        request(compute_left_us=1000, ttl_us=10**6),
        Hint(batch=Batch(id="b", request_ids=["r", "unknown"], layers=4, current_layer=1, layer_compute_us=1000)),
        Hint(progress=LayerProgress(batch_id="b", current_layer=2)),
        transfer(selector=Selector(cookie=cookie), deadline_us=400_000),
        transfer(id="t1", stage=STAGE_KV_REUSE, target_layer=3, selector=Selector(cookie=cookie)),
        mark(stage=STAGE_COLLECTIVE, selector=Selector(cookie=cookie)),
    )
    assert not reply.rejected
    assert reply.accepted == 6
    assert reply.epoch == running.ask(lambda e: e.epoch)
    kept = running.ask(lambda e: (e.books.requests.n, e.books.batches.n, e.books.transfers.n, len(e.connections)))
    assert kept == (1, 1, 2, 1)
    assert running.ask(lambda e: int(e.books.batches.live("current_layer")[0])) == 2
    reply = api.send(
        Hint(cancellation=Cancellation(transfer_id="t1")),
        mark(selector=Selector(cookie=cookie)),
        Hint(cancellation=Cancellation(request_id="r")),
    )
    assert not reply.rejected
    assert running.ask(lambda e: (e.books.requests.n, e.books.transfers.n)) == (0, 0)


def test_what_is_not_there_is_ended_without_a_word(api: Api) -> None:
    """It may have been seen to arrive, or have expired."""
    kinds = ("transfer_id", "request_id", "batch_id")
    ends = [Hint(completion=Completion(**{k: "nobody"})) for k in kinds]
    cancellations = [
        Cancellation(transfer_id="nobody"),
        Cancellation(request_id="nobody"),
        Cancellation(batch_id="nobody"),
    ]
    reply = api.send(*ends, *(Hint(cancellation=c) for c in cancellations))
    assert (reply.accepted, len(reply.rejected)) == (6, 0)


def test_background_and_collectives_need_no_owner(api: Api, running: Running) -> None:
    reply = api.send(
        transfer(id="w", request_id="", stage=STAGE_BACKGROUND, interleaved=True, position=5),
        transfer(id="c", request_id="", stage=STAGE_COLLECTIVE, selector=Selector(cookie=2)),
        transfer(id="d", request_id="nobody", stage=STAGE_BACKGROUND, selector=Selector(cookie=2)),
    )
    assert not reply.rejected
    ordered = running.ask(lambda e: {t.id: t.stream.ordered for t in e.books.transfers.objects})
    assert ordered == {"w": False, "c": True, "d": True}
    background: dict[str, Any] = {"stage": STAGE_BACKGROUND, "selector": Selector(cookie=3)}
    api.send(mark(interleaved=True, **background), transfer(id="m", request_id="", **background))
    assert not running.ask(lambda e: e.books.sessions["test"].transfers["m"].stream.ordered)


def test_deadlines_and_lives_are_clamped(api: Api, running: Running) -> None:
    """Deadlines that are near are; what is late stays so, or it would be in time just behind its hint."""
    for left_us, clamped in ((1, LIMITS.min_deadline_ms / 1000), (-5_000_000, -5.0)):
        api.send(request(ttft_left_us=left_us, ttl_us=10**13))
        heard = running.ask(lambda e: e.books.sessions["test"].seen)
        deadline, expires = running.ask(lambda e: [float(e.books.requests.live(c)[0]) for c in ("deadline", "expires")])
        assert deadline - heard == pytest.approx(clamped, abs=1e-6)
        assert expires == pytest.approx(max(deadline, heard) + LIMITS.max_ttl_s)


def test_how_long_a_transfer_may_be_held_back_is_clamped_from_below_and_shown_to_the_policy(
    api: Api, running: Running
) -> None:
    said = {"short": 1, "long": 9_000_000, "unsaid": 0}
    api.send(request(), *(transfer(id=name, max_defer_us=us) for name, us in said.items()))

    def held(engine: Any) -> dict[str, float]:
        view = engine.steering.views(running.daemon.ticker._clock()).transfers
        rows = {t.id: engine.books.transfers.row(t) for t in engine.books.sessions["test"].transfers.values()}
        return {name: round(float(view.max_defer[row]), 6) for name, row in rows.items()}

    assert running.ask(held) == {"short": LIMITS.min_defer_ms / 1e3, "long": 9.0, "unsaid": math.inf}


def test_the_same_transfer_twice_is_refused(api: Api) -> None:
    reply = api.send(request(), transfer(), transfer())
    words = "'t' is announced already; ids are unique within a session"
    assert violation(reply.rejected[0].status)[1:] == ("transfer.id", words)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_full_table_is_exhaustion_and_names_the_selector(start: Start, reach: Reach) -> None:
    many = [transfer(id=f"t{i}", selector=Selector(cookie=100 + i)) for i in range(17)]
    reply = reach(start(daemon={"slots": 16})).send(request(), *many)
    (rejected,) = reply.rejected
    code, field, description = violation(rejected.status)
    assert (rejected.index, code, field) == (17, code_pb2.RESOURCE_EXHAUSTED, "transfer.selector")
    assert "16 slots" in description


@pytest.mark.parametrize(
    ("limit", "hints", "field"),
    [
        ("max_requests_per_session", [request(id="a"), request(id="b")], "request.id"),
        ("max_transfers_per_session", [request(), transfer(id="a"), transfer(id="b")], "transfer.id"),
        ("max_requests_per_batch", [Hint(batch=Batch(id="b", request_ids=["a", "b"]))], "batch.request_ids"),
    ],
)
def test_limits_per_session(start: Start, reach: Reach, limit: str, hints: list[Hint], field: str) -> None:
    reply = reach(start(limits={limit: 1})).send(*hints)
    code, where, description = violation(reply.rejected[-1].status)
    assert reply.rejected[-1].index == len(hints) - 1
    assert (code, where) == (code_pb2.RESOURCE_EXHAUSTED, field)
    assert f"limits.{limit}" in description


def test_an_oversized_batch_fails_as_a_whole(start: Start, reach: Reach) -> None:
    one = start(limits={"max_hints_per_batch": 2})
    with pytest.raises(grpc.RpcError) as e:
        reach(one).send(request(id="a"), request(id="b"), request(id="c"))
    assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    words = "3 hints in one batch; send at most 2 at a time (limits.max_hints_per_batch)"
    assert call_violation(e.value)[1:] == ("hints", words)
    assert one.ask(lambda e: e.books.requests.n) == 0


def test_a_batch_without_session_fails_as_a_whole(api: Api) -> None:
    with pytest.raises(grpc.RpcError) as e:
        api.send(request(), session="")
    assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert call_violation(e.value)[1] == "session"


def test_too_many_sessions(start: Start, reach: Reach) -> None:
    api = reach(start(limits={"max_sessions": 1}))
    api.send(request())
    with pytest.raises(grpc.RpcError) as e:
        api.send(request(), session="another")
    assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call_violation(e.value)[1] == "session"


def test_a_failure_of_ours_costs_one_hint(api: Api, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = running.daemon.engine
    apply = engine.apply

    def broken(session: Any, hint: Any, now: float) -> bool:
        if getattr(hint, "id", "") == "cursed":
            raise ZeroDivisionError
        return apply(session, hint, now)

    monkeypatch.setattr(engine, "apply", broken)
    reply = api.send(request(), request(id="cursed"), request(id="after"))
    assert reply.accepted == 2
    assert reply.rejected[0].status.code == code_pb2.INTERNAL
    assert violation(reply.rejected[0].status)[1] == "hints[1]"


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_answers_every_batch_in_order(api: Api, running: Running) -> None:
    def batches() -> Any:
        for seq in range(1, 201):
            bad = [transfer(stage=9)] if seq % 3 == 0 else []
            yield api.batch(request(id=f"r{seq}"), *bad, seq=seq)

    replies = list(api.hints.Stream(batches(), timeout=20))
    assert [r.seq for r in replies] == list(range(1, 201))
    assert [len(r.rejected) for r in replies] == [int(seq % 3 == 0) for seq in range(1, 201)]
    assert running.ask(lambda e: e.books.requests.n) == 200


def test_a_new_stream_is_told_how_far_the_one_before_was_heard(api: Api) -> None:
    """Not by calls of their own, nor by who begins to count."""

    def heard(*seqs: int, empty: bool = False) -> list[int]:
        batches = [api.batch(*([] if empty else [request()]), seq=seq) for seq in seqs]
        return [r.heard for r in api.hints.Stream(iter(batches), timeout=20)]

    assert heard(1, 2, 3) == [0, 1, 2]
    api.send(request())
    assert heard(4, 5, empty=True) == [3, 3]
    assert heard(6, 7) == [3, 6]
    assert heard(1, 2) == [0, 1]


def test_a_stream_is_of_one_session(api: Api) -> None:
    with pytest.raises(grpc.RpcError) as e:
        list(api.hints.Stream(iter([api.batch(request()), api.batch(request(), session="other")]), timeout=20))
    assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert call_violation(e.value)[1:] == ("session", "'other' on the stream of 'test'; open a stream for each")


def test_events_are_pushed_with_seq_0_between_replies(api: Api) -> None:
    outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with connected() as (sock, _):
        outgoing.put(api.batch(lasting(), transfer(selector=Selector(cookie=cookie_of(sock))), seq=7))
        call = api.hints.Stream(iter(outgoing.get, None), timeout=20)
        first = next(call)
        assert (first.seq, first.accepted, list(first.events)) == (7, 2, [])
    # The socket is closed; the engine finds out by itself.
    pushed = next(call)
    assert (pushed.seq, pushed.accepted, pushed.epoch) == (0, 0, first.epoch)
    assert [(e.kind, e.request_id, e.transfer_id) for e in pushed.events] == [(Event.CONNECTION_GONE, "r", "t")]
    outgoing.put(api.batch(lasting(), seq=8))
    assert next(call).seq == 8
    outgoing.put(None)
    assert list(call) == []


def test_events_wait_for_the_next_call_when_no_stream_is_open(api: Api) -> None:
    with connected() as (sock, _):
        api.send(lasting(), transfer(selector=Selector(cookie=cookie_of(sock))))

    def events() -> list[Any]:
        return list(api.send().events)

    assert [e.kind for e in wait_for(events)] == [Event.CONNECTION_GONE]


# --- the end of sessions ----------------------------------------------------------------------------------------------


def test_the_end_of_a_stream_does_not_end_the_session(api: Api, running: Running) -> None:
    list(api.hints.Stream(iter([api.batch(request())]), timeout=20))
    assert running.ask(lambda e: list(e.books.sessions["test"].requests)) == ["r"]
