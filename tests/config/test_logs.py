# SPDX-License-Identifier: Apache-2.0
"""What is logged about a failure: a traceback as Python prints it, in whole lines, without anybody's variables."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest
import structlog

from mfsd.ground import logs

if TYPE_CHECKING:
    from pathlib import Path

FAILS: Final = """
import sys
import structlog
from mfsd.ground import logs
logs.configure(sys.argv[1], "info")
def fall(private="SECRET" + "-OF-A-SESSION"):
    raise ValueError("long-word-" * 20 + "end")
try:
    fall()
except ValueError:
    structlog.get_logger("x").exception("failed", device="eth0-" * 20)
"""


@pytest.mark.parametrize("style", ["console", "json"])
def test_a_failure(style: str) -> None:
    done = subprocess.run([sys.executable, "-c", FAILS, style], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "SECRET-OF-A-SESSION" not in done.stderr
    first, *lines = done.stderr.splitlines()
    if style == "json":
        event = json.loads(first)
        assert (event["event"], event["level"], event["device"], lines) == ("failed", "error", "eth0-" * 20, [])
        lines = event["exception"].splitlines()
    assert "eth0-" * 20 in first
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == f"ValueError: {'long-word-' * 20}end"


FLOODS: Final = """
import sys
import structlog
from mfsd.ground import logs
logs.configure("json", "info")
log = structlog.get_logger("x")
for i in range(100):
    log.warning("device access failed", i=i)
log.warning("something else")
"""


def test_a_flood_is_cut_and_nothing_else_is() -> None:
    done = subprocess.run([sys.executable, "-c", FLOODS], capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [e["event"] for e in events] == ["device access failed"] * 20 + ["something else"]


def test_what_was_left_out_is_said_when_the_flood_is_over() -> None:
    now = 0.0
    flood = logs.Flood(lambda: now)
    passed = 0
    for _ in range(30):
        with contextlib.suppress(structlog.DropEvent):
            flood(None, "", {"event": "x"})
            passed += 1
    now = logs.FLOOD_S
    assert flood(None, "", {"event": "x"}) == {"event": "x", "left_out": 10}
    assert flood(None, "", {"event": "x"}) == {"event": "x"}
    assert passed == logs.FLOOD


JOURNALLED: Final = """
import os, sys
import structlog
from mfsd.ground import logs
stat = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
logs.JOURNAL = sys.argv[2]
logs.configure(sys.argv[1], "info")
log = structlog.get_logger("x")
log.warning("device", device="eth0", notice="a\\nb")
"""


def test_the_journal_gets_fields_and_a_priority(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(path))
        journal.settimeout(10)
        done = subprocess.run(
            [sys.executable, "-c", JOURNALLED, "console", str(path)], capture_output=True, text=True, check=True
        )
        datagram = journal.recv(65536)
    assert done.stderr == ""
    assert b"PRIORITY=4\n" in datagram
    assert b"MFSD_DEVICE=eth0\n" in datagram
    assert b"MFSD_NOTICE\n\x03\0\0\0\0\0\0\0a\nb\n" in datagram
    assert b"MESSAGE=device" in datagram
    assert b"\x1b" not in datagram


@pytest.mark.parametrize(("style", "path"), [("json", "/none"), ("console", "/none")])
def test_on_stderr_the_journal_gets_at_least_the_priority(style: str, path: str) -> None:
    done = subprocess.run([sys.executable, "-c", JOURNALLED, style, path], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("<4>{" if style == "json" else "<3>")
    assert "eth0" in line
