# SPDX-License-Identifier: Apache-2.0
"""Every command that needs a daemon, with a real one: what it asks, what it prints, how it ends."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import structlog
from google.protobuf import json_format
from support import samples
from support.ctl import Rig, run
from support.daemons import Running
from support.samples import COOKIE, TO
from support.tap import Scripted, served
from support.waiting import wait_for

from mfsd import __version__
from mfsd.cli import output
from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import hints_pb2, hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERY_ANSWER: Final = [
    ("status",),
    ("connections",),
    ("transfers",),
    ("watch", "--count", "1", "--connections"),
    ("explain", "t1"),
    ("plan",),
    ("observe",),
    ("enforce",),
    ("pause",),
    ("resume",),
    ("restore",),
    ("hint", "done", "transfer", "t1"),
]


@pytest.fixture
def busy(rig: Rig) -> Rig:
    """A request with a transfer on a known connection (t1) and one whose socket is not known yet (t2)."""
    sent = [
        ("request", "r", "--ttft-left", "60s"),
        ("transfer", "t1", "--request", "r", "--stage", "p2d", "--bytes", "10MB", "--from", "10.0.0.1:5000", *TO),
        ("transfer", "t2", "--request", "r", "--stage", "collective", "--bytes", "5", "--from", "10.0.0.1", *TO),
    ]
    for args in sent:
        ran = rig.run("hint", *args)
        assert ran.code == 0, ran.err
    wait_for(lambda: rig.run("connections", "--json").json["connections"][0]["level"] >= 0)
    return rig


@pytest.mark.parametrize("args", EVERY_ANSWER, ids=lambda a: a[0])
def test_text_is_plain(busy: Rig, args: tuple[str, ...]) -> None:
    ran = busy.run(*args)
    assert ran.code == 0, ran.err
    assert ran.out.strip()
    assert "\x1b" not in ran.out


@pytest.mark.parametrize("args", EVERY_ANSWER, ids=lambda a: a[0])
def test_json_is_protobufs_with_the_names_of_the_proto(busy: Rig, args: tuple[str, ...]) -> None:
    kinds = {
        "connections": pb.ListConnectionsReply, "transfers": pb.ListTransfersReply, "watch": pb.WatchReply,
        "explain": pb.Explanation, "plan": pb.Plan, "restore": pb.RestoreReply, "hint": hints_pb2.HintReply,
    }  # fmt: skip
    kind = kinds.get(args[0], pb.Status)
    ran = busy.run(*args, "--json")
    assert ran.code == 0, ran.err
    message = json_format.ParseDict(ran.json, kind())
    assert message.ByteSize() > 0 or args[0] in ("plan", "restore")  # as above
    if kind is pb.Status:
        assert int(ran.json["rss_bytes"]) > 1 << 20  # 64 bits: a string
        assert isinstance(ran.json["rss_bytes"], str)
        assert ran.json["counters"]["rescues"] == "0"  # zero is there, too


def test_options_may_stand_before_the_command(busy: Rig) -> None:
    before, after = busy.run("--json", "transfers"), busy.run("transfers", "--json")
    assert [t["id"] for t in before.json["transfers"]] == [t["id"] for t in after.json["transfers"]]


def test_status(busy: Rig) -> None:
    lines = busy.run("status").out.splitlines()
    assert lines[0].startswith(f"mfsd {__version__}  observe  policy ")
    counts = "sessions 1  requests 1  batches 0  transfers 2  connections 1 of 16384  waiting selectors 2"
    assert wait_for(lambda: [line for line in busy.run("status").out.splitlines() if line == counts])
    assert lines[3].startswith("hints accepted 3, rejected 0")
    assert "no devices: name one in a [[device]] section of the configuration" in lines
    assert "! no [[device]] is configured: hints are taken, nothing is shaped" in lines
    lost = "! session mfsctl announces transfers on 10.0.0.1 -> 10.0.0.2:6000, which matches no connection"
    assert lost in busy.run("status").out.splitlines()


def test_lists(busy: Rig) -> None:
    ran = busy.run("connections", "--limit", "3")
    assert busy.last == pb.ListConnectionsRequest(page_size=3)
    (line,) = ran.out.splitlines()[1:]
    assert line.split()[:5] == ["0", "10.0.0.1:5000", "->", "10.0.0.2:6000", "p2d"]
    ran = busy.run("transfers")
    assert busy.last == pb.ListTransfersRequest()
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines()[1:]}
    assert rows["t1"][1:8] == ["r", "p2d", "0", "10", "MB", "of", "10"]
    assert rows["t2"][1:8] == ["r", "collective", "0", "5", "B", "of", "5"]
    assert len(busy.run("transfers", "--limit", "1").out.splitlines()) == 2
    (first, second) = sorted(busy.run("transfers", "--json").json["transfers"], key=lambda t: t["id"])
    assert 0 < int(first["deadline_us"]) <= 60_000_000
    assert (first["slot"], second["slot"]) == (0, -1)


def test_lists_of_nothing(rig: Rig) -> None:
    assert rig.run("connections").out == "no connections\n"
    assert rig.run("transfers").out == "no transfers\n"
    assert rig.run("transfers", "--json").json == {"transfers": []}


def test_long_lists_come_in_pages(busy: Rig) -> None:
    with introduced(f"unix:{busy.socket}") as channel:
        batch = hints_pb2.HintBatch(session="many", seq=1)
        batch.transfers.ids.extend(f"t{i}" for i in range(1000))
        batch.transfers.stage.append(hints_pb2.STAGE_BACKGROUND)
        batch.transfers.bytes.append(5)
        batch.transfers.selectors.add().tuple.dst_addr = "10.0.0.2"
        assert not hints_pb2_grpc.HintsStub(channel).Send(batch).rejected
    busy.tap.asked.clear()
    shown = [line.split()[0] for line in busy.run("transfers").out.splitlines()[1:]]
    assert sorted(shown) == sorted([*(f"t{i}" for i in range(1000)), "t1", "t2"])
    assert [bool(request.page_token) for request in busy.tap.asked] == [False, True]
    assert len(busy.run("transfers", "--json").json["transfers"]) == 1002
    assert len(busy.run("transfers", "--json", "--limit", "1001").json["transfers"]) == 1001
    assert [request.page_size for request in busy.tap.asked[-2:]] == [1001, 1]


def test_rows_are_the_json_that_protobuf_makes(capsys: pytest.CaptureFixture[str]) -> None:
    odd = pb.TransferState(id="\x1bä", mlu=float("inf"), stage=cast("Any", 77), bytes=1 << 63, slot=-1)
    rows = [*samples.transfers(), odd]
    output.print_rows("transfers", rows)
    assert json.loads(capsys.readouterr().out)["transfers"] == [output.as_dict(row) for row in rows]


def test_watch(busy: Rig) -> None:
    ran = busy.run("watch", "--count", "3", "--interval", "100ms", "--json")
    assert ran.code == 0
    ups = [json.loads(line)["status"]["uptime_s"] for line in ran.out.splitlines()]
    assert len(ups) == 3
    assert ups == sorted(set(ups))
    assert busy.last == pb.WatchRequest(interval_us=100_000)
    assert busy.run("watch", "--count", "2", "--interval", "100ms").out.count(f"mfsd {__version__}") == 2
    ran = busy.run("watch", "--count", "1", "--connections")
    assert busy.last == pb.WatchRequest(interval_us=1_000_000, connections=True)
    assert "10.0.0.1:5000 -> 10.0.0.2:6000" in ran.out
    asked = busy.last
    for interval in ("10ms", "0s", "-1s", "25h", "99999999999999h"):
        wrong = busy.run("watch", "--interval", interval)
        assert (wrong.code, wrong.out) == (2, "")
        words = " ".join(wrong.err.replace("\u2502", " ").split())
        assert f"'--interval': '{interval}' is not from 100ms to 24h" in words
    assert busy.last is asked


def test_explain(busy: Rig) -> None:
    ran = busy.run("explain", "t1")
    assert ran.code == 0, ran.err
    assert busy.last == pb.ExplainRequest(transfer_id="t1")
    sentences = [line for line in ran.out.splitlines() if line.startswith("- ")]
    told = busy.run("explain", "t1", "--json").json
    assert len(sentences) == len(told["reasons"]) > 1
    assert "- packets are not steered: the mode is observe" in sentences
    figures = {line.split()[0] for line in ran.out.partition("figure ")[2].splitlines()[1:]}
    assert figures == set(told["figures"])
    assert busy.run("explain", "--slot", "0").code == 0
    assert busy.last == pb.ExplainRequest(slot=0)  # zero is a slot
    assert busy.last.WhichOneof("target") == "slot"
    missing = busy.run("explain", "--cookie", str(COOKIE))
    assert busy.last == pb.ExplainRequest(cookie=COOKIE)
    assert (missing.code, missing.out) == (1, "")
    assert missing.err == f"mfsctl: no cookie {COOKIE}; it may be finished: list connections or transfers\n"
    gone = busy.run("explain", "t9")
    assert gone.err == "mfsctl: no transfer 't9'; it may be finished: list connections or transfers\n"
    assert busy.run("hint", "request", "r9", "--ttft-left", "60s").code == 0
    request = busy.run("explain", "r9")
    assert request.err == "mfsctl: 'r9' is a request; name one of its transfers, or a connection\n"
    asked = len(busy.tap.asked)
    for wrong in ((), ("t1", "--slot", "1")):
        assert busy.run("explain", *wrong).code == 2
    assert len(busy.tap.asked) == asked


def test_acting(rig: Rig) -> None:
    for word, mode in (("enforce", pb.MODE_ENFORCE), ("observe", pb.MODE_OBSERVE)):
        assert rig.run(word).out.startswith(f"mode: {word}\n")
        assert rig.last == pb.SetModeRequest(mode=mode)
    for _ in range(2):  # it may be said twice
        assert rig.run("pause").out.startswith("mode: observe, paused\n")
        assert rig.last == pb.PauseRequest()
        assert rig.run("status", "--json").json["paused"] is True
    ran = rig.run("resume")
    assert rig.last == pb.ResumeRequest()
    assert ran.out.splitlines() == [
        "mode: observe",
        "! no [[device]] is configured: hints are taken, nothing is shaped",
    ]


def test_plan_and_restore_of_no_device(rig: Rig) -> None:
    assert rig.run("plan", "--json").json == {"devices": []}
    assert rig.run("restore").out == "nothing to restore\n"
    assert rig.last == pb.RestoreRequest()
    for word, request in (("plan", pb.GetPlanRequest(device="eth7")), ("restore", pb.RestoreRequest(device="eth7"))):
        ran = rig.run(word, "eth7")
        assert rig.last == request
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == "mfsctl: no device 'eth7' is configured; configured: none\n"


@pytest.fixture
def bad_news(tmp_path: Path) -> Iterator[str]:
    """What an older daemon says where it can't help; its devices would be in the way of a test without privileges."""
    refused = pb.DevicePlan(device="eth0", found=["qdisc taprio"], refusals=["not exactly"], undo=["back"])
    answers = Scripted(
        GetStatus=lambda *_: pb.Status(version="0.0.9"),
        GetPlan=lambda *_: pb.Plan(devices=[refused]),
        Restore=lambda *_: pb.RestoreReply(restored=["eth1"], problems=["eth0: somebody replaced the root"]),
    )
    with served(tmp_path / "s", answers):
        yield str(tmp_path / "s")


def test_bad_news(bad_news: str) -> None:
    refused = run("--socket", bad_news, "plan")
    assert refused.code == 1
    assert refused.out == "eth0\nfound\n  qdisc taprio\nmfsd will not touch it\n  not exactly\nundo\n  back\n"
    partly = run("--socket", bad_news, "restore")
    assert partly.code == 1
    assert (partly.out, partly.err) == ("eth1: as it was found\n", "mfsctl: eth0: somebody replaced the root\n")
    for args in (("plan", "--json"), ("restore", "--json")):
        assert run("--socket", bad_news, *args).code == 1
    assert run("--socket", bad_news, "version").out == f"mfsctl {__version__}\nmfsd 0.0.9\n"
    unknown = run("--socket", bad_news, "transfers")
    assert unknown.code == 1
    assert "it is older than this mfsctl: restart it" in unknown.err


# --- where time went, metrics, logs, rules ----------------------------------------------------------------------------


def test_where_the_time_of_a_request_goes_while_it_lives_and_after(busy: Rig) -> None:
    text = busy.run("trace", "r")
    assert text.code == 0, text.err
    assert text.out.startswith("request r of session mfsctl: not over after ")
    assert "to spare" in text.out.splitlines()[0]
    rows = {line.split()[0]: line for line in text.out.splitlines() if line.startswith(("t1", "t2"))}
    assert "p2d" in rows["t1"]
    assert "under way" in rows["t1"]
    assert "collective" in rows["t2"]
    told = busy.run("trace", "r", "--json").json
    assert not told["over"]
    assert {t["id"]: (t["bytes"], "ended_s" in t) for t in told["transfers"]} == {
        "t1": ("10000000", False),
        "t2": ("5", False),
    }
    assert sum(told["spent"].values()) == pytest.approx(told["seconds"], abs=1e-3)
    assert busy.run("hint", "cancel", "transfer", "t2").code == 0
    assert busy.run("hint", "done", "request", "r").code == 0
    over = busy.run("trace", "r", "--json").json
    assert over["over"]
    ended = next(t for t in over["transfers"] if t["id"] == "t2")
    assert "ended_s" in ended
    assert not ended["delivered"]
    nobody = busy.run("trace", "nobody")
    assert nobody.code == 1
    assert "nobody" in nobody.err


def test_metrics_count_what_has_been_said(busy: Rig) -> None:
    before = busy.run("stats", "hints", "--json").json
    assert busy.run("hint", "transfer", "t3", "--request", "no", "--stage", "p2d", "--bytes", "1", *TO).code == 1
    assert busy.run("hint", "request", "another", "--ttft-left", "1s").code == 0
    after = busy.run("stats", "hints", "--json").json

    def total(told: dict[str, Any], name: str) -> float:
        return float(sum(s["value"] for s in told[name]["samples"] if s["name"].endswith("_total")))

    grown = {name: total(after, name) - total(before, name) for name in after if after[name]["type"] == "counter"}
    assert grown["mfsd_hints"] == 2
    table = busy.run("stats", "hints").out
    assert "hints_total" in table
    assert "build_info" not in table
    assert busy.run("stats", "--openmetrics").out.endswith("# EOF\n")
    none = busy.run("stats", "no-such")
    assert (none.code, none.out) == (1, "")
    assert "'no-such'" in none.err


def test_the_level_of_the_log_changes_at_run_time(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logged:
        running = Running(tmp_path)
        try:
            rig = Rig(cast("Any", None), running.socket)
            before = rig.run("log-level").out.strip()
            assert rig.run("log-level", "error").out == "error\n"
            assert rig.run("log-level", "--json").json == {"level": "error"}
            assert rig.run("log-level", "debug").out == "debug\n"
            assert rig.run("log-level", "loud").code == 2
            assert rig.run("log-level", before).out == f"{before}\n"
        finally:
            running.stop()
    assert [e["now"] for e in logged if e["event"] == "log level"] == ["error", "debug", before]


def test_rules_of_the_library_and_none_of_the_daemon(rig: Rig) -> None:
    assert rig.run("rules", "--json").code == 0
    listed = rig.run("rules", "--library")
    assert listed.code == 0
    assert "redis" in listed.out
    shown = rig.run("rules", "--library", "redis")
    assert shown.code == 0, shown.err
    assert "[[rule]]" in shown.out
    assert rig.run("rules", "--library", "no-such-program").code != 0


def test_without_rules_none_is_said_of_a_connection(rig: Rig) -> None:
    asked = rig.run("rules", "--port", "6000")
    assert (asked.code, asked.out) == (0, rig.run("rules").out)
    assert asked.out.startswith("no rules: ")
