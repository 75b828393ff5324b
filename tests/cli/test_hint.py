# SPDX-License-Identifier: Apache-2.0
"""mfsctl hint with a real daemon: what is said, and what is refused in words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.samples import COOKIE, TO
from support.waiting import wait_for

from mfsd.v1 import hints_pb2

if TYPE_CHECKING:
    from support.ctl import Rig


def sent(rig: Rig, *args: str) -> hints_pb2.Hint:
    """The hint that mfsctl made of these words and a real daemon took."""
    ran = rig.run("hint", *args)
    assert (ran.code, ran.err) == (0, "")
    assert "accepted" in ran.out.splitlines()
    assert rig.last.session == "mfsctl"
    (hint,) = rig.last.hints
    assert isinstance(hint, hints_pb2.Hint)
    return hint


def test_hints(rig: Rig) -> None:
    request = sent(
        rig, "request", "r", "--ttft-left", "1min", "--batch", "b", "--compute-left", "20ms", "--ttl", "1min"
    )
    assert request.request == hints_pb2.Request(
        id="r", ttft_left_us=60_000_000, batch_id="b", compute_left_us=20_000, ttl_us=60_000_000
    )
    assert sent(rig, "request", "q", "--no-deadline").request == hints_pb2.Request(id="q", no_deadline=True)
    batch = sent(rig, "batch", "b", "--request", "r", "--request", "s", "--layers", "80", "--layer-compute", "1500us")
    assert batch.batch == hints_pb2.Batch(id="b", request_ids=["r", "s"], layers=80, layer_compute_us=1500)
    progress = sent(rig, "progress", "b", "7", "--compute-done")
    assert progress.progress == hints_pb2.LayerProgress(batch_id="b", current_layer=7, compute_done=True)
    what = ("--stage", "p2d", "--bytes", "1.5MiB", "--request", "r", "--layer", "3", "--deadline", "180ms")
    endpoints = ("--from", "10.0.0.1:5000", "--to", "10.0.0.2:6000-6010")
    transfer = sent(rig, "transfer", "t", *what, *endpoints).transfer
    assert transfer == hints_pb2.Transfer(
        id="t", request_id="r", stage=hints_pb2.STAGE_P2D, bytes=1_572_864, target_layer=3, deadline_us=180_000,
        selector=hints_pb2.Selector(
            tuple=hints_pb2.Tuple(
                src_addr="10.0.0.1", dst_addr="10.0.0.2", src_port=hints_pb2.PortRange(first=5000),
                dst_port=hints_pb2.PortRange(first=6000, last=6010), protocol=6,
            )
        ),
    )  # fmt: skip
    process = sent(
        rig, "mark", "--stage", "collective", "--pid", str(os.getpid()), "--to", "[fd00::/64]:29500"
    ).connection
    assert process.selector.process == hints_pb2.ProcessPeer(
        pid=os.getpid(), remote="fd00::/64", remote_port=hints_pb2.PortRange(first=29500)
    )
    unmark = sent(rig, "mark", "--stage", "none", "--cookie", str(COOKIE)).connection
    assert (unmark.selector.cookie, unmark.stage) == (COOKIE, hints_pb2.STAGE_UNSPECIFIED)
    udp = sent(rig, "mark", "--stage", "p2d", "--udp", "--from", "[fd00::2]:5", "--to", "[fd00::1]:6").connection
    assert udp.selector.tuple == hints_pb2.Tuple(
        src_addr="fd00::2", dst_addr="fd00::1", src_port=hints_pb2.PortRange(first=5),
        dst_port=hints_pb2.PortRange(first=6), protocol=17,
    )  # fmt: skip
    loose = sent(rig, "transfer", "w", "--stage", "background", "--bytes", "1GB", "--interleaved", "--cookie", "5")
    assert (loose.transfer.stage, loose.transfer.interleaved) == (hints_pb2.STAGE_BACKGROUND, True)
    assert sent(rig, "mark", "--stage", "background", "--interleaved", "--cookie", "5").connection.interleaved
    assert sent(rig, "cancel", "transfer", "w").cancellation.transfer_id == "w"
    assert sent(rig, "done", "batch", "b").completion == hints_pb2.Completion(batch_id="b")
    assert sent(rig, "cancel", "request", "r").cancellation == hints_pb2.Cancellation(request_id="r")
    assert rig.run("transfers").out == "no transfers\n"


def test_a_source_may_be_a_port_only(rig: Rig) -> None:
    hint = sent(rig, "mark", "--stage", "p2d", "--from", ":5", "--to", "fd00::1").connection.selector.tuple
    assert (hint.protocol, hint.dst_addr, hint.src_addr, hint.src_port.first) == (6, "fd00::1", "", 5)


def test_events_of_a_session_come_with_its_next_hint(rig: Rig) -> None:
    sent(rig, "request", "late", "--ttft-left=-1.5s")
    assert rig.last.hints[0].request.ttft_left_us == -1_500_000
    sent(rig, "transfer", "t9", "--request", "late", "--stage", "p2d", "--bytes", "1TB", "--from", "10.0.0.1:1", *TO)
    told = wait_for(
        lambda: [x for x in rig.run("hint", "request", "other", "--ttft-left", "1s").out.splitlines() if ":" in x]
    )
    assert told[0].startswith("t9: infeasible: 1000000000000 bytes left, ")


def test_a_session_of_its_own(rig: Rig) -> None:
    ran = rig.run("hint", "request", "r", "--ttft-left", "60s", "--session", "s")
    assert ran.code == 0, ran.err
    assert rig.last.session == "s"
    assert rig.run("hint", "cancel", "request", "r").code == 0  # of another session, and nothing to say about
    assert "sessions 2  requests 1" in rig.run("status").out


def test_a_process_is_marked_with_its_children_and_says_how_many_match(rig: Rig) -> None:
    child = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); input()"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        subprocess.Popen(
            [sys.executable, "-c", parent, child, str(listener.getsockname()[1])], stdin=subprocess.PIPE
        ) as process,
        listener.accept()[0],
    ):
        ran = rig.run("hint", "mark", "--stage", "p2d", "--pid", str(process.pid), "--to", "127.0.0.1")
        process.communicate(b"\n")
    assert (ran.code, ran.out.splitlines()) == (0, ["accepted", "1 connection matches now"])
    ran = rig.run("hint", "mark", "--stage", "p2d", "--pid", str(os.getpid()), "--to", "10.9.9.9")
    assert (ran.code, ran.out.splitlines()) == (0, ["accepted", "no connection matches now; those still to come will"])


P2D = ("hint", "transfer", "t", "--stage", "p2d", "--bytes", "5", "--request", "r", "--from", "10.0.0.1:5", *TO)


@pytest.mark.parametrize("words", [(), ("--ttft-left", "1s", "--no-deadline")])
def test_a_request_has_a_deadline_or_none(rig: Rig, words: tuple[str, ...]) -> None:
    ran = rig.run("hint", "request", "r", *words)
    assert (ran.code, "give --ttft-left, or --no-deadline, and not both" in ran.err) == (2, True)


def test_how_long_a_transfer_may_be_held_back(rig: Rig) -> None:
    assert rig.run("hint", "request", "r", "--ttft-left", "60s").code == 0
    beyond = rig.run(*P2D, "--max-defer", "301s")
    assert (beyond.code, beyond.err.split(": ")[2]) == (1, "transfer.max_defer_us")
    assert rig.run(*P2D, "--max-defer", "8s").code == 0
    assert rig.run(*P2D[:-1], "10.0.0.3:7", "--max-defer", "-8s").code == 2
    for option in ("--ttl", "--compute-left"):
        ran = rig.run("hint", "request", "r", "--ttft-left", "-1s", option, "-1s")
        assert (ran.code, "only deadlines can be in the past" in ran.err) == (2, True)


def test_rejected_hint(rig: Rig) -> None:
    wrong = ("hint", "transfer", "t", "--stage", "p2d", "--bytes", "0", "--request", "r", "--from", "10.0.0.1:5", *TO)
    ran = rig.run(*wrong)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "mfsctl: rejected: transfer.bytes: 0 bytes; 1 to 1099511627776 (limits.max_transfer_bytes) are allowed\n"
    )
    as_json = rig.run(*wrong, "--json")
    assert as_json.code == 1
    assert as_json.json["rejected"][0]["status"]["details"][0]["field_violations"][0]["field"] == "transfer.bytes"


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
        (("--to", "1.2.3:5"), "has no IP address; write e.g. 10.0.0.2:5000"),
    ],
)
def test_wrong_selectors(rig: Rig, selector: tuple[str, ...], words: str) -> None:
    ran = rig.run("hint", "mark", "--stage", "p2d", *selector)
    assert ran.code == 2
    assert words in ran.err.replace("\n", " ")
    assert not rig.tap.asked


@pytest.mark.parametrize(
    "args", [("request", "r", "--ttft-left", "5"), ("transfer", "t", "--stage", "p2d", "--bytes", "x", *TO)]
)
def test_wrong_values(rig: Rig, args: tuple[str, ...]) -> None:
    ran = rig.run("hint", *args)
    assert ran.code == 2
    assert "write" in ran.err
    assert not rig.tap.asked
