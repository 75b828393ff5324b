# SPDX-License-Identifier: Apache-2.0
"""The daemon's endpoints: hints, control, health, reflection on a unix socket and, if wanted, on TCP.

Beside the unix socket, with the same permissions, there is the one that says who is who (identity.py). A socket whose
file somebody has deleted is made again (places.py).
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mfsd.api import pem
from mfsd.api.access import HINTS, Access
from mfsd.api.places import Places, ServerError, aside
from mfsd.ground.wire import beside
from mfsd.v1 import control_pb2, control_pb2_grpc, hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mfsd.api.identity import Identities

CONTROL: Final = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
STOP_S: Final = 0.5
"""For calls in progress when the daemon stops; streams are cut then, and clients reconnect by themselves."""

CALLS: Final = 128
"""At a time on a connection; clients let more than these wait by themselves."""

_KEEPALIVE: Final = (("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000))
"""A client on another machine that is gone without a word is noticed, and what it said with it."""

LOOK_S: Final = 5.0
"""How often sockets are looked for."""

_untyped_health: Any = health
"""The package has no stubs, and mypy's view of what it re-exports changes with the state of its cache."""

log = structlog.get_logger(__name__)


class Where(Protocol):
    """Where to serve; keys of the configuration's section [daemon]."""

    @property
    def socket(self) -> Path:
        """Unix socket."""
        ...

    @property
    def socket_group(self) -> str | None:
        """Group that may use it; None: the daemon's own."""
        ...

    @property
    def operator_group(self) -> str | None:
        """Group that may use what is for operators; None: nobody else."""
        ...

    @property
    def listen(self) -> str | None:
        """Second endpoint, "host:port"; None: none."""
        ...

    @property
    def tls_cert(self) -> Path | None:
        """Certificate of that endpoint, PEM; None: plain TCP."""
        ...

    @property
    def tls_key(self) -> Path | None:
        """Its private key."""
        ...

    @property
    def tls_client_ca(self) -> Path | None:
        """Who has signed the certificates of those who may come."""
        ...


class Server:
    """All services on one gRPC server, and on another one where the socket's file was lost meanwhile."""

    def __init__(
        self,
        hints: hints_pb2_grpc.HintsServicer,
        control: control_pb2_grpc.ControlServicer,
        identities: Identities,
        config: Where,
    ) -> None:
        self._config = config
        self._identities = identities
        self._hints, self._control = hints, control
        self.places = Places(config)
        self.others: dict[Path, Callable[[], object]] = {}
        """Sockets that somebody else serves, and how to make them again, in a thread. Raises ServerError."""
        self.problems: list[str] = []
        """Why sockets can't be reached, or by others than should."""
        self._health = _untyped_health.aio.HealthServicer()
        self._server = self._made()
        self._second: grpc.aio.Server | None = None
        """Serves whoever comes since the first one's socket is to be found no more, which keeps those that it has."""

    def _made(self) -> grpc.aio.Server:
        options = [("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", CALLS), *_KEEPALIVE]
        server = grpc.aio.server(interceptors=[Access(self._identities)], options=options)
        hints_pb2_grpc.add_HintsServicer_to_server(self._hints, server)
        control_pb2_grpc.add_ControlServicer_to_server(self._control, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((HINTS, CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    @property
    def bound(self) -> frozenset[str]:
        """What the kernel calls the socket of the services: by the name that it was made with."""
        return frozenset((str(self._config.socket), str(aside(self._config.socket))))

    async def start(self) -> None:
        """Open the endpoints and serve. Raises ServerError. The caller holds the daemon's lock."""
        path = self._config.socket
        # First, so that whoever finds the other one finds this.
        await self._identities.serve(self._listen(beside(path)))
        self.places.make(path, lambda where: self._server.add_insecure_port(f"unix:{where}"))
        if self._config.listen is not None:
            try:
                credentials = self._credentials()
            except pem.PemError as e:
                raise ServerError(str(e)) from e
            try:
                if credentials is None:
                    self._server.add_insecure_port(self._config.listen)
                else:
                    self._server.add_secure_port(self._config.listen, credentials)
            except (OSError, RuntimeError) as e:
                raise ServerError(f"daemon.listen = {self._config.listen!r}: can't be opened: {e}") from e
        await self._server.start()
        for name in ("", HINTS, CONTROL):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def keep(self) -> None:
        """See again and again to it that clients find the sockets, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.mend()

    async def mend(self) -> None:
        """Make those sockets again whose files somebody has deleted. What is in the place of one is a problem."""
        problems = []
        for path in self.places.lost():
            try:
                await self._again(path)
            except ServerError as e:
                problems.append(f"nobody can reach mfsd there any more: {e}")
            else:
                log.warning("somebody has deleted a socket; it is there again", path=str(path))
        problems += self.places.opened()
        if problems and problems != self.problems:
            log.warning("sockets", problems=problems)
        self.problems = problems

    async def _again(self, path: Path) -> None:
        if path in self.others:
            await asyncio.to_thread(self.others[path])
            return
        if path != self._config.socket:
            await self._identities.serve(self._listen(path))
            return
        server = self._made()
        self.places.make(path, lambda where: server.add_insecure_port(f"unix:{where}"))
        await server.start()
        if self._second is not None:
            await self._second.stop(0)
        self._second = server

    def _credentials(self) -> grpc.ServerCredentials | None:
        """Those of mutual TLS; None: plain TCP. Raises PemError."""
        c = self._config
        if c.tls_cert is None or c.tls_key is None or c.tls_client_ca is None:
            return None
        chain, private, roots = pem.trio(
            ("daemon.tls_cert", c.tls_cert), ("daemon.tls_key", c.tls_key), ("daemon.tls_client_ca", c.tls_client_ca)
        )
        return grpc.ssl_server_credentials([(private, chain)], roots, require_client_auth=True)

    def _listen(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.places.make(path, lambda where: listener.bind(str(where)))
        except BaseException:
            listener.close()
            raise
        listener.setblocking(False)
        return listener

    async def stop(self) -> None:
        """Say NOT_SERVING, let short calls finish, close the endpoints."""
        await self._health.enter_graceful_shutdown()
        with self.places.of_others_kept():
            await asyncio.gather(*(server.stop(STOP_S) for server in (self._server, self._second) if server))
        self._identities.close()
        self.places.clear()
