# SPDX-License-Identifier: Apache-2.0
"""Addresses in the configuration, and the section of the metrics' endpoint."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, InstanceOf, field_validator

from mfsd.daemon.config_text import toml
from mfsd.engine.settings import Section, setting

OFF = "off"
UNIX = "unix"


def host_port(text: str) -> tuple[str, int]:
    """Parts of "host:port". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def loopback(host: str) -> bool:
    """Whether only this host reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def absolute(value: Any) -> Any:
    """A path; of a text. Raises ValueError for a relative one."""
    if isinstance(value, str):
        value = Path(value)
    if isinstance(value, Path) and not value.is_absolute():
        raise ValueError("relative")
    return value


AbsolutePath = Annotated[InstanceOf[Path], BeforeValidator(absolute)]


class MetricsConfig(Section):
    """``[metrics]``: the endpoint that Prometheus reads."""

    listen: str = setting(
        UNIX,
        'Where. "unix": at daemon.socket with .metrics behind its name, open to the same group.',
        allowed='"unix", "off", or "host:port"; beyond loopback with metrics.tls_certificate and tls_key',
    )
    tls_certificate: AbsolutePath | None = setting(None, "Certificate (PEM).", allowed="an absolute path")
    tls_key: AbsolutePath | None = setting(None, "Its key (PEM), readable for mfsd alone.", allowed="an absolute path")
    tls_client_ca: AbsolutePath | None = setting(
        None, "Only clients with a certificate of this authority (PEM) are let in.", allowed="an absolute path"
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
        return self.tls_certificate is not None


def metrics_problems(m: MetricsConfig) -> list[str]:
    """What is wrong across keys."""
    out = []
    if (m.tls_certificate is None) != (m.tls_key is None):
        missing = "tls_key" if m.tls_key is None else "tls_certificate"
        out.append(f"metrics.{missing}: is not set; a certificate and its key go together")
    if m.tls_client_ca is not None and not m.tls:
        out.append(f"metrics.tls_client_ca = {toml(str(m.tls_client_ca))}: needs metrics.tls_certificate and tls_key")
    if m.listen in (OFF, UNIX):
        if m.tls:
            out.append(f"metrics.tls_certificate: has no use with metrics.listen = {toml(m.listen)}")
    elif not m.tls and not loopback(host_port(m.listen)[0]):
        out.append(
            f"metrics.listen = {toml(m.listen)}: other hosts reach it; "
            "set metrics.tls_certificate and metrics.tls_key, or use a loopback address"
        )
    return out
