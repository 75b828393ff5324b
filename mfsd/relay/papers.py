# SPDX-License-Identifier: Apache-2.0
"""This host's certificate, as it is in its files: what is renewed there is shown in handshakes from then on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc
import structlog

from mfsd.api import pem
from mfsd.ground.logs import Seldom

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)


class Papers:
    """Certificate, key and CA. Thread-safe."""

    def __init__(self, cert: tuple[str, Path], key: tuple[str, Path], ca: tuple[str, Path]) -> None:
        """Each as (configuration key, file). Raises PemError."""
        self._files = cert, key, ca
        self._lock = threading.Lock()
        self._seldom = Seldom()
        self._stamps = [_stamp(path) for _, path in self._files]
        """When they were read last."""
        self._read: tuple[bytes, bytes, bytes] | None = None
        self._take(pem.trio(*self._files))
        self._served = self._server
        """What the server has been told last."""

    def _take(self, read: tuple[bytes, bytes, bytes]) -> None:
        if read != self._read:
            self._read = chain, private, roots = read
            self._channel = grpc.ssl_channel_credentials(roots, private, chain)
            self._server = grpc.ssl_server_certificate_configuration([(private, chain)], roots)

    def _renew(self) -> None:
        """Read the files if need be. What is no certificate with its key is none yet. The lock is held."""
        stamps = [_stamp(path) for _, path in self._files]
        if stamps == self._stamps:  # as a rule; whoever connects makes us look
            return
        try:
            self._take(pem.trio(*self._files))
        except pem.PemError as e:
            if self._seldom(str(e)):
                log.warning("relay: the certificate of before stays in use", problem=str(e))
        else:
            self._stamps = stamps

    def for_channels(self) -> grpc.ChannelCredentials:
        """To show to servers; the same object until the files have changed."""
        with self._lock:
            self._renew()
            return self._channel

    def for_server(self) -> grpc.ServerCredentials:
        """To show to who connects, of whom a certificate is wanted. For one server."""
        return grpc.dynamic_ssl_server_credentials(
            self._served,
            self._if_renewed,  # type: ignore[arg-type]  # the stub does not know that it may be None
            require_client_authentication=True,
        )

    def _if_renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake; None: as before."""
        with self._lock:
            self._renew()
            if self._server is self._served:
                return None
            self._served = self._server
            return self._server


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file; nothing: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
