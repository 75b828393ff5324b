# SPDX-License-Identifier: Apache-2.0
"""Certificates, private keys and CAs from files, checked before gRPC takes them: it does not say what is wrong."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES: Final = 1 << 20
"""Of a file; a hundred CAs take half of it."""


class PemError(ValueError):
    """A file is not what it should be; the text names the key."""


def read(key: str, path: Path) -> bytes:
    """A file that is to have PEM in it. Raises PemError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise PemError(f'{key} = "{path}": is no regular file')
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise PemError(f'{key} = "{path}": can\'t be read: {e.strerror}') from e
    if len(raw) > MAX_BYTES:
        raise PemError(f'{key} = "{path}": more than {MAX_BYTES} bytes; is this the right file?')
    return raw


def trio(cert: tuple[str, Path], private: tuple[str, Path], ca: tuple[str, Path] | None) -> tuple[bytes, bytes, bytes]:
    """A certificate, its private key, and a CA or nothing, each as (configuration key, file). Raises PemError."""
    chain, secret, roots = read(*cert), read(*private), b"" if ca is None else read(*ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The password, so that nobody is asked for one.
        context.load_cert_chain(cert[1], private[1], password="")
    except (OSError, ValueError) as e:
        problem = f'must be PEM, and the certificate of {private[0]} ("{private[1]}"), which has no password'
        raise PemError(f'{cert[0]} = "{cert[1]}": {problem} ({e})') from e
    if ca is not None:
        try:
            context.load_verify_locations(ca[1])
        except (OSError, ValueError) as e:
            raise PemError(f'{ca[0]} = "{ca[1]}": must be certificates in PEM ({e})') from e
    return chain, secret, roots
