# SPDX-License-Identifier: Apache-2.0
"""What comes back to a worker: events in an event loop, and advice that nobody waits for."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from support.waiting import WAIT_S, wait_for

from mfsd.api import advice
from mfsd.client import Client, Event, EventKind, Stage, tuple_of
from mfsd.client import advice as asking
from mfsd.client.advice import Advice
from mfsd.client.events import KEPT
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.daemons import Running

NOWHERE = tuple_of("10.255.255.1", 1)


def test_events_are_iterated_and_called_back(running: Running) -> None:
    called: list[Event] = []

    async def listen(client: Client, enough: int) -> list[Event]:
        out = []
        async for event in client.events():
            out.append(event)
            if len(out) == enough:
                break
        return out

    async def main(client: Client) -> list[list[Event]]:
        listeners = [asyncio.create_task(listen(client, 2)) for _ in range(2)]
        await asyncio.sleep(0.05)
        for n in (1, 2):
            client.request(f"r{n}", ttft_left_s=0.01, ttl_s=0.01)
            client.transfer(f"t{n}", NOWHERE, 1, stage=Stage.P2D, request=f"r{n}", ttl_s=0.01)
        return [await asyncio.wait_for(one, 20) for one in listeners]

    with Client(target=running.target, on_event=called.append) as client:
        heard = asyncio.run(main(client))
    for events in (*heard, called[:2]):
        kinds = {(e.kind, e.transfer_id) for e in events}
        assert {kind for kind, _ in kinds} <= {EventKind.EXPIRED, EventKind.INFEASIBLE}
    assert heard[0] == heard[1] == called[:2]


def test_listening_ends_with_the_client_and_a_slow_listener_loses_the_oldest() -> None:
    client = Client(target="unix:/nowhere/mfsd.sock")

    async def main() -> list[Event]:
        events = client.events()

        async def one() -> Event:
            return await anext(events)

        first = asyncio.create_task(one())
        await asyncio.sleep(0)
        for n in range(KEPT + 10):
            client._events.tell(Event(EventKind.EXPIRED, str(n), "", ""))
        out = [await first]
        client.close()
        out += [e async for e in events]
        return out

    out = asyncio.run(asyncio.wait_for(main(), 20))
    assert [e.request_id for e in out] == [str(n) for n in range(10, KEPT + 10)]

    async def late() -> list[Event]:
        return [e async for e in client.events()]

    assert asyncio.run(asyncio.wait_for(late(), 20)) == []


def test_advice_is_asked_for_in_the_background(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    said = pb.Advice(
        known=True,
        rate_bytes_per_s=1000.0,
        spare_bytes_per_s=10.0,
        queued_bytes=500,
        device_queued_bytes=2000,
        guaranteed_bytes_per_s=300.0,
    )
    goes_on, done = threading.Event(), threading.Event()

    def slowly(*_: object) -> pb.Advice:
        assert goes_on.wait(WAIT_S)
        done.set()
        return said

    monkeypatch.setattr(advice, "advice", slowly)
    monkeypatch.setattr(asking, "TIMEOUT_S", 2 * WAIT_S)
    with Client(target=running.target) as client:
        for _ in range(3):
            assert client.advice("10.0.0.7") is None
        assert not done.is_set()  # nobody has waited for it
        goes_on.set()
        found = wait_for(lambda: client.advice("10.0.0.7"))
        assert found == Advice("10.0.0.7", "", 1000.0, 10.0, 500.0, 2000.0, 300.0)
        assert (found.least_s(500), found.expected_s(500)) == (0.5, 2.5)
    assert client.advice("10.0.0.7") is None


@pytest.mark.parametrize("stop", [True, False])
def test_advice_of_a_daemon_that_is_gone_or_hangs_grows_stale(
    start: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
    stop: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    running = start()
    monkeypatch.setattr(asking, "STALE_S", 0.2)
    monkeypatch.setattr(advice, "advice", lambda *_: pb.Advice(known=True, rate_bytes_per_s=1000.0))
    with Client(target=running.target) as client:
        wait_for(lambda: client.advice("10.0.0.7"))
        if stop:
            running.stop()
        else:
            running.loop.call_soon_threadsafe(time.sleep, 1.5)
        wait_for(lambda: client.advice("10.0.0.7") is None)
        assert client.advice("10.0.0.8", source="10.0.0.9") is None


def test_nothing_is_known_of_a_path_without_devices(running: Running) -> None:
    with Client(target=running.target) as client:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            assert client.advice("10.0.0.7") is None
            time.sleep(0.02)


def test_who_asks_about_a_name_is_told_once_that_it_is_no_address(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(target=running.target) as client, caplog.at_level(logging.WARNING, "mfsd.client"):
        for peer, source in (("decode-1", ""), ("10.0.0.7", "prefill-1"), ("", ""), (None, "")):
            for _ in range(3):
                assert client.advice(peer, source=source) is None  # type: ignore[arg-type]
        assert [r.message for r in caplog.records] == ["no advice about 'decode-1': it is no IP address"]
        assert client.advice(ip_address("10.0.0.9"), source=ip_address("10.0.0.7")) is None
        assert client._advisor is not None
        assert ("10.0.0.9", "10.0.0.7") in client._advisor._wanted
        assert len(caplog.records) == 1
