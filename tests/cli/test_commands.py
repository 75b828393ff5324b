# SPDX-License-Identifier: Apache-2.0
"""Every command: tables, JSON, exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import json_format
from support.canned import COOKIE, status
from support.ctl import run

from mfsd import __version__
from mfsd.cli import app, glossary
from mfsd.daemon.config import DEFAULT_PATH, DaemonConfig
from mfsd.datapath import _abi
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import hints_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from support.ctl import Rig

EVERY_ANSWER = [
    ("status",),
    ("connections",),
    ("transfers",),
    ("watch", "--count", "1", "--connections"),
    ("explain", "t"),
    ("plan",),
    ("observe",),
    ("enforce",),
    ("pause",),
    ("resume",),
    ("restore",),
    ("hint", "done", "transfer", "t"),
]


@pytest.mark.parametrize("args", EVERY_ANSWER, ids=lambda a: a[0])
def test_tables_are_narrow_and_plain(rig: Rig, args: tuple[str, ...]) -> None:
    ran = rig.run(*args)
    assert ran.code == 0, ran.err
    assert ran.out.strip()
    assert max(map(len, ran.out.splitlines())) < 100
    assert "\x1b" not in ran.out


@pytest.mark.parametrize("args", EVERY_ANSWER, ids=lambda a: a[0])
def test_json_is_protobufs_with_the_names_of_the_proto(rig: Rig, args: tuple[str, ...]) -> None:
    before, after = rig.run("--json", *args), rig.run(*args, "--json")
    assert before.code == after.code == 0
    assert before.json == after.json
    kinds = {
        "status": pb.Status, "connections": pb.ListConnectionsReply, "transfers": pb.ListTransfersReply,
        "watch": pb.WatchReply, "explain": pb.Explanation, "plan": pb.Plan, "restore": pb.RestoreReply,
        "hint": hints_pb2.HintReply,
    }  # fmt: skip
    message = json_format.ParseDict(after.json, kinds.get(args[0], pb.Status)())
    assert message.ByteSize() > 0
    if kinds.get(args[0], pb.Status) is pb.Status:
        assert after.json["rss_bytes"] == "88000000"
        assert after.json["pending_selectors"] == 0  # zero is there, too


def test_status(rig: Rig) -> None:
    ran = rig.run("status")
    for text in ("mfsd 9.8.7", "enforce", "2 h 13 min", "1.23 M", "1 Gbit/s", "busy 73%", "6d66:2001", "1 PB", "46",
                 "! eth1: observed only: [link] is foreign"):  # fmt: skip
        assert text in ran.out
    assert "packets: cookie 1 G\n" in ran.out  # counters at zero are left out
    rig.canned.empty = True
    assert "no devices" in rig.run("status").out


def test_lists(rig: Rig) -> None:
    ran = rig.run("connections", "--limit", "3")
    assert rig.canned.asked[-1].limit == 3
    assert "fd12:3456" in ran.out
    assert rig.run("connections", "--json").json["connections"][0]["cookie"] == str(COOKIE)
    ran = rig.run("transfers")
    for text in ("-686 ms", "1.25", "scavenger", "collective", "none"):
        assert text in ran.out
    (first, second) = rig.run("transfers", "--json").json["transfers"]
    assert first["deadline_us"] == "-686000"
    assert "deadline_us" not in second
    rig.canned.empty = True
    assert rig.run("connections").out == "no connections\n"
    assert rig.run("transfers").out == "no transfers\n"


def test_watch(rig: Rig) -> None:
    ran = rig.run("watch", "--count", "3", "--interval", "100ms", "--json")
    assert ran.code == 0
    assert len([json.loads(line) for line in ran.out.splitlines()]) == 3
    assert rig.canned.asked[-1].interval_us == 100_000
    assert rig.run("watch", "--count", "2").out.count("mfsd 9.8.7") == 2


def test_explain(rig: Rig) -> None:
    ran = rig.run("explain", "t1")
    assert rig.canned.asked[-1].transfer_id == "t1"
    assert ran.out.startswith("- word")
    assert "- second" in ran.out
    assert "inf" in ran.out
    rig.run("explain", "--slot", "0")
    assert rig.canned.asked[-1].WhichOneof("target") == "slot"
    rig.run("explain", "--cookie", str(COOKIE))
    assert rig.canned.asked[-1].cookie == COOKIE
    missing = rig.run("explain", "nobody")
    assert missing.code == 1
    assert missing.err == "mfsctl: no transfer_id 'nobody'\n"
    for wrong in ((), ("t", "--slot", "1")):
        assert rig.run("explain", *wrong).code == 2


def test_acting(rig: Rig) -> None:
    assert "mode: observe" in rig.run("observe").out
    assert rig.canned.mode == pb.MODE_OBSERVE
    assert "mode: enforce" in rig.run("enforce").out
    assert "mode: enforce, paused" in rig.run("pause").out
    assert rig.run("pause", "--json").json["paused"] is True
    assert "mode: enforce\n" in rig.run("resume").out


def test_plan(rig: Rig) -> None:
    ran = rig.run("plan")
    assert "[done] A step" in ran.out
    assert "nothing to do" in ran.out
    command = ran.out[ran.out.index("    tc class") : ran.out.index("undo")]
    assert command.replace("\\\n", "").split() == ["tc", "class", "add", *["dev", "eth0"] * 30]
    refused = rig.run("plan", "refused")
    assert refused.code == 1
    assert "not exactly" in refused.out
    assert "steps" not in refused.out


def test_restore(rig: Rig) -> None:
    assert rig.run("restore").out == "eth0: as it was found\n"
    broken = rig.run("restore", "broken")
    assert broken.code == 1
    assert "somebody replaced the root" in broken.err


def test_hints(rig: Rig) -> None:
    def sent(*args: str) -> hints_pb2.Hint:
        ran = rig.run("hint", *args)
        assert ran.code == 0, ran.err
        assert "accepted" in ran.out
        assert "t9: infeasible: too late" in ran.out
        (hint,) = rig.canned.batches[-1].hints
        return hint

    request = sent("request", "r", "--ttft-left", "-1.5s", "--batch", "b", "--compute-left", "20ms", "--ttl", "1min")
    assert request.request == hints_pb2.Request(
        id="r", ttft_left_us=-1_500_000, batch_id="b", compute_left_us=20_000, ttl_us=60_000_000
    )
    batch = sent("batch", "b", "--request", "r", "--request", "s", "--layers", "80", "--layer-compute", "1500us")
    assert batch.batch == hints_pb2.Batch(id="b", request_ids=["r", "s"], layers=80, layer_compute_us=1500)
    progress = sent("progress", "b", "7", "--compute-done")
    assert progress.progress == hints_pb2.LayerProgress(batch_id="b", current_layer=7, compute_done=True)
    assert sent("done", "batch", "b").completion.batch_id == "b"
    assert sent("cancel", "request", "r").cancellation.request_id == "r"
    endpoints = ("--from", "10.0.0.1:5000", "--to", "10.0.0.2:6000-6010")
    what = ("--stage", "p2d", "--bytes", "1.5MiB", "--request", "r", "--layer", "3", "--deadline", "180ms")
    transfer = sent("transfer", "t", *what, *endpoints).transfer
    assert (transfer.bytes, transfer.target_layer, transfer.deadline_us) == (1_572_864, 3, 180_000)
    assert transfer.stage == hints_pb2.STAGE_P2D
    assert transfer.selector.tuple == hints_pb2.Tuple(
        src_addr="10.0.0.1", dst_addr="10.0.0.2", src_port=hints_pb2.PortRange(first=5000),
        dst_port=hints_pb2.PortRange(first=6000, last=6010), protocol=6,
    )  # fmt: skip
    process = sent("mark", "--stage", "collective", "--pid", "42", "--to", "[fd00::/64]:29500").connection
    assert process.selector.process == hints_pb2.ProcessPeer(
        pid=42, remote="fd00::/64", remote_port=hints_pb2.PortRange(first=29500)
    )
    unmark = sent("mark", "--stage", "none", "--cookie", str(COOKIE)).connection
    assert (unmark.selector.cookie, unmark.stage) == (COOKIE, hints_pb2.STAGE_UNSPECIFIED)
    udp = sent("mark", "--stage", "p2d", "--udp", "--from", ":5", "--to", "fd00::1").connection.selector.tuple
    assert (udp.protocol, udp.dst_addr, udp.src_addr, udp.src_port.first) == (17, "fd00::1", "", 5)
    rig.run("hint", "done", "batch", "b", "--session", "s", "--session-pid", "1")
    assert (rig.canned.batches[-1].session, rig.canned.batches[-1].pid) == ("s", 1)


def test_rejected_hint(rig: Rig) -> None:
    ran = rig.run("hint", "done", "batch", "b", "--session", "bad")
    assert ran.code == 1
    assert ran.err == "mfsctl: rejected: transfer.bytes: must be above zero\n"
    assert rig.run("hint", "done", "batch", "b", "--session", "bad", "--json").code == 1


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ((), "name the connection"),
        (("--from", "10.0.0.1:5"), "name the connection"),
        (("--cookie", "1", "--to", "10.0.0.1"), "--cookie names the socket already"),
        (("--pid", "1", "--from", "10.0.0.1"), "--pid takes --to only"),
        (("--to", "10.0.0.0/8:5"), "only --pid takes one"),
        (("--to", "10.0.0.1:70000"), "65535"),
        (("--to", "10.0.0.1:9-5"), "FIRST <= LAST"),
        (("--to", "10.0.0.1:0"), "port 0"),
        (("--to", "10.0.0.300:5"), "10.0.0.300"),
        (("--to", "host:5"), "ADDRESS"),
    ],
)
def test_wrong_selectors(rig: Rig, selector: tuple[str, ...], words: str) -> None:
    ran = rig.run("hint", "mark", "--stage", "p2d", *selector)
    assert ran.code == 2
    assert words in ran.err.replace("\n", " ")
    assert not rig.canned.batches


@pytest.mark.parametrize(
    "args", [("request", "r", "--ttft-left", "5"), ("transfer", "t", "--stage", "p2d", "--bytes", "x")]
)
def test_wrong_values(rig: Rig, args: tuple[str, ...]) -> None:
    ran = rig.run("hint", *args)
    assert ran.code == 2
    assert "write" in ran.err


# --- errors of the connection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [a for a in EVERY_ANSWER if a[0] not in ("plan", "restore")], ids=lambda a: a[0])
def test_no_daemon(tmp_path: Path, args: tuple[str, ...]) -> None:
    ran = run("--socket", str(tmp_path / "none"), *args)
    assert ran.code == 3
    assert ran.out == ""
    assert ran.err.startswith("mfsctl: mfsd is not running: there is no socket")
    assert len(ran.err.splitlines()) == 1
    assert "systemctl start mfsd" in ran.err


def test_dead_socket(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
    ran = run("--socket", str(path), "status")
    assert ran.code == 3
    assert "nobody listens" in ran.err
    assert "mfsctl restore" in ran.err
    assert run("--socket", str(tmp_path), "status").code == 3  # a folder
    assert run("--socket", "x/" * 100, "status").code == 3  # too long for a socket
    assert run("--socket", "127.0.0.1:1", "status").code == 3
    assert run("status", env={"MFSD_SOCKET": str(rig.socket)}).code == 0
    assert run("status", "--socket", f"unix:{rig.socket}", env={"MFSD_SOCKET": "/nowhere"}).code == 0


AS_NOBODY = """
import os, sys
import mfsd.cli.show  # while the interpreter's files are still readable
from mfsd.cli.app import mfsctl
from click.testing import CliRunner
os.setgroups([]); os.setgid(65534); os.setuid(65534)
r = CliRunner().invoke(mfsctl, ["--socket", sys.argv[1], "status"], catch_exceptions=False)
print(r.stderr, end="")
os._exit(r.exit_code)
"""


@pytest.mark.parametrize("closed", ["socket", "folder"])
def test_not_permitted(rig: Rig, closed: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    for folder in list(rig.socket.parents)[:-2]:  # pytest makes its folders 0700
        folder.chmod(0o755)
    (rig.socket if closed == "socket" else rig.socket.parent).chmod(0o660)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(rig.socket)], capture_output=True, text=True, check=False
    )
    rig.socket.parent.chmod(0o700)
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stdout.startswith("mfsctl: you may not use")
    assert ("usermod -aG root" if closed == "socket" else "as root") in done.stdout


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, 4, "refuses"),
        (grpc.StatusCode.UNAUTHENTICATED, 4, "does not know you"),
        (grpc.StatusCode.UNAVAILABLE, 3, "no answer"),
        (grpc.StatusCode.UNIMPLEMENTED, 1, "older"),
        (grpc.StatusCode.INTERNAL, 1, "see its log"),
        (grpc.StatusCode.INVALID_ARGUMENT, 1, "so it was told"),
        (grpc.StatusCode.NOT_FOUND, 1, "so it was told"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 3, "has not answered"),
    ],
)
def test_errors_of_the_daemon(rig: Rig, code: grpc.StatusCode, expected: int, words: str) -> None:
    rig.canned.fail = code
    for args in (("status",), ("watch",), ("hint", "done", "batch", "b")):
        ran = rig.run(*args)
        assert ran.code == expected
        assert words in ran.err
        assert len(ran.err.splitlines()) == 1


# --- version, completion, help ----------------------------------------------------------------------------------------


def test_version(rig: Rig, tmp_path: Path) -> None:
    assert rig.run("version").out == f"mfsctl {__version__}\nmfsd 9.8.7\n"
    assert rig.run("version", "--json").json == {"mfsctl": __version__, "mfsd": "9.8.7"}
    assert rig.run("version", "--client").out == f"mfsctl {__version__}\n"
    absent = run("--socket", str(tmp_path / "none"), "version")
    assert absent.code == 0
    assert "not running" in absent.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    ran = run("completion", shell)
    assert ran.code == 0
    assert "_MFSCTL_COMPLETE" in ran.out
    assert run("completion", "tcsh").code == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mfsctl st", {"status"}),
        ("mfsctl hint tr", {"transfer"}),
        ("mfsctl hint done ", {"transfer", "request", "batch"}),
    ],
)
def test_completions(words: str, expected: set[str]) -> None:
    env = {"_MFSCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-m", "mfsd.cli"], env=env, capture_output=True, text=True, check=True)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


@pytest.mark.parametrize("args", [("version",), ("--help",), ("status", "--help")])
def test_start_up_imports_nothing_heavy(args: tuple[str, ...]) -> None:
    """Time is not measured here: what costs it is."""
    heavy = ["numpy", "pydantic", "pyroute2", "structlog"] + ([] if args[0] == "status" else ["grpc", "rich", "google"])
    code = (
        "import sys\nfrom mfsd.cli.app import mfsctl\n"
        f"mfsctl({[*args]!r}, standalone_mode=False)\n"
        f"print('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_names_every_command() -> None:
    ran = run("--help")
    for name in app.COMMANDS:
        assert f"  {name} " in ran.out
        assert run(name, "--help").code == 0
    assert "Exit codes" in ran.out
    assert run("frobnicate").code == 2


def test_default_socket_is_the_daemons() -> None:
    assert str(DaemonConfig().socket) == app.DEFAULT_SOCKET
    assert str(DEFAULT_PATH) == app.DEFAULT_CONFIG


def test_help_stats_describes_every_number(rig: Rig) -> None:
    ran = rig.run("status", "--help-stats")
    assert not rig.canned.asked  # no daemon needed
    described: dict[Any, dict[str, str]] = {
        pb.Status: glossary.STATUS, pb.Counters: glossary.COUNTERS, pb.Device: glossary.DEVICE, pb.Band: glossary.BAND
    }  # fmt: skip
    containers = {"devices", "counters", "bands", "stats"}
    for message, texts in described.items():
        assert set(texts) == {f.name for f in message.DESCRIPTOR.fields} - containers
    stats = {n.removeprefix("STAT_").lower() for n in vars(_abi) if n.startswith("STAT_")} - {"max"}
    assert set(glossary.STATS) == stats
    for texts in [*described.values(), glossary.STATS]:
        assert all(f"  {name} " in ran.out for name in texts)
    assert max(map(len, ran.out.splitlines())) < 100
    assert rig.run("status", "--json", "--help-stats").json["counters.rescues"] == glossary.COUNTERS["rescues"]


def test_canned_status_is_complete() -> None:
    """The tables above are drawn from it."""
    assert status().devices[0].bands
