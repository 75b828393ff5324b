# SPDX-License-Identifier: Apache-2.0
"""Requests without a deadline, from the SDK to what operators see, and with a daemon that does not know of them."""

from __future__ import annotations

import gzip
import json
import math
import threading
from typing import TYPE_CHECKING, Any

from support.ctl import run
from support.daemons import Running, carry, connected
from support.waiting import wait_for

from mfsd.api.decode import Decoder
from mfsd.client import Client, Rejected, Stage, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from mfsd.ground.model import RequestHint


def deadlines(running: Running) -> dict[str, float]:
    return running.ask(lambda e: {t.id: float(e.books.transfers.get(t, "deadline")) for t in e.books.transfers.objects})


def mfsctl(running: Running, *words: str) -> str:
    ran = run("--socket", str(running.socket), *words)
    assert ran.code == 0, ran.err
    return " ".join(ran.out.split())


def test_operators_see_that_there_is_none(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "record"
    recording = threading.Thread(target=mfsctl, args=(running, "record", str(file), "--for", "2s"))
    with connected() as (near, far), Client("worker", running.target) as client:
        recording.start()
        wait_for(lambda: running.ask(lambda e: len(e.books.recorders)) == 1)
        client.request("never", no_deadline=True)
        client.request("soon", ttft_left_s=50.0)
        client.transfer("kv", near, 100_000, stage=Stage.P2D, request="never")
        assert client.flush(20)
        wait_for(lambda: deadlines(running) == {"kv": math.inf})
        assert "requests 2 (1 without a deadline)" in mfsctl(running, "status")
        assert "kv never p2d" in mfsctl(running, "transfers")
        (shown,) = json.loads(mfsctl(running, "transfers", "--json"))["transfers"]
        assert not {"deadline_us", "laxity_s"} & shown.keys()
        why = mfsctl(running, "explain", "kv")
        assert "It has no deadline." in why
        assert "Nobody knows when it is due: level 3, above unhinted traffic" in why
        assert ", no deadline" in mfsctl(running, "trace", "never")
        assert "requests_no_deadline 1 " in mfsctl(running, "stats")
        carry(near, far, 100_000)
        client.done(request="never")
        client.done(request="soon")
        assert client.flush(20)
        wait_for(lambda: running.ask(lambda e: e.books.requests.n) == 0)
    status, stats = mfsctl(running, "status"), mfsctl(running, "stats")
    assert "requests 0 " in status
    assert "deadlines met 1, missed 0, none 1" in status
    for result, count in (("met", 1), ("missed", 0), ("no_deadline", 1)):
        assert f"requests_ended_total result={result} {count} " in stats
    assert ", no deadline" in mfsctl(running, "trace", "never")
    assert ", no deadline" not in mfsctl(running, "trace", "soon")
    recording.join(30)
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert [line["due"] for line in lines if "hint" in line] == [None]


def test_it_goes_by_columns_and_may_have_transfers_with_one_of_their_own(running: Running) -> None:
    with connected() as (near, _), Client("worker", running.target) as client:
        client.request("never", no_deadline=True)
        many = [Transfer(f"t{n}", near, 1000, Stage.P2D, "never", deadline_s=5.0 if n == 3 else None) for n in range(9)]
        client.transfers(many)
        assert client.flush(20)
        assert client.stats.rejected == 0
        wait_for(lambda: len(deadlines(running)) == 9)
        assert [name for name, at in deadlines(running).items() if at < math.inf] == ["t3"]


def test_a_daemon_that_starts_anew_hears_that_there_is_none(start: Callable[..., Running]) -> None:
    running = start()
    with connected() as (near, _), Client("worker", running.target) as client:
        client.request("never", no_deadline=True)
        client.transfer("kv", near, 1000, stage=Stage.P2D, request="never")
        assert client.flush(20)
        running = start()
        wait_for(lambda: deadlines(running) == {"kv": math.inf})


def test_an_older_daemon_refuses_it_and_its_transfers_and_nothing_else(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To which the field is one that it does not know."""
    decode = Decoder._request

    def older(self: Decoder, hint: Any, now: float) -> RequestHint:
        hint.request.ClearField("no_deadline")
        return decode(self, hint, now)

    monkeypatch.setattr(Decoder, "_request", older)
    running, rejected = start(), list[Rejected]()
    with connected() as (near, _), Client("worker", running.target, on_rejected=rejected.append) as client:
        client.request("never", no_deadline=True)
        client.request("soon", ttft_left_s=50.0)
        for name, request in (("undated", "never"), ("dated", "soon")):
            client.transfer(name, near, 1000, stage=Stage.P2D, request=request)
        client.done(request="never")
        assert client.flush(20)
        assert list(deadlines(running)) == ["dated"]
        wait_for(lambda: len(rejected) == 2)
    assert [r.message.partition(":")[0] for r in rejected] == ["request.ttft_left_us", "transfer.request_id"]
