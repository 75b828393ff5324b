# SPDX-License-Identifier: Apache-2.0
"""mfsctl in the process of the test, in a pipe, and on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from click.testing import CliRunner

from mfsd.cli.app import mfsctl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.tap import Tap

ROOT: Final = Path(__file__).resolve().parents[2]
MFSCTL: Final = (sys.executable, "-m", "mfsd.cli")
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*args: str, env: dict[str, str] | None = None) -> Ran:
    """One call of mfsctl; a crash is re-raised."""
    result = CliRunner(env=env).invoke(mfsctl, args, catch_exceptions=False)
    return Ran(result.exit_code, result.stdout, result.stderr)


@dataclass
class Rig:
    """A real daemon behind a tap."""

    tap: Tap
    socket: Path

    @property
    def last(self) -> Any:
        """The last request."""
        return self.tap.asked[-1]

    def run(self, *args: str) -> Ran:
        return run("--socket", str(self.socket), *args)


def in_a_pipe(argv: Sequence[str], columns: int) -> str:
    """Run a program whose stdout is a pipe, while COLUMNS says something; it must succeed."""
    env = os.environ | {"COLUMNS": str(columns)}
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_a_terminal(argv: Sequence[str], columns: int) -> str:
    """Run a program on a terminal of its own; what is to be seen there, without colours. It must succeed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    shown = b""
    with subprocess.Popen(argv, env=env, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: the last user of the other end has gone
            while block := os.read(ours, 65536):
                shown += block
        os.close(ours)
    text = _ESCAPES.sub("", shown.decode()).replace("\r\n", "\n")
    assert process.returncode == 0, text
    return text
