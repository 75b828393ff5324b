# SPDX-License-Identifier: Apache-2.0
"""No daemon, a dead one, one that refuses: a word with a fix, and an exit code."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, NoReturn

import grpc
import pytest
from support.ctl import Rig, run
from support.daemons import Running
from support.tap import Scripted, served

EVERY_QUESTION: Final = [
    ("status",),
    ("connections",),
    ("transfers",),
    ("watch", "--count", "1", "--connections"),
    ("explain", "t"),
    ("observe",),
    ("enforce",),
    ("pause",),
    ("resume",),
    ("hint", "done", "transfer", "t"),
]
"""All commands that can't do without a daemon."""


@pytest.mark.parametrize("args", EVERY_QUESTION, ids=lambda a: a[0])
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


@pytest.mark.root
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
    assert ("daemon.socket_group" if closed == "socket" else "its folder is closed") in done.stdout
    assert "root may" in done.stdout


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
def test_errors_of_the_daemon(tmp_path: Path, code: grpc.StatusCode, expected: int, words: str) -> None:
    def fail(_request: object, context: grpc.ServicerContext) -> NoReturn:
        context.abort(code, "so it was told")

    with served(tmp_path / "s", Scripted(GetStatus=fail, Watch=fail, Send=fail)):
        for args in (("status",), ("watch",), ("hint", "done", "batch", "b")):
            ran = run("--socket", str(tmp_path / "s"), *args)
            assert ran.code == expected
            assert words in ran.err
            assert len(ran.err.splitlines()) == 1


def test_who_is_given_no_token_is_told_why(tmp_path: Path) -> None:
    running = Running(tmp_path, limits={"max_sessions_per_user": 5})
    with contextlib.ExitStack() as held:
        said = b""
        while not said.startswith(b"!"):
            one = held.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(f"{running.socket}.id")
            said = one.recv(100)
        ran = run("--socket", str(running.socket), "status")
    assert ran.code == 4
    assert ran.err == f"mfsctl: mfsd refuses this process: {said.decode().strip()[1:]}\n"
    assert run("--socket", str(running.socket), "explain", "t").code == 1
    running.stop()


def test_an_answer_that_cannot_be_written(rig: Rig) -> None:
    command = [sys.executable, "-m", "mfsd.cli", "--socket", str(rig.socket), "status"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"mfsctl: [Errno 28] No space left on device\n")
    mine, its = os.pipe()
    os.close(mine)
    with os.fdopen(its, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    # By a shell: gRPC, which runs in this process, may abort in a child between fork and exec.
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(closed, check=False).returncode == 0


@pytest.mark.parametrize(
    "args", [(b"explain", b"\xff"), (b"hint", b"done", b"transfer", b"a\xc3")], ids=["explain", "hint"]
)
def test_words_that_are_no_text(rig: Rig, args: tuple[bytes, ...]) -> None:
    command = [sys.executable, "-m", "mfsd.cli", "--socket", str(rig.socket)]
    done = subprocess.run([*map(os.fsencode, command), *args], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.endswith(b"is not UTF-8\n")
    assert done.stderr.count(b"\n") == 1


def test_a_command_that_is_not_one_but_near() -> None:
    assert run("statu").err.endswith("Error: No such command 'statu'. Did you mean 'status'?\n")
    assert run("xyzzy").err.endswith("Error: No such command 'xyzzy'.\n")
