# SPDX-License-Identifier: Apache-2.0
"""A program on a terminal of tmux, which shows what is to be seen there and takes keys."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.ctl import ROOT
from support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Terminal:
    """One of a tmux server of its own."""

    socket: Path

    def tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self.socket), "-f", "/dev/null", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def lines(self) -> list[str]:
        """What is to be seen now."""
        return self.tmux("capture-pane", "-p").splitlines()

    def press(self, *keys: str) -> None:
        """By tmux's names (Enter, Down, Escape) or as text."""
        self.tmux("send-keys", *keys)

    def wait(self, *texts: str) -> list[str]:
        """Wait until all of these are to be seen; the lines then."""

        def seen() -> list[str]:
            lines = self.lines
            return lines if all(any(t in line for line in lines) for t in texts) else []

        try:
            found: list[str] = wait_for(seen, f"{texts} on the terminal")
        except AssertionError as e:
            raise AssertionError(f"{e}\n" + "\n".join(self.lines)) from None
        return found

    def width(self) -> int:
        """Of the longest line."""
        return max(map(len, self.lines))


@contextlib.contextmanager
def terminal(folder: Path, argv: Sequence[str], columns: int, rows: int) -> Iterator[Terminal]:
    """Run a program on a terminal of this size; after its end the words "exit N" stay to be seen."""
    it = Terminal(folder / "tmux")
    command = f"cd {shlex.quote(str(ROOT))} && {shlex.join(argv)}; echo exit $?; exec sleep 1000"
    env = os.environ | {"LC_ALL": "C.UTF-8"}
    subprocess.run(
        ["tmux", "-S", str(it.socket), "-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows),
         "sh", "-c", command],
        check=True, env=env,
    )  # fmt: skip
    try:
        yield it
    finally:
        it.tmux("kill-server")
