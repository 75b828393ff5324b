# SPDX-License-Identifier: Apache-2.0
"""mfsctl record on a real daemon: what is in the file is what was hinted and decided; bounds; what is no record."""

from __future__ import annotations

import gzip
import json
import math
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.ctl import run
from support.daemons import Running, carry, connected
from support.waiting import wait_for

from mfsd.client import Client, Cookie, Stage, cookie_of
from mfsd.engine import recorder
from mfsd.ground import recording
from mfsd.policy import registry

if TYPE_CHECKING:
    from pathlib import Path


def hinted(client: Client, near: Any, name: str, size: int = 100_000, **more: Any) -> None:
    client.transfer(name, Cookie(cookie_of(near)), size=size, stage=Stage.P2D, request="r", **more)
    assert client.flush(10)


class Recording:
    """mfsctl record in a thread, ended by its time or size."""

    def __init__(self, daemon: Running, file: Path, *words: str) -> None:
        self._args = ("--socket", str(daemon.socket), "record", str(file), "--json", *words)
        self.ran: Any = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_for(lambda: daemon.ask(lambda e: len(e.books.recorders)) == 1)

    def _run(self) -> None:
        self.ran = run(*self._args)

    def wait(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.ran.code == 0, self.ran.err
        return self.ran.json


def test_what_was_hinted_and_decided_is_in_it(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "incident"
    with connected() as (near, far), Client("worker", running.target) as client:
        client.request("r", ttft_left_s=50.0, compute_left_s=0.25)
        hinted(client, near, "before")
        wait_for(lambda: running.ask(lambda e: e.books.transfers.n) == 1)
        it = Recording(running, file, "--for", "2s")
        hinted(client, near, "during", 200_000, deadline_s=20.0)
        hinted(client, far, "given-up", 300_000)
        carry(near, far, 100_000)
        client.done(transfer="before")
        client.cancel(transfer="given-up")
        assert client.flush(10)
        told = it.wait()
        levels = running.ask(lambda e: {t.id: t.row for t in e.books.transfers.objects})
    assert set(levels) == {"during"}
    assert told["why"] == "2 s are over"
    assert (file.stat().st_mode & 0o777) == 0o600
    found = recording.read(file)
    assert (found.policy, found.cut, found.lost) == ("demand-bound", False, 0)
    assert set(found.parameters) == set(registry.describe("demand-bound"))
    by = {t.id: t for t in found.transfers}
    assert set(by) == {"before", "during", "given-up"}
    assert (by["before"].session, by["before"].request, by["before"].stage) == ("worker", "r", Stage.P2D)
    assert by["before"].at < 0.5
    assert by["before"].deadline == pytest.approx(50.0, abs=10.0)
    assert by["before"].delivered
    assert by["during"].left == 200_000
    assert by["during"].deadline == pytest.approx(by["during"].at + 20.0, abs=5.0)
    assert math.isnan(by["during"].ended)  # nan: not over
    assert not by["given-up"].delivered
    assert by["given-up"].ended > by["given-up"].at
    assert all(t.levels for t in found.transfers)
    assert told["events"] >= 3 + 3 + 2
    assert running.ask(lambda e: e.books.recorders) == []  # nothing is taken down any more


def test_it_stops_at_its_size_and_never_overwrites(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "small"
    it = Recording(running, file, "--max-size", "200")
    with connected() as (near, _), Client("worker", running.target) as client:
        client.request("r", ttft_left_s=50.0)
        for n in range(50):
            hinted(client, near, f"{n}-{n * 7919}")
        told = it.wait()
    assert told["why"] == "the file has come to 200 B"
    assert 200 <= told["bytes"] < 20_000
    assert recording.read(file).transfers
    again = run("--socket", str(running.socket), "record", str(file))
    assert (again.code, again.err) == (1, f"mfsctl: {file} is there already; choose another name\n")
    nobody = run("--socket", str(tmp_path / "none"), "record", str(tmp_path / "new"))
    assert nobody.code == 3
    assert not (tmp_path / "new").exists()


def test_what_nobody_takes_is_counted(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "WAITING", 3)
    slow = running.ask(lambda e: recorder.Recorder(e.steering.policy, e.steering.devices, 0.0))
    running.ask(lambda e: e.books.recorders.append(slow))
    with connected() as (near, _), Client("worker", running.target) as client:
        client.request("r", ttft_left_s=50.0)
        for n in range(4):
            hinted(client, near, str(n))
        wait_for(lambda: slow._lost >= 2)
        lines = [json.loads(line) for line in running.ask(lambda _: slow.take(1.0))]
    assert lines[-1]["lost"] >= 2
    assert len(lines) == 4
    running.ask(lambda e: e.books.recorders.clear())


def test_more_than_a_few_at_a_time_are_refused(running: Running, tmp_path: Path) -> None:
    one = running.ask(lambda e: recorder.Recorder(e.steering.policy, e.steering.devices, 0.0))
    running.ask(lambda e: e.books.recorders.extend([one] * recorder.MOST))
    ran = run("--socket", str(running.socket), "record", str(tmp_path / "x"))
    assert ran.code == 1
    assert "4 records are being made already" in ran.err
    running.ask(lambda e: e.books.recorders.clear())


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "it is empty"),
        (['{"a": 1}'], "its first line does not say mfsd-record"),
        (
            ['{"mfsd-record": 2, "version": "9.9"}'],
            "format 2, and this mfsd reads 1: take the version that made it, 9.9",
        ),
        (["nonsense"], "line 1"),
        ([recording.head("0", "edf", {}, 5, {"a": 1.0}), '{"t": 1, "level": 5, "to": 1}'], "line 2: KeyError: 5"),
        ([recording.head("0", "edf", {}, 5, {"a": 1.0}), "[]"], "line 2: no object"),
    ],
)
def test_what_is_no_record_is_refused_with_a_reason(tmp_path: Path, lines: list[str], problem: str) -> None:
    file = tmp_path / "r"
    file.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    with pytest.raises(recording.RecordError, match=problem):
        recording.read(file)
    file.write_bytes(b"plain")
    with pytest.raises(recording.RecordError, match="no record"):
        recording.read(file)


def test_a_file_that_was_cut_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    with recording.Writer(tmp_path / "r", 1 << 20) as writer:
        writer.write([recording.head("0", "edf", {}, 5, {"a": 1.0})])
        writer.write([recording.line({"t": 1.0, "rates": [2.0]})])
        whole = (tmp_path / "r").stat().st_size
        writer.write([recording.line({"t": float(n), "rates": [3.0]}) for n in range(500)])
    data = (tmp_path / "r").read_bytes()
    (tmp_path / "cut").write_bytes(data[: whole + 20])
    found = recording.read(tmp_path / "cut")
    assert found.cut
    assert found.rates[0] >= 2.0
