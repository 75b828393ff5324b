# SPDX-License-Identifier: Apache-2.0
"""The metrics of a real daemon, as Prometheus's own parser reads them; and where they are served."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from support.daemons import Api, Running, carry, connected
from support.waiting import WAIT_S, wait_for

import mfsd
from mfsd.client import Client, Cookie, Stage, cookie_of
from mfsd.daemon import exposition
from mfsd.engine import tally
from mfsd.ground.metrics import METRICS
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

ACCEPT: Final = {"Accept": "application/openmetrics-text; version=1.0.0"}
EVERY_MACHINE: Final = {"process_virtual_memory_bytes", "process_resident_memory_bytes", "process_start_time_seconds",
                        "process_cpu_seconds", "process_open_fds", "process_max_fds"}  # fmt: skip


class UnixConnection(http.client.HTTPConnection):
    """HTTP through a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))


def get(connection: http.client.HTTPConnection) -> str:
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers=ACCEPT)
        answer = connection.getresponse()
        assert answer.status == 200
        assert "openmetrics" in str(answer.getheader("Content-Type"))
        return answer.read().decode()


def families(text: str) -> dict[str, Any]:
    return {f.name: f for f in text_string_to_metric_families(text)}  # type: ignore[no-untyped-call]


def scrape(daemon: Running) -> dict[str, Any]:
    return families(get(UnixConnection(daemon.socket.with_name("mfsd.sock.metrics"))))


def value(found: dict[str, Any], name: str, sample: str = "", **labels: str) -> float:
    (one,) = [
        s.value
        for s in found[f"mfsd_{name}"].samples
        if s.name == f"mfsd_{name}{sample}" and labels.items() <= s.labels.items()
    ]
    return float(one)


def test_all_metrics_are_there_as_described_and_no_others(running: Running) -> None:
    found = scrape(running)
    assert set(found) == {f"mfsd_{m.name}" for m in METRICS} | EVERY_MACHINE
    for metric in METRICS:
        family = found[f"mfsd_{metric.name}"]
        assert (family.type, family.documentation, family.unit) == (metric.kind, metric.what, metric.unit)
        for sample in family.samples:
            if metric.kind != "info":
                assert set(sample.labels) - {"le"} == set(metric.labels), metric.name
    (build,) = found["mfsd_build"].samples
    policy = running.ask(lambda engine: engine.steering.policy.name)
    assert build.labels == {"version": mfsd.__version__, "policy": policy, "loader": ""}
    assert (running.socket.with_name("mfsd.sock.metrics").stat().st_mode & 0o777) == 0o600


def test_descriptions_are_complete_and_tell_one_thing_each() -> None:
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert len({m.what for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.what.endswith("."), metric.name
        assert not metric.name.endswith("_total")


def test_what_happens_is_counted(running: Running) -> None:
    before = scrape(running)
    with connected() as (near, far), Client("worker", running.target) as client:
        client.request("r-1", ttft_left_s=5.0)
        client.transfer("t", Cookie(cookie_of(near)), size=100_000, stage=Stage.P2D, request="r-1")
        client.transfer("late", Cookie(cookie_of(far)), size=1 << 40, stage=Stage.COLLECTIVE, request="r-1")
        assert client.flush(10)
        assert wait_for(lambda: value(found := scrape(running), "transfers", stage="p2d") == 1 and found)
        found = scrape(running)
        assert value(found, "sessions") == 1
        assert value(found, "requests") == 1
        assert value(found, "transfers", stage="collective") == 1
        assert value(found, "transfers_left_bytes", stage="p2d") == 100_000
        assert 0 < value(found, "least_laxity_seconds", stage="p2d") < 5
        carry(near, far, 100_000)
        client.done(transfer="t")
        client.cancel(transfer="late")
        client.done(request="r-1")
        assert client.flush(10)
        wait_for(lambda: value(scrape(running), "requests_ended", "_total", result="met") == 1)
    found = scrape(running)
    assert value(found, "transfers_ended", "_total", result="completed") == 1
    accepted = {"sample": "_total", "result": "accepted"}
    assert value(found, "hints", **accepted) - value(before, "hints", **accepted) == 6
    (example,) = [s.exemplar for s in found["mfsd_request_slack_seconds"].samples if s.exemplar]
    assert example.labels == {"request_id": "r-1"}
    assert 0 < example.value < 5
    for name in ("transfer_queue_seconds", "transfer_wire_seconds"):
        assert value(found, name, "_count", stage="p2d") == 1
        assert value(found, name, "_count", stage="collective") == 0  # it was not delivered


def test_users_are_counted_apart_and_no_more_of_them_than_have_room(running: Running) -> None:
    uid = str(os.getuid())
    with connected() as (near, _), Client("worker", running.target) as client:
        client.request("met", ttft_left_s=50.0)
        client.request("missed", ttft_left_s=-1.0)
        client.request("stays", ttft_left_s=50.0)
        client.transfer("t", Cookie(cookie_of(near)), size=100_000, stage=Stage.P2D, request="stays")
        client.done(request="met")
        assert client.flush(10)
        time.sleep(0.05)  # until the deadline has passed that it was given at the least
        client.done(request="missed")
        assert client.flush(10)
        wait_for(lambda: value(scrape(running), "user_transfers", user=uid, stage="p2d") == 1)
        found = scrape(running)
        assert 0 < value(found, "user_least_laxity_seconds", user=uid, stage="p2d") < 50
        for result in ("met", "missed"):
            assert value(found, "user_requests_ended", "_total", user=uid, result=result) == 1
    many = {user: [1, 2] for user in range(1000, 1000 + tally.USERS_KEPT)} | {None: [5, 6]}
    running.ask(lambda e: e.books.tally.users.update(many))
    found = scrape(running)
    assert value(found, "user_requests_ended", "_total", user="other", result="met") == 6
    assert value(found, "user_requests_ended", "_total", user="1000", result="missed") == 1


def test_transfers_in_time_are_counted_by_user_and_stage(running: Running) -> None:
    by = {"user": str(os.getuid()), "stage": "p2d"}
    with connected() as (near, far), Client("worker", running.target) as client:
        client.request("r", ttft_left_s=50.0)
        cookie = Cookie(cookie_of(near))
        client.transfer("in time", cookie, size=1000, stage=Stage.P2D, request="r")
        client.transfer("undated", Cookie(cookie_of(far)), size=1000, stage=Stage.BACKGROUND)
        client.transfer("given up", Cookie(cookie_of(far)), size=1000, stage=Stage.P2D, request="r")
        assert client.flush(10)
        wait_for(lambda: value(scrape(running), "transfers", stage="p2d") == 2)
        near.sendall(bytes(1000))
        client.done(transfer="in time")
        client.cancel(transfer="given up")
        client.cancel(transfer="undated")
        assert client.flush(10)
        wait_for(lambda: value(scrape(running), "transfers_ended", "_total", result="completed") == 1)
    found = scrape(running)
    assert value(found, "user_transfers_ended", "_total", **by, result="met") == 1
    assert value(found, "user_transfers_ended", "_total", **by, result="missed") == 0
    assert {s.labels["stage"] for s in found["mfsd_user_transfers_ended"].samples} == {"p2d"}


def test_the_api_gives_the_same_text(running: Running, api: Api) -> None:
    assert set(families(api.control.GetMetrics(pb.GetMetricsRequest()).text)) == set(scrape(running))


def test_loopback_and_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "IDLE_S", 3600)  # whoever ends does not wait for it
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    daemon = Running(tmp_path, metrics={"listen": f"127.0.0.1:{port}"})
    assert "mfsd_build" in families(get(http.client.HTTPConnection("127.0.0.1", port, timeout=10)))
    daemon.stop()
    daemon = Running(tmp_path, metrics={"listen": "off"})
    assert not daemon.socket.with_name("mfsd.sock.metrics").exists()
    daemon.stop()


def test_who_never_asks_is_not_waited_for_and_takes_no_more_threads(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition._Handler, "timeout", 3600)
    monkeypatch.setattr(exposition, "PATIENCE_S", 3600)
    with contextlib.ExitStack() as stack:

        def half_asked() -> socket.socket:
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(f"{running.socket}.metrics")
            one.settimeout(WAIT_S)
            one.send(b"GET /metr")
            return one

        some = [half_asked() for _ in range(exposition.SCRAPES)]
        with contextlib.suppress(ConnectionResetError):
            assert half_asked().recv(1) == b""
        assert scrapers() == exposition.SCRAPES
        running.stop()
        for one in some:
            while one.recv(1000):
                pass
        assert scrapers() == 0


def test_who_asks_a_byte_at_a_time_keeps_nobody_out(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        some = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(exposition.SCRAPES)]
        for one in some:
            one.connect(f"{running.socket}.metrics")
            one.send(b"G")
        wait_for(lambda: scrapers() == exposition.SCRAPES)
        with pytest.raises((http.client.HTTPException, OSError)):
            scrape(running)
        monkeypatch.setattr(exposition, "IN_ALL_S", 0.0)  # the next byte has its ten seconds all the same
        for one in some:
            one.send(b"E")
        assert "mfsd_build" in scrape(running)
        wait_for(lambda: scrapers() <= 1)


def scrapers() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_tls_and_only_for_those_with_a_certificate(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost"]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = {"tls_cert": str(certificate), "tls_key": str(key), "tls_client_ca": str(certificate)}
    daemon = Running(tmp_path, metrics={"listen": f"0.0.0.0:{port}"} | tls)
    try:
        context = ssl.create_default_context(cafile=str(certificate))
        stranger = http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
        with pytest.raises((ssl.SSLError, http.client.RemoteDisconnected, ConnectionError)):
            get(stranger)
        context.load_cert_chain(certificate, key)
        assert "mfsd_build" in families(get(http.client.HTTPSConnection("localhost", port, context=context)))
    finally:
        daemon.stop()
