# SPDX-License-Identifier: Apache-2.0
"""The endpoint that Prometheus reads: HTTP on a unix socket or on TCP, with threads of its own."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import make_wsgi_app

from mfsd.api import pem
from mfsd.api.places import ServerError
from mfsd.daemon.metrics_section import OFF, SUFFIX, UNIX
from mfsd.ground.units import host_port

if TYPE_CHECKING:
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from mfsd.api.places import Places
    from mfsd.daemon.metrics_section import MetricsConfig

PATIENCE_S: Final = 10.0
"""For a client to say what it wants, and to take the answer: from one byte to the next."""
IN_ALL_S: Final = 10.0
"""The same in all, while others have no room."""
SCRAPES: Final = 16
"""At a time; each takes a thread."""
IDLE_S: Final = 60.0
"""Between two looks whether to end; who closes it wakes it up."""

log = structlog.get_logger(__name__)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """One line per scrape is noise."""
        log.debug("scraped", request=format % args)

    def address_string(self) -> str:
        """Clients of a unix socket have none."""
        return self.client_address[0] if self.client_address else ""


class _Server(ThreadingMixIn, WSGIServer):
    """Each scrape in a thread; ``server_close`` waits for those at work."""

    context: ssl.SSLContext | None = None

    def __init__(self, address: Any, handler: type[WSGIRequestHandler]) -> None:
        self._open: dict[Any, float] = {}
        """And since when, monotonic."""
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hang up on those who are too many, and before that on who has said a byte now and then for too long."""
        if len(self._open) >= SCRAPES:
            since = time.monotonic() - IN_ALL_S
            for slow in [one for one, began in list(self._open.items()) if began < since]:
                self._open.pop(slow, None)
                _cut(slow, socket.SHUT_RDWR)
        if len(self._open) >= SCRAPES:
            self.shutdown_request(request)
            return
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """It is over."""
        self._open.pop(request, None)
        super().shutdown_request(request)

    def hurry(self) -> None:
        """Wait for nobody's question any more: who has asked still gets the answer."""
        for request in list(self._open):
            _cut(request, socket.SHUT_RD)

    def get_request(self) -> tuple[Any, Any]:
        """TLS begins in the thread, where a client that says nothing keeps nobody waiting."""
        request, address = super().get_request()
        request.settimeout(PATIENCE_S)
        if self.context is not None:
            request = self.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, address or ("", 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or fails to shake hands, is its own affair."""
        log.debug("scrape failed", client=str(client_address), request=str(request))


def _cut(request: Any, how: int) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(request, how)  # a TLS socket's own would unwrap it


class _UnixServer(_Server):
    address_family = socket.AF_UNIX
    allow_reuse_address = False

    def server_bind(self) -> None:
        """As HTTPServer, which takes the address for a pair."""
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()


class Exposition:
    """Serves a registry where the configuration says."""

    def __init__(self, config: MetricsConfig, api: Path, registry: CollectorRegistry) -> None:
        """``api``: daemon.socket, beside which ours lies."""
        self._config = config
        self.path = api.with_name(f"{api.name}{SUFFIX}")
        """Of the unix socket."""
        self._registry = registry
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, places: Places) -> None:
        """Open it. Raises ServerError."""
        listen = self._config.listen
        if listen == OFF:
            return
        if listen == UNIX:
            places.make(self.path, lambda where: self._open(_UnixServer, str(where)), "operator_group")
        else:
            try:
                self._open(_Server if ":" not in host_port(listen)[0] else _Server6, host_port(listen))
            except (OSError, ssl.SSLError) as e:
                raise ServerError(f'metrics.listen = "{listen}": can\'t be opened: {e}') from e
        server = self._server
        assert server is not None  # noqa: S101 - opened just now
        server.set_app(make_wsgi_app(self._registry))
        thread = threading.Thread(target=server.serve_forever, args=(IDLE_S,), name="mfsd-metrics", daemon=True)
        thread.start()
        self._thread = thread

    def _open(self, kind: type[_Server], address: Any) -> None:
        context = self._tls()
        server = kind(address, _Handler)
        server.context = context
        self._server = server

    def _tls(self) -> ssl.SSLContext | None:
        c = self._config
        if c.tls_cert is None or c.tls_key is None:
            return None
        cert, key = ("metrics.tls_cert", c.tls_cert), ("metrics.tls_key", c.tls_key)
        try:
            pem.trio(cert, key, None if c.tls_client_ca is None else ("metrics.tls_client_ca", c.tls_client_ca))
        except pem.PemError as e:
            raise ServerError(str(e)) from e
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(c.tls_cert, c.tls_key, password="")
        if c.tls_client_ca is not None:
            context.load_verify_locations(c.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    @property
    def port(self) -> int:
        """Of TCP; 0: none."""
        return 0 if self._server is None else self._server.server_port

    def close(self) -> None:
        """Wait for scrapes at work, and end. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._thread is not None:  # else it would be waited for without end
            with contextlib.suppress(OSError):
                server.socket.shutdown(socket.SHUT_RDWR)  # to listen no more wakes it up
            server.shutdown()
        server.hurry()
        server.server_close()

    def again(self, places: Places) -> None:
        """Open it once more. Raises ServerError."""
        self.close()
        self.start(places)


class _Server6(_Server):
    address_family = socket.AF_INET6
