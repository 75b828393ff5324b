# SPDX-License-Identifier: Apache-2.0
"""The section of the metrics' endpoint in the configuration."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from pydantic import field_validator

from mfsd.daemon.config_text import toml
from mfsd.daemon.config_values import SUN_PATH, FilePath, loopback
from mfsd.engine.settings import Section, setting
from mfsd.ground.units import host_port

if TYPE_CHECKING:
    from pathlib import Path

OFF: Final = "off"
UNIX: Final = "unix"
SUFFIX: Final = ".metrics"
"""Behind the name of the daemon's socket, for the one of UNIX."""


class MetricsConfig(Section):
    """``[metrics]``: the endpoint that Prometheus reads."""

    listen: str = setting(
        UNIX,
        'Where. "unix": at daemon.socket with .metrics behind its name, for operators alone.',
        allowed='"unix", "off", or "host:port"; beyond loopback with metrics.tls_cert and tls_key',
    )
    tls_cert: FilePath | None = setting(None, "Certificate of that endpoint, PEM.", allowed="an absolute path")
    tls_key: FilePath | None = setting(None, "Its private key, PEM.", allowed="an absolute path")
    tls_client_ca: FilePath | None = setting(
        None, "Who has signed its clients' certificates, PEM. Unset: everybody is let in.", allowed="an absolute path"
    )

    @field_validator("listen")
    @classmethod
    def _listen_address(cls, value: str) -> str:
        if value not in (OFF, UNIX):
            host_port(value)
        return value

    @property
    def tls(self) -> bool:
        """It is served with TLS."""
        return self.tls_cert is not None


def metrics_problems(m: MetricsConfig, daemon_socket: Path) -> list[str]:
    """What is wrong across keys."""
    out = []
    most = SUN_PATH - 1 - len(SUFFIX)
    if m.listen == UNIX and len(os.fsencode(daemon_socket)) > most:
        out.append(
            f"daemon.socket = {toml(daemon_socket)}: at most {most} bytes, so that the metrics' socket beside it "
            'has room; choose a shorter path, or metrics.listen = "off"'
        )
    if (m.tls_cert is None) != (m.tls_key is None):
        missing = "tls_key" if m.tls_key is None else "tls_cert"
        out.append(f"metrics.{missing}: is not set; a certificate and its key go together")
    if m.tls_client_ca is not None and not m.tls:
        out.append(f"metrics.tls_client_ca = {toml(str(m.tls_client_ca))}: needs metrics.tls_cert and tls_key")
    if m.listen in (OFF, UNIX):
        if m.tls:
            out.append(f"metrics.tls_cert: has no use with metrics.listen = {toml(m.listen)}")
    elif not m.tls and not loopback(host_port(m.listen)[0]):
        out.append(
            f"metrics.listen = {toml(m.listen)}: other hosts reach it; "
            "set metrics.tls_cert and metrics.tls_key, or use a loopback address"
        )
    return out
