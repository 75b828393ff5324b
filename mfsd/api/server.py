# SPDX-License-Identifier: Apache-2.0
"""The daemon's endpoints: hints, control, health, reflection on a unix socket and, if wanted, on TCP.

Beside the unix socket, with the same permissions, there is the one that says who is who (identity.py).
"""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import stat
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mfsd.api import pem
from mfsd.api.access import HINTS, Access
from mfsd.api.identity import beside
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

_untyped_health: Any = health
"""The package has no stubs, and mypy's view of what it re-exports changes with the state of its cache."""


class ServerError(RuntimeError):
    """An endpoint can't be opened."""


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
    """One gRPC server with all services."""

    def __init__(
        self,
        hints: hints_pb2_grpc.HintsServicer,
        control: control_pb2_grpc.ControlServicer,
        identities: Identities,
        config: Where,
    ) -> None:
        self._config = config
        self._identities = identities
        self._bound: dict[Path, int] = {}
        """Sockets of ours and their inodes: somebody may put another one in the place of one."""
        options = [("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", CALLS), *_KEEPALIVE]
        self._server = grpc.aio.server(interceptors=[Access(identities)], options=options)
        hints_pb2_grpc.add_HintsServicer_to_server(hints, self._server)
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)
        self._health = _untyped_health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (HINTS, CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> None:
        """Open the endpoints and serve. Raises ServerError. The caller holds the daemon's lock."""
        path = self._config.socket
        # First, so that whoever finds the other one finds this.
        await self._identities.serve(self._listen(beside(path)))
        self._bind(path, lambda: self._server.add_insecure_port(f"unix:{path}"))
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
            self._bind(path, lambda: listener.bind(str(path)))
        except BaseException:
            listener.close()
            raise
        listener.setblocking(False)
        return listener

    def bind_for_operators(self, path: Path, bind: Callable[[], object]) -> None:
        """Make a unix socket with ``bind`` that operators may use. Raises ServerError."""
        self._bind(path, bind, "operator_group")

    def _bind(
        self, path: Path, bind: Callable[[], object], key: Literal["socket_group", "operator_group"] = "socket_group"
    ) -> None:
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _remove_stale(path)
            # Nobody else may connect before the group is set.
            before = os.umask(0o177)
            try:
                bind()
            finally:
                os.umask(before)
            self._bound[path] = path.lstat().st_ino
            group: str | None = getattr(self._config, key)
            self._set_group(path, key, group)
            path.chmod(0o660 if group is not None or key == "socket_group" else 0o600)
        except (OSError, RuntimeError) as e:
            raise ServerError(f'daemon.socket = "{path}": {e}') from e

    def _set_group(self, path: Path, key: str, name: str | None) -> None:
        """``key``: of the configuration, which has the name."""
        if name is None:
            return
        try:
            gid = grp.getgrnam(name).gr_gid
        except KeyError:
            raise ServerError(f'daemon.{key} = "{name}": there is no such group on this host') from None
        try:
            os.chown(path, -1, gid)
        except PermissionError as e:
            raise ServerError(
                f'daemon.{key} = "{name}": mfsd may not give its socket to this group; make its user a member '
                "(SupplementaryGroups= in the unit)"
            ) from e

    async def stop(self) -> None:
        """Say NOT_SERVING, let short calls finish, close the endpoints."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(STOP_S)
        self._identities.close()
        for path, inode in self._bound.items():
            with contextlib.suppress(OSError):
                if path.lstat().st_ino == inode:
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed. The caller's lock is on a directory, of which others have others.

    Raises FileExistsError where somebody listens, or there is no socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError("there is a file of this name that is no socket; remove it or choose another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # it listens, and has much to do
            pass
    raise FileExistsError("somebody listens there: another mfsd? Stop it, or choose another name")
