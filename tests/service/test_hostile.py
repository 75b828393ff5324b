# SPDX-License-Identifier: Apache-2.0
"""What one client may say without others noticing."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from support.daemons import Api, Running, call_violation
from support.waiting import WAIT_S, wait_for

from mfsd.api import messages, turns
from mfsd.api.access import STREAMS
from mfsd.api.control import WATCHERS
from mfsd.api.hints import HintsService
from mfsd.api.server import CALLS
from mfsd.api.turns import Turn
from mfsd.client.introduction import introduced
from mfsd.ground.wire import PATHS_MAX
from mfsd.v1 import control_pb2 as pb
from mfsd.v1.hints_pb2 import (
    STAGE_COLLECTIVE,
    STAGE_P2D,
    AdviseRequest,
    Batch,
    ConnectionMark,
    Hint,
    HintBatch,
    Path,
    Request,
    Selector,
    TransferColumns,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MANY = 1024
"""Hints of one message of an attack."""


def served(running: Running, monkeypatch: pytest.MonkeyPatch, attack: Callable[[Api], object]) -> list[int]:
    """How many calls of somebody else are served while the daemon is at work on each message of an attack."""
    apply = HintsService.apply
    over, warm = threading.Event(), threading.Event()
    honest_calls, out = 0, []

    async def counted(self: HintsService, batch: HintBatch, *args: Any, **kwargs: Any) -> Any:
        nonlocal honest_calls
        before = honest_calls
        answer = await apply(self, batch, *args, **kwargs)
        if batch.session == "honest":
            honest_calls += 1
        elif len(batch.hints) == MANY:
            out.append(honest_calls - before)
        return answer

    def honest() -> None:
        with introduced(running.target) as channel:
            api = Api(channel, session="honest")
            for n in itertools.count():
                api.send(Hint(request=Request(id=str(n % 8), ttft_left_us=1_000_000)))
                warm.set()
                if over.is_set():
                    return

    monkeypatch.setattr(HintsService, "apply", counted)
    thread = threading.Thread(target=honest)
    thread.start()
    try:
        assert warm.wait(WAIT_S)
        with introduced(running.target) as channel:
            attack(Api(channel, session="hostile"))
    finally:
        over.set()
        thread.join()
    return out


def ranges(count: int) -> list[Hint]:
    out = []
    for i in range(count):
        selector = Selector()
        selector.tuple.dst_addr = f"10.{i >> 8}.{i & 255}.1"
        selector.tuple.dst_port.first, selector.tuple.dst_port.last = 1, 65535
        out.append(Hint(connection=ConnectionMark(selector=selector, stage=STAGE_COLLECTIVE)))
    return out


def test_others_have_their_turns_beside_very_many_selectors(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (turns,) = served(running, monkeypatch, lambda api: api.send(*ranges(MANY)))
    assert turns


def test_and_beside_batches_whose_members_are_swapped(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [f"r{i}" for i in range(680)]

    def swap(api: Api) -> None:
        api.send(*(Hint(request=Request(id=m, ttft_left_us=60_000_000)) for m in members))
        for _ in range(2):
            batches = [Batch(id=f"b{i % 2}", request_ids=members if i % 4 < 2 else []) for i in range(MANY)]
            reply = api.send(*(Hint(batch=b) for b in batches))
            assert reply.accepted == MANY

    turns = served(running, monkeypatch, swap)
    assert len(turns) == 2
    assert all(turns)


def test_a_message_that_is_none_is_answered_and_not_logged(
    running: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with introduced(running.target) as channel:
        for path in ("/mfsd.v1.Hints/Send", "/mfsd.v1.Control/GetPlan", "/grpc.health.v1.Health/Check"):
            ask: Any = channel.unary_unary(path)
            for _ in range(50):
                with pytest.raises(grpc.RpcError) as e:
                    ask(b"\xff\xff\xff", timeout=WAIT_S)
                assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert e.value.details() == "the message is malformed"
        talk: Any = channel.stream_stream("/mfsd.v1.Hints/Stream")
        with pytest.raises(grpc.RpcError) as e:
            list(talk(iter([b"\xff\xff"]), timeout=WAIT_S))
        assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out + caplog.text


def test_fields_that_nobody_knows_are_not_kept(api: Api, running: Running) -> None:
    for i in range(64):
        # Field 99, which there isn't: 64 kB of it.
        raw = Selector(cookie=i + 1).SerializeToString() + b"\x9a\x06\x80\x80\x04" + bytes(65536)
        mark = ConnectionMark(selector=Selector.FromString(raw), stage=STAGE_COLLECTIVE)
        assert api.send(Hint(connection=mark)).accepted == 1
    assert sum(map(len, running.daemon._decoder._selectors)) < 100_000


def test_watchers_share_what_they_see_and_are_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    status = messages.status

    def counted(*args: Any) -> Any:
        made.append(1)
        return status(*args)

    monkeypatch.setattr(messages, "status", counted)
    with introduced(running.target) as channel:
        api = Api(channel)
        ask = pb.WatchRequest(interval_us=100_000, connections=True)
        watchers: list[Any] = [api.control.Watch(ask, timeout=WAIT_S) for _ in range(WATCHERS)]
        for watcher in watchers:
            assert next(watcher).status.epoch
        made.clear()
        began = time.monotonic()
        for watcher in watchers:
            for _ in range(5):
                next(watcher)
        assert len(made) <= (time.monotonic() - began) / 0.05 + 2
        with pytest.raises(grpc.RpcError) as e:
            next(api.control.Watch(ask, timeout=WAIT_S))
        assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watchers[0].cancel()
        time.sleep(0.2)
        watchers[0] = api.control.Watch(ask, timeout=WAIT_S)
        assert next(watchers[0]).status.epoch
        for watcher in watchers:
            watcher.cancel()


def test_streams_that_say_nothing_are_bounded(start: Callable[..., Running]) -> None:
    """Each takes memory, also where anybody may call: those of all without a token are as many as one user's."""
    running = start(limits={"max_sessions_per_user": 2})
    with grpc.insecure_channel(running.target) as channel:
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        open_ones = [watch(b"", timeout=WAIT_S) for _ in range(STREAMS * 2)]
        for one in open_ones:
            assert next(one)
        with pytest.raises(grpc.RpcError) as e:
            next(watch(b"", timeout=WAIT_S))
        assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "callers without a token have 8 streams open already" in str(e.value.details())
        with introduced(running.target) as known:
            theirs: Any = known.unary_stream("/grpc.health.v1.Health/Watch")
            other = theirs(b"", timeout=WAIT_S)
            assert next(other)
            other.cancel()
        open_ones.pop().cancel()

        def let_in() -> bool:
            one = watch(b"", timeout=WAIT_S)
            try:
                return bool(next(one))
            except grpc.RpcError:
                return False
            finally:
                one.cancel()

        wait_for(let_in, "room for another")


def test_a_connection_has_so_many_calls_at_a_time(running: Running) -> None:
    with grpc.insecure_channel(running.target) as channel:
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        streams = [watch(b"", timeout=WAIT_S) for _ in range(CALLS)]
        for one in streams:
            assert next(one)
        late = watch(b"", timeout=1.0)
        with pytest.raises(grpc.RpcError) as e:
            next(late)
        assert e.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        for one in streams:
            one.cancel()


def test_too_many_hints_in_a_message(api: Api) -> None:
    with pytest.raises(grpc.RpcError) as e:
        api.hints.Send(HintBatch(session="s", hints=[Hint()] * 1025), timeout=WAIT_S)
    assert call_violation(e.value)[:2] == (8, "hints")


def test_very_many_rows_that_are_refused_give_way(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, give = [0], Turn.give

    async def counted(turn: Turn, *, contended: bool) -> None:
        turns[0] += 1
        await give(turn, contended=contended)

    monkeypatch.setattr(Turn, "give", counted)
    rows = 1000
    columns = TransferColumns(ids=[str(i) for i in range(rows)], owners=["nobody"], request=[1] * rows)
    columns.stage.extend([STAGE_P2D] * rows)
    columns.bytes.extend([1000] * rows)
    columns.selector.extend([0] * rows)
    columns.selectors.add(cookie=1)
    reply = api.hints.Send(HintBatch(session="s", seq=1, transfers=columns), timeout=WAIT_S)
    assert len(reply.rejected) == rows
    assert turns[0] > 1


def test_questions_for_advice_give_way(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a path begins here is looked for with a socket each."""
    given, give = [0], Turn.give

    async def counted(turn: Turn, *, contended: bool) -> None:
        given[0] += 1
        await give(turn, contended=contended)

    monkeypatch.setattr(Turn, "give", counted)
    monkeypatch.setattr(turns, "TURN_S", 0.0)  # so that each is a turn of its own
    paths = [Path(dst="10.0.0.1", src=f"127.0.0.{i}") for i in range(PATHS_MAX)]
    assert len(api.hints.Advise(AdviseRequest(paths=paths), timeout=WAIT_S).advice) == PATHS_MAX
    assert given[0] >= PATHS_MAX
