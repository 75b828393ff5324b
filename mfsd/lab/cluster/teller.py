# SPDX-License-Identifier: Apache-2.0
"""The clients of all hosts, in a process of their own.

A serving process hints from a processor of its own; the emulator has one thread for all GPUs of the cluster. With the
clients' threads beside it, it spent 0.5 to 1.9 ms more per step of a forward pass than without hints, and the emulated
GPUs were late by as much. What is said during one turn of the event loop crosses to the other process at once.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from mfsd.client import Client
from mfsd.lab.hosts.enter import die_with_parent
from mfsd.lab.hosts.net import LabError
from mfsd.lab.results import added_up

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Call = tuple[str, str, tuple[Any, ...], dict[str, Any]]
"""Host, method of its client, arguments."""
ANSWER_S: Final = 30.0
END_S: Final = 5.0


class Voice(Protocol):
    """Whoever takes hints for hosts."""

    @property
    def hosts(self) -> Collection[str]:
        """Those that have a daemon."""
        ...

    def say(self, host: str, method: str, *args: Any, **kwargs: Any) -> None:
        """Have the client of ``host`` call a method; nothing comes back."""
        ...


class Teller:
    """A Voice that speaks to real daemons. A context manager, to be used inside a running event loop."""

    def __init__(self, targets: Mapping[str, str]) -> None:
        """``targets``: address of the daemon by host; without any no process is started."""
        self.hosts = frozenset(targets)
        self._targets = dict(targets)
        self._said: list[Call] = []
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        if not self._targets:
            return self
        # A new interpreter, since gRPC does not survive a fork; multiprocessing's would leave a helper process behind.
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: S603 - ourselves
        self._pipe.send(self._targets)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._targets:
            return
        self._pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def say(self, host: str, method: str, *args: Any, **kwargs: Any) -> None:
        """See Voice. Raises LabError when the other process has died."""
        if not self._said:
            self._loop.call_soon(self._cross)
        self._said.append((host, method, args, kwargs))

    def settle(self, timeout: float = 5.0) -> bool:
        """Wait until the daemons have heard everything."""
        return bool(self._ask("settle", timeout)) if self._targets else True

    def stats(self) -> dict[str, int]:
        """client.Stats, added up."""
        return dict(self._ask("stats")) if self._targets else {}

    def _ask(self, what: str, *args: Any) -> Any:
        self._cross()
        try:
            self._pipe.send_bytes(pickle.dumps([("", what, args, {})]))
            if not self._pipe.poll(ANSWER_S):
                raise LabError(f"the hinting process does not answer ({what})")
            return self._pipe.recv()
        except (OSError, EOFError) as e:
            raise LabError(f"the hinting process is gone: {e}") from e

    def _cross(self) -> None:
        said, self._said = self._said, []
        if not said:
            return
        try:
            self._pipe.send_bytes(pickle.dumps(said))
        except OSError as e:
            raise LabError(f"the hinting process is gone: {e}") from e


def main() -> None:
    """Do what comes over the pipe until it is closed: FILE_DESCRIPTOR PARENT_PID."""
    fd, parent = (int(arg) for arg in sys.argv[1:])
    die_with_parent(parent)
    pipe = Connection(fd)
    targets: dict[str, str] = pipe.recv()
    clients = {name: Client(f"worker-{name}", target) for name, target in targets.items()}
    try:
        while True:
            for host, method, args, kwargs in pickle.loads(pipe.recv_bytes()):  # noqa: S301 - from our own parent
                if host:
                    getattr(clients[host], method)(*args, **kwargs)
                elif method == "settle":
                    answers = [client.flush(*args) for client in clients.values()]
                    pipe.send(all(answers))
                else:
                    pipe.send(added_up(asdict(client.stats) for client in clients.values()))
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        for client in clients.values():
            client.close()


if __name__ == "__main__":
    main()
