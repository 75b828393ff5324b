# SPDX-License-Identifier: Apache-2.0
"""A client whose stream breaks in the middle while its daemon lives on: what it has said counts once."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Self

import pytest
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.daemons import Running


class Between:
    """A way to a daemon, by another path, that can be blocked in either direction, and cut."""

    def __init__(self, daemon: Running, path: Path) -> None:
        self.target = path
        self.open = {"there": threading.Event(), "back": threading.Event()}
        self._to, self._ends = str(daemon.socket), list[socket.socket]()
        path.with_name(f"{path.name}.id").symlink_to(f"{daemon.socket}.id")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._to)
                self._ends += [near, far]
                for way, source, sink in (("there", near, far), ("back", far, near)):
                    self.open[way].set()
                    self._threads.append(threading.Thread(target=self._pass_on, args=(way, source, sink)))
                    self._threads[-1].start()

    def _pass_on(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                self.open[way].wait()
                sink.sendall(part)

    def cut(self) -> None:
        """What is blocked is lost."""
        ends, self._ends = self._ends, []
        for end in ends:
            end.shutdown(socket.SHUT_RDWR)
            end.close()
        for way in self.open.values():
            way.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def between(running: Running, tmp_path: Path) -> Iterator[Between]:
    with Between(running, tmp_path / "between.sock") as b:
        yield b


@pytest.mark.parametrize("blocked", ["there", "back"])
def test_what_was_heard_but_not_answered_counts_once(running: Running, between: Between, blocked: str) -> None:
    def met() -> int:
        return running.ask(lambda e: e.books.counters.deadlines_met)

    with Client(target=between.target) as client:
        assert client.flush(WAIT_S)
        for i in range(3):
            between.open[blocked].clear()
            client.request(f"q{i}", ttft_left_s=60.0)
            client.done(request=f"q{i}")
            if blocked == "back":
                wait_for(lambda i=i: met() == i + 1, "it to be heard")  # type: ignore[misc]
            assert not client.flush(0.1)
            between.cut()
            assert client.flush(WAIT_S)
            assert met() == i + 1
