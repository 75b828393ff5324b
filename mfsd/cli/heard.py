# SPDX-License-Identifier: Apache-2.0
"""Commands that go on until they are told to end: so they are, too, when nobody is left who reads, or who answers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import click
import grpc

from mfsd.cli.connect import TIMEOUT_S
from mfsd.cli.errors import CliError, Exit, HangingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import NoReturn

LOOK_S: Final = 1.0
"""Between two looks whether the daemon still answers. One that is late, since mfsctl was stopped meanwhile, counts as
no more than that."""
NOBODY: Final = -1
CLOSED: Final = 1
"""Name of what stands in for a standard output that was closed when mfsctl began (mfsd/cli/__init__.py)."""


def answers(call: Any, target: str, *, every: float, shown: bool) -> Iterator[Any]:
    """What a streaming call brings: something at once, and then each ``every`` seconds.

    It ends with Exit when nobody can read any more what is printed (``shown``), and with HangingError when nothing has
    come for TIMEOUT_S longer than it should. Raises what the call raises, too.
    """
    if shown and getattr(sys.stdout, "name", None) == CLOSED:
        call.cancel()
        raise CliError("standard output is closed: nobody would see what comes")
    witness = _Witness(call, _stdout() if shown else NOBODY)
    try:
        for answer in call:
            witness.waits = False
            yield answer
            witness.heard(every)
    except grpc.RpcError:
        if witness.unread:
            raise click.exceptions.Exit(Exit.BAD_NEWS) from None
        if witness.unanswered:
            raise HangingError(f"mfsd at {target} has stopped to answer; see its log (journalctl -u mfsd)") from None
        raise
    finally:
        witness.close()


def _stdout() -> int:
    try:
        return sys.stdout.fileno()
    except (OSError, ValueError):  # it is none of the system's
        return NOBODY


class _Witness:
    """Cancels a call once nobody reads what is written to ``output``, or nothing has come for too long."""

    def __init__(self, call: Any, output: int) -> None:
        self.unread = self.unanswered = False
        self.waits = True
        """For the next answer."""
        self._call, self._output, self._patience, self._heard = call, output, TIMEOUT_S, 0
        self._end, self._over = os.pipe()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def heard(self, every: float) -> None:
        """Something has come, and is dealt with; the next one comes so soon."""
        self.waits, self._patience = True, every + TIMEOUT_S
        self._heard += 1

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        if self._output != NOBODY:
            poll.register(self._output, 0)  # errors and hang-ups are told unasked (poll(2))
        heard, waited = 0, 0.0
        while True:
            told = {fd for fd, _ in poll.poll(LOOK_S * 1000)}
            if self._end in told:
                return
            waited = waited + LOOK_S if self.waits and self._heard == heard else 0.0
            heard = self._heard
            self.unread = self._output in told
            self.unanswered = waited > self._patience
            if self.unread or self.unanswered:
                self._call.cancel()
                return

    def close(self) -> None:
        os.close(self._over)
        self._thread.join()
        os.close(self._end)


@contextlib.contextmanager
def told_to_end() -> Iterator[None]:
    """Signals that would end the process at once are as Ctrl-C: what it holds open is put in order. In words, which."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    if threading.current_thread() is not threading.main_thread():
        before.clear()  # a library's user takes signals its own way; no other thread may
    heeded = {number: was for number, was in before.items() if was is not signal.SIG_IGN}  # as nohup(1) wants it
    for number in heeded:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, was in heeded.items():
            signal.signal(number, was)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)
