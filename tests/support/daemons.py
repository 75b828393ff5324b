# SPDX-License-Identifier: Apache-2.0
"""A whole daemon without devices (its table is plain memory), in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mfsd.daemon.config import parse
from mfsd.daemon.daemon import Daemon
from mfsd.ground.model import CookieSelector, Stage
from mfsd.v1 import control_pb2_grpc, hints_pb2, hints_pb2_grpc
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import grpc

    from mfsd.engine.engine import Engine

T = TypeVar("T")


class Running:
    """One daemon in its thread."""

    def __init__(self, directory: Path, **sections: Any) -> None:
        self.socket = directory / "mfsd.sock"
        daemon = {"socket": str(self.socket), "state_dir": str(directory)} | sections.pop("daemon", {})
        self.config = parse({"daemon": daemon} | sections)
        self.target = f"unix:{self.socket}"
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(WAIT_S)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        async def main() -> None:
            self.daemon = Daemon(self.config, None)
            self.loop = asyncio.get_running_loop()
            run = asyncio.create_task(self.daemon.run())
            ready = asyncio.create_task(self.daemon.ready.wait())
            await asyncio.wait([run, ready], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if not run.done():  # else it has failed
                self._started.set()
            await run

        try:
            asyncio.run(main())
        except BaseException as e:  # noqa: BLE001 - handed to the test
            self._failure = e
            self._started.set()

    def ask(self, question: Callable[[Engine], T]) -> T:
        """Evaluate something on the engine, in its own thread."""

        async def answer() -> T:
            return question(self.daemon.engine)

        return asyncio.run_coroutine_threadsafe(answer(), self.loop).result(WAIT_S)

    def marks(self) -> dict[int, Stage]:
        """Stage of each connection that is marked by its cookie."""

        def read(engine: Engine) -> dict[int, Stage]:
            found = [m for s in engine.books.sessions.values() for m in s.marks.values()]
            return {m.selector.cookie: m.stage for m in found if isinstance(m.selector, CookieSelector)}

        return self.ask(read)

    def stop(self) -> None:
        """Idempotent."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.daemon.stop)
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()


@dataclass
class Api:
    """Blocking stubs of one daemon."""

    channel: grpc.Channel
    hints: hints_pb2_grpc.HintsStub = field(init=False)
    control: control_pb2_grpc.ControlStub = field(init=False)
    session: str = "test"

    def __post_init__(self) -> None:
        self.hints = hints_pb2_grpc.HintsStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)

    def send(self, *hints: hints_pb2.Hint, **fields: Any) -> hints_pb2.HintReply:
        """One unary batch."""
        return self.hints.Send(self.batch(*hints, **fields), timeout=WAIT_S)

    def batch(self, *hints: hints_pb2.Hint, **fields: Any) -> hints_pb2.HintBatch:
        """A batch of the test's session."""
        values: dict[str, Any] = {"session": self.session, "seq": 1, "hints": hints} | fields
        return hints_pb2.HintBatch(**values)


def violation(status: Any) -> tuple[int, str, str]:
    """(code, field, description) of a google.rpc.Status with one field violation."""
    details = error_details_pb2.BadRequest()
    assert len(status.details) == 1
    assert status.details[0].Unpack(details)
    (only,) = details.field_violations
    assert status.message == f"{only.field}: {only.description}"
    return status.code, only.field, only.description


def call_violation(error: Any) -> tuple[int, str, str]:
    """The same for a call that failed."""
    status = rpc_status.from_call(error)
    assert status is not None
    return violation(status)


@contextlib.contextmanager
def connected(port: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection over the loopback: (client, server)."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            yield client, server


def carry(near: socket.socket, far: socket.socket, size: int) -> None:
    """So many bytes, at most what the socket takes without a reader, from one end to the other, which reads them."""
    near.sendall(bytes(size))
    while size:
        size -= len(far.recv(size))


def disconnect(sock: socket.socket) -> None:
    """connect(2) with AF_UNSPEC, which Python's has not: what is connected next is the same socket, by its cookie."""
    assert ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16) == 0
