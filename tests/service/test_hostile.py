# SPDX-License-Identifier: Apache-2.0
"""What one client may say without others noticing."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from support.daemons import PATIENCE_S, Api, Running, call_violation, wait_for

from mfsd.api import messages
from mfsd.api.control import WATCHERS
from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2 as pb
from mfsd.v1.hints_pb2 import STAGE_COLLECTIVE, Batch, ConnectionMark, Hint, HintBatch, Request, Selector

if TYPE_CHECKING:
    from collections.abc import Callable

STALL_S = 0.5
"""Of others; on an idle machine it is a hundredth of that."""


def longest_wait(running: Running, attack: Callable[[Api], object]) -> float:
    """Longest time that somebody else waits for an answer while an attack goes on."""
    over = threading.Event()
    waits = [0.0]

    def honest() -> None:
        with introduced(running.target) as channel:
            api = Api(channel, session="honest")
            n = 0
            while not over.is_set():
                n += 1
                began = time.monotonic()
                api.send(Hint(request=Request(id=str(n % 8), ttft_left_us=1_000_000)))
                waits.append(time.monotonic() - began)

    thread = threading.Thread(target=honest)
    thread.start()
    try:
        wait_for(lambda: len(waits) > 3)
        with introduced(running.target) as channel:
            attack(Api(channel, session="hostile"))
    finally:
        over.set()
        thread.join()
    assert len(waits) > 4
    return max(waits)


def ranges(count: int) -> list[Hint]:
    out = []
    for i in range(count):
        selector = Selector()
        selector.tuple.dst_addr = f"10.{i >> 8}.{i & 255}.1"
        selector.tuple.dst_port.first, selector.tuple.dst_port.last = 1, 65535
        out.append(Hint(connection=ConnectionMark(selector=selector, stage=STAGE_COLLECTIVE)))
    return out


def test_very_many_selectors_in_one_message(running: Running) -> None:
    assert longest_wait(running, lambda api: api.send(*ranges(1024))) < STALL_S


def test_batches_whose_members_are_swapped(running: Running) -> None:
    members = [f"r{i}" for i in range(680)]

    def swap(api: Api) -> None:
        api.send(*(Hint(request=Request(id=m, ttft_left_us=60_000_000)) for m in members))
        for _ in range(2):
            batches = [Batch(id=f"b{i % 2}", request_ids=members if i % 4 < 2 else []) for i in range(1024)]
            reply = api.send(*(Hint(batch=b) for b in batches))
            assert reply.accepted == 1024

    assert longest_wait(running, swap) < STALL_S


def test_a_message_that_is_none_is_answered_and_not_logged(
    running: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with introduced(running.target) as channel:
        for path in ("/mfsd.v1.Hints/Send", "/mfsd.v1.Control/GetPlan", "/grpc.health.v1.Health/Check"):
            ask: Any = channel.unary_unary(path)
            for _ in range(50):
                with pytest.raises(grpc.RpcError) as e:
                    ask(b"\xff\xff\xff", timeout=PATIENCE_S)
                assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert e.value.details() == "the message is malformed"
        talk: Any = channel.stream_stream("/mfsd.v1.Hints/Stream")
        with pytest.raises(grpc.RpcError) as e:
            list(talk(iter([b"\xff\xff"]), timeout=PATIENCE_S))
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
        watchers: list[Any] = [api.control.Watch(ask, timeout=PATIENCE_S) for _ in range(WATCHERS)]
        for watcher in watchers:
            assert next(watcher).status.epoch
        made.clear()
        began = time.monotonic()
        for watcher in watchers:
            for _ in range(5):
                next(watcher)
        assert len(made) <= (time.monotonic() - began) / 0.05 + 2
        with pytest.raises(grpc.RpcError) as e:
            next(api.control.Watch(ask, timeout=PATIENCE_S))
        assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watchers[0].cancel()
        time.sleep(0.2)
        watchers[0] = api.control.Watch(ask, timeout=PATIENCE_S)
        assert next(watchers[0]).status.epoch
        for watcher in watchers:
            watcher.cancel()


def test_too_many_hints_in_a_message(api: Api) -> None:
    with pytest.raises(grpc.RpcError) as e:
        api.hints.Send(HintBatch(session="s", hints=[Hint()] * 1025), timeout=PATIENCE_S)
    assert call_violation(e.value)[:2] == (8, "hints")
