# SPDX-License-Identifier: Apache-2.0
"""Programs of the lab in processes of their own: new interpreters, since gRPC does not survive a fork.

The two talk over a pipe of multiprocessing.connection; its own Process would leave a helper process behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.lab.hosts.enter import die_with_parent
from mfsd.lab.hosts.governor import environment, python
from mfsd.lab.hosts.net import LabError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

END_S: Final = 5.0


class Child:
    """A module that runs as a program and begins with ``parent``. A context manager: leaving ends it."""

    def __init__(self, module: str, name: str, fds: Sequence[int] = (), env: Mapping[str, str] | None = None) -> None:
        """``name`` is for complaints; ``fds`` are open in it, too; ``env`` is added to our environment."""
        self.name = name
        self._pipe, theirs = Pipe()
        with theirs:
            command = [*python(module), str(os.getpid()), str(theirs.fileno())]
            fds = [theirs.fileno(), *fds]
            self._process = subprocess.Popen(command, pass_fds=fds, env={**environment(), **(env or {})})

    def say(self, message: Any) -> None:
        """Say something. Raises LabError when it has ended."""
        try:
            self._pipe.send(message)
        except OSError as e:
            raise LabError(f"the process of {self.name} has ended early ({e})") from e

    def heard(self) -> bool:
        """There is something to hear."""
        return self._pipe.poll()

    def hear(self, timeout: float) -> Any:
        """Wait for what it says next. Raises LabError when it has ended or says nothing."""
        try:
            if self._pipe.poll(timeout):
                return self._pipe.recv()
        except (OSError, EOFError) as e:
            raise LabError(f"the process of {self.name} has ended early; its complaint is above") from e
        raise LabError(f"the process of {self.name} does not answer within {timeout:g} s")

    def close(self) -> None:
        """Let it end, and kill it if it does not."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def parent() -> Connection:
    """The other end, in the child; the child dies with its parent, and leaves it to it what ^C means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pid, fd = (int(arg) for arg in sys.argv[1:3])
    die_with_parent(pid)
    return Connection(fd)
