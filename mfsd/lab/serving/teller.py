# SPDX-License-Identifier: Apache-2.0
"""Clients of mfsd for several hosts: in this process, or in one of their own.

A serving process hints from a processor of its own; where one process plays the GPUs of a whole cluster, its thread has
all of them to serve. With the clients' threads beside it, it spent 0.5 to 1.9 ms more per step of a forward pass than
without hints, and the emulated GPUs were late by as much. So there a Teller hands what is said during one turn of the
event loop to another process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.client import Client
from mfsd.lab.hosts.child import Child, parent
from mfsd.lab.hosts.governor import added_up

if TYPE_CHECKING:
    from collections.abc import Mapping

Call = tuple[str, str, tuple[Any, ...], dict[str, Any]]
"""Host ("": all together), method, arguments."""
ANSWER_S: Final = 30.0


class Clients:
    """A Voice with the clients in this process. A context manager. ``name`` tells it from others of the same hosts."""

    def __init__(self, name: str, targets: Mapping[str, str]) -> None:
        self._clients = {host: Client(f"{name}-{host}", target) for host, target in targets.items()}
        self.hosts = frozenset(targets)

    def say(self, host: str, method: str, *args: Any, **kwargs: Any) -> None:
        """See Voice."""
        getattr(self._clients[host], method)(*args, **kwargs)

    def settle(self, timeout: float = 5.0) -> bool:
        """Wait until the daemons have heard everything."""
        return not sum(not client.flush(timeout) for client in self._clients.values())

    def stats(self) -> dict[str, int]:
        """client.Stats, added up."""
        return added_up(asdict(client.stats) for client in self._clients.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for client in self._clients.values():
            client.close()


class Teller:
    """The same with the clients in a process of their own. To be used inside a running event loop."""

    def __init__(self, targets: Mapping[str, str]) -> None:
        """``targets``: address of the daemon by host; without any no process is started. Raises LabError."""
        self.hosts = frozenset(targets)
        self._said: list[Call] = []
        self._loop = asyncio.get_running_loop()
        self._child = Child(__name__, "the hints") if targets else None
        if self._child is not None:
            self._child.say(dict(targets))

    def say(self, host: str, method: str, *args: Any, **kwargs: Any) -> None:
        """See Voice. What fails does so in the event loop."""
        if not self._said:
            self._loop.call_soon(self._cross)
        self._said.append((host, method, args, kwargs))

    def settle(self, timeout: float = 5.0) -> bool:
        """See Clients. Raises LabError."""
        return bool(self._ask("settle", timeout, default=True))

    def stats(self) -> dict[str, int]:
        """See Clients. Raises LabError."""
        return dict(self._ask("stats", default={}))

    def _ask(self, what: str, *args: Any, default: Any) -> Any:
        if self._child is None:
            return default
        self._said.append(("", what, args, {}))
        self._cross()
        return self._child.hear(ANSWER_S)

    def _cross(self) -> None:
        said, self._said = self._said, []
        if self._child is not None and said:
            self._child.say(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._child is not None:
            self._child.close()


def main() -> None:
    """Do what comes over the pipe until it is closed."""
    pipe = parent()
    with Clients("teller", pipe.recv()) as clients, contextlib.suppress(EOFError):
        while True:
            for host, method, args, kwargs in pipe.recv():
                if host:
                    clients.say(host, method, *args, **kwargs)
                else:
                    pipe.send(getattr(clients, method)(*args))


if __name__ == "__main__":
    main()
