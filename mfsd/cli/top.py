# SPDX-License-Identifier: Apache-2.0
"""``mfsctl top``: levels, the busiest connections and deadlines at risk on one screen, with keys."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import sys
import termios
import textwrap
import threading
import time
import tty
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console, Group
from rich.live import Live

from mfsd.cli.app import Globals, command
from mfsd.cli.connect import control, paged
from mfsd.cli.errors import CliError
from mfsd.cli.heard import told_to_end
from mfsd.cli.top_view import Choice, Look, at_risk, chosen_rows, screen
from mfsd.cli.values import Interval
from mfsd.ground import tables
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.v1 import control_pb2_grpc

PATIENCE_S: Final = 3.0
"""For an answer; then the screen says that there is none."""
ROWS_MAX: Final = 5000
"""More nobody looks through, and the daemon has other things to do."""
ESCAPE_S: Final = 0.05
"""An Esc that nothing follows for so long is one; else it begins the code of a key."""
KEYS: Final = {"\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\x1b": "escape",
               "\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "erase", "\x08": "erase"}  # fmt: skip
"""What a terminal sends; what begins with another one's code comes before it."""


class _Looks:
    """Asks the daemon again and again in a thread; ``ready`` is readable when there is something new."""

    def __init__(self, socket: str, interval: float) -> None:
        self._socket, self._interval = socket, interval
        self.ready, self._wake = os.pipe()
        self.latest: Look | None = None
        self.before: Look | None = None
        self.problem = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with control(self._socket) as daemon:
                    while not self._over.is_set():
                        found = look(daemon)
                        self.before, self.latest, self.problem = self.latest, found, ""
                        self._tell()
                        self._over.wait(self._interval)
            except CliError as e:
                self.problem = e.format_message()
                self._tell()
                self._over.wait(self._interval)

    def _tell(self) -> None:
        os.write(self._wake, b".")

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        os.close(self.ready)
        os.close(self._wake)


def look(daemon: control_pb2_grpc.ControlStub) -> Look:
    """All that the screen needs."""
    status = daemon.GetStatus(pb.GetStatusRequest(), timeout=PATIENCE_S)
    connections = paged(daemon.ListConnections, pb.ListConnectionsRequest(), "connections", ROWS_MAX, PATIENCE_S)
    transfers = paged(daemon.ListTransfers, pb.ListTransfersRequest(), "transfers", ROWS_MAX, PATIENCE_S)
    return Look(time.monotonic(), status, connections, transfers)


@command("top")
@click.option("--interval", type=Interval(0.2), default="1s", show_default=True, help="Between looks, 200ms to 24h.")
def top(g: Globals, interval: float) -> None:
    """Bands, the busiest connections and deadlines at risk, live.

    Keys sort, filter and explain; h lists them. For programs: `mfsctl watch --json`.
    """
    if g.json:
        raise click.UsageError("top is for people; programs take `mfsctl watch --json --connections`")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; elsewhere take `mfsctl watch --connections`")
    with control(g.socket) as daemon:  # a daemon that is not there is an error, one that goes later is not
        daemon.GetStatus(pb.GetStatusRequest(), timeout=PATIENCE_S)
    gc.enable()
    looks = _Looks(g.socket, interval)
    try:
        _Screen(g.socket, looks).run()
    finally:
        looks.close()


class _Screen:
    def __init__(self, socket: str, looks: _Looks) -> None:
        self._socket, self._looks = socket, looks
        self._choice = Choice()
        self._shown: tuple[Look, Look | None] | None = None
        self._over = False

    def run(self) -> None:
        """Until q or Ctrl-C, or until it is told to end."""
        console = Console(highlight=False, emoji=False)
        stdin = sys.stdin.fileno()
        saved = termios.tcgetattr(stdin)
        try:
            tty.setcbreak(stdin)
            with (
                contextlib.suppress(KeyboardInterrupt),
                told_to_end(),
                Live(console=console, screen=True, auto_refresh=False) as live,
            ):
                while not self._over:
                    # A change of size comes as a signal, which ends no wait: so no wait is long.
                    ready, _, _ = select.select([stdin, self._looks.ready], [], [], 1.0)
                    if self._looks.ready in ready:
                        os.read(self._looks.ready, 4096)
                    if stdin in ready:
                        for key in _keys(stdin):
                            self._press(key)
                    self._draw(live)
        finally:
            with contextlib.suppress(termios.error):  # it may be gone
                termios.tcsetattr(stdin, termios.TCSADRAIN, saved)

    def _draw(self, live: Live) -> None:
        latest = self._looks.latest
        if latest is not None and (self._shown is None or not self._choice.held):
            self._shown = latest, self._looks.before
        if self._shown is None:
            return
        size = shutil.get_terminal_size()
        lines = screen(*self._shown, self._choice, self._looks.problem, max(size.columns, 40), max(size.lines, 10))
        live.update(Group(*lines), refresh=True)

    def _press(self, key: str) -> None:
        choice = self._choice
        if choice.typing:
            self._type(key)
        elif choice.page:
            choice.page = []
        elif key == "q":
            self._over = True
        elif key in ("enter", "e"):
            self._explain()
        elif key in ("up", "down"):
            self._move(1 if key == "down" else -1)
        else:
            choice.press(key)

    def _move(self, step: int) -> None:
        self._choice.cursor = min(max(self._choice.cursor + step, 0), max(len(self._names()) - 1, 0))

    def _type(self, key: str) -> None:
        choice = self._choice
        if key in ("enter", "escape"):
            choice.typing = False
            choice.filter = choice.filter if key == "enter" else ""
        elif key == "erase":
            choice.filter = choice.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            choice.filter += key

    def _names(self) -> list[pb.ExplainRequest]:
        """What can be chosen, as the daemon is asked why it is where it is."""
        if self._shown is None:
            return []
        look_, before = self._shown
        if self._choice.pane == "risk":
            return [pb.ExplainRequest(transfer_id=t.id) for t in at_risk(look_, self._choice)]
        return [pb.ExplainRequest(slot=r.connection.slot) for r in chosen_rows(look_, before, self._choice)]

    def _explain(self) -> None:
        names, width = self._names(), shutil.get_terminal_size().columns
        if self._choice.cursor >= len(names):
            return
        try:
            with control(self._socket) as daemon:
                answer = daemon.Explain(names[self._choice.cursor], timeout=PATIENCE_S)
        except CliError as e:
            self._choice.page = [e.format_message()]
            return
        self._choice.page = list(_explained(answer, width))


def _explained(answer: pb.Explanation, width: int) -> Iterator[str]:
    """Lines of an explanation."""

    def wrapped(text: str, first: str = "") -> list[str]:
        text = tables.printable(text)
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first))

    if answer.HasField("connection"):
        c = answer.connection
        yield from wrapped(f"{c.endpoints or f'cookie {c.cookie}'} (slot {c.slot}, session {c.session})")
    yield from wrapped(f"transfers: {', '.join(t.id for t in answer.transfers[:5])}") if answer.transfers else []
    yield ""
    for reason in answer.reasons:
        yield from wrapped(reason, "- ")
    yield ""
    for name, value in sorted(answer.figures.items()):
        yield f"{name:<24}{value:>12.6g}"


def _keys(stdin: int) -> Iterator[str]:
    """Keys that have been pressed, by name or as the character that they are."""
    data = os.read(stdin, 1024)
    if not data:
        raise CliError("the terminal is gone")
    if data.endswith(b"\x1b") and select.select([stdin], [], [], ESCAPE_S)[0]:
        data += os.read(stdin, 1024)
    text = data.decode(errors="replace")
    while text:
        code = next((code for code in KEYS if text.startswith(code)), text[0])
        text = text[len(code) :]
        yield KEYS.get(code, code)
