# SPDX-License-Identifier: Apache-2.0
"""Commands that go on and on, when whoever reads, their terminal, or the daemon is gone: they end, and say how."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios
from typing import TYPE_CHECKING, Any

import pytest
from support.ctl import MFSCTL, ROOT, Rig, run
from support.tap import Scripted, served
from support.waiting import WAIT_S, wait_for

from mfsd.cli import heard
from mfsd.ground import recording
from mfsd.v1 import control_pb2

if TYPE_CHECKING:
    from pathlib import Path

    import grpc
    from google.protobuf.message import Message

SELDOM = ("watch", "--interval", "24h")


def started(rig: Rig, *args: str, words: str = '"$@"', **how: Any) -> subprocess.Popen[bytes]:
    """A command that goes on, and complains into a pipe; as a shell understands ``words``."""
    argv = ["sh", "-c", f"exec {words}", "sh", *MFSCTL, "--socket", str(rig.socket), *args]
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, **how)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Its exit code and complaints; it must end by itself."""
    with process:
        try:
            _, err = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    return process.returncode, err


@pytest.mark.parametrize("args", [SELDOM, (*SELDOM, "--json")], ids=["tables", "json"])
def test_watching_ends_with_its_reader(rig: Rig, args: tuple[str, ...]) -> None:
    """As in `mfsctl watch | head -1`; nothing more is written that would tell it."""
    process = started(rig, *args, stdout=subprocess.PIPE)
    out = process.stdout
    assert out is not None
    assert out.readline()
    assert process.poll() is None
    out.close()
    process.stdout = None
    assert ended(process) == (1, b"")


def test_nobody_watches_when_standard_output_is_closed(rig: Rig) -> None:
    code, err = ended(started(rig, "watch", words='"$@" >&-'))
    assert (code, err) == (1, b"mfsctl: standard output is closed: nobody would see what comes\n")


@pytest.mark.parametrize("args", [SELDOM, ("top", "--interval", "24h")], ids=["watch", "top"])
def test_a_terminal_that_is_gone_ends_it(rig: Rig, args: tuple[str, ...]) -> None:
    """Also where no signal says so."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm"}
    process = started(rig, *args, stdin=theirs, stdout=theirs, env=env, start_new_session=True)
    os.close(theirs)
    assert os.read(ours, 1)
    os.close(ours)
    code, err = ended(process)
    assert code == 1
    assert b"Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_terminal_is_put_back_whoever_ends_it(rig: Rig, number: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    env = os.environ | {"TERM": "xterm"}
    process = started(rig, "top", stdin=theirs, stdout=theirs, env=env, start_new_session=True)
    shown = b""
    while b"connections" not in shown:
        shown += os.read(ours, 65536)
    assert termios.tcgetattr(theirs) != before
    process.send_signal(number)
    assert ended(process) == (0, b"")
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    os.close(ours)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_record_is_whole_whoever_ends_it(rig: Rig, tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "record"
    process = started(rig, "record", str(file), stdout=subprocess.PIPE)
    wait_for(lambda: file.exists() and file.stat().st_size > 50, "something in the record")
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (0, b"")
    assert f"({'Ctrl-C' if number is signal.SIGINT else number.name})" in out.decode()
    assert not recording.read(file).cut


def test_nohup_keeps_it_recording(rig: Rig, tmp_path: Path) -> None:
    file = tmp_path / "record"
    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731 - a few words
    process = started(rig, "record", str(file), "--for", "2s", stdout=subprocess.PIPE, preexec_fn=ignoring)
    wait_for(lambda: file.exists() and file.stat().st_size > 50, "something in the record")
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out.decode().rstrip().endswith("(2 s are over)")) == (0, True), out


@pytest.mark.parametrize("command", ["watch", "record"])
def test_a_daemon_that_has_stopped_to_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(heard, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(heard, "LOOK_S", 0.1)

    def never(_request: object, context: grpc.ServicerContext) -> Message:
        wait_for(lambda: not context.is_active(), "its client to give up")
        return control_pb2.WatchReply()

    with served(tmp_path / "s", Scripted(Watch=never, Record=never)):
        ran = run("--socket", str(tmp_path / "s"), command, *([str(tmp_path / "r")] if command == "record" else []))
    assert ran.code == 3
    assert "has stopped to answer" in ran.err
    assert not (tmp_path / "r").exists()
