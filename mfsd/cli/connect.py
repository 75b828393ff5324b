# SPDX-License-Identifier: Apache-2.0
"""A connection to the daemon, whose failures are words with a fix."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from mfsd.cli.errors import CliError, HangingError, NotPermittedError, UnreachableError
from mfsd.client.introduction import Introduction, NotWelcomeError, introduced, who_may
from mfsd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mfsd.v1 import hints_pb2_grpc

TIMEOUT_S: Final = 10.0
_PROBE_S: Final = 3.0
_OPTIONS: Final = [
    ("grpc.enable_http_proxy", 0),
    # As long as an attempt to connect may take, too (20 s by default): of a daemon that hangs one is told so sooner.
    ("grpc.min_reconnect_backoff_ms", 5000),
]


def _unix_path(target: str) -> str | None:
    """Path of a unix socket; None when the target is HOST:PORT."""
    if target.startswith("unix:"):
        return target.removeprefix("unix:").removeprefix("//")
    host, colon, port = target.rpartition(":")
    if "/" not in target and colon and host and port.isdecimal():
        return None
    return target


@contextlib.contextmanager
def _channel(target: str) -> Iterator[grpc.Channel]:
    """Open, after a look at the socket: gRPC would report a missing file and a forbidden one alike, and late."""
    path = _unix_path(target)
    if path is not None:
        _probe(path)
    address = str(target) if path is None else f"unix:{Path(path).absolute()}"
    credentials = _credentials(getattr(target, "tls", {}) if path is None else {})
    with introduced(address, options=_OPTIONS, credentials=credentials) as channel:
        yield channel


def _credentials(tls: dict[str, str]) -> grpc.ChannelCredentials | None:
    """Of a daemon with TLS (cli.app.TLS); None: without."""
    if not tls:
        return None
    pem = {}
    for name, path in tls.items():
        try:
            pem[name] = Path(path).read_bytes()
        except (OSError, ValueError) as e:
            raise CliError(f"--tls-{name} {path}: {getattr(e, 'strerror', None) or e}") from None
        if b"-----BEGIN" not in pem[name]:
            raise CliError(f"--tls-{name} {path}: is no PEM file")
    return grpc.ssl_channel_credentials(pem["ca"], pem["key"], pem["cert"])


def _probe(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(_PROBE_S)
        try:
            s.connect(path)
        except FileNotFoundError:
            raise UnreachableError(
                f"mfsd is not running: there is no socket {path}; start it (systemctl start mfsd) or give --socket"
            ) from None
        except ConnectionRefusedError:
            raise UnreachableError(
                f"mfsd is not running: nobody listens on {path}; start it (systemctl start mfsd). If it was killed, "
                "`mfsctl restore` puts the qdiscs back"
            ) from None
        except PermissionError:
            raise NotPermittedError(
                f"you may not use {path}{who_may(path)}; root may. All but `mfsctl hint` is for operators: be in "
                "daemon.operator_group, too"
            ) from None
        except OSError as e:
            fix = "give --socket the path of mfsd's socket" if e.errno in (errno.ENOTSOCK, errno.ENOTDIR) else ""
            why = "it is too long for a unix socket" if e.errno is None else e.strerror or str(e)
            raise UnreachableError(f"can't connect to {path}: {why}" + (f"; {fix}" if fix else "")) from None


@contextlib.contextmanager
def control(target: str) -> Iterator[control_pb2_grpc.ControlStub]:
    """Stub of the Control service; errors of its calls become CliErrors."""
    with _channel(target) as channel, translated(target):
        yield control_pb2_grpc.ControlStub(channel)


@contextlib.contextmanager
def hints(target: str) -> Iterator[hints_pb2_grpc.HintsStub]:
    """Stub of the Hints service; errors of its calls become CliErrors."""
    from mfsd.v1 import hints_pb2_grpc  # noqa: PLC0415 - one command needs it

    with _channel(target) as channel, translated(target):
        yield hints_pb2_grpc.HintsStub(channel)


@contextlib.contextmanager
def translated(target: str) -> Iterator[None]:
    """Turn gRPC's errors into CliErrors."""
    try:
        yield
    except grpc.RpcError as e:
        # The stubs give RpcError none of the methods that every error of a call has.
        call: Any = e
        raise _explain(call.code(), str(call.details() or ""), target) from None


def _turned_away(target: str) -> str:
    """Why mfsd gives us no token, in its words; empty: it gives one, or there is nobody to ask."""
    introduction = Introduction(f"unix:{path}" if (path := _unix_path(target)) is not None else target)
    try:
        introduction.token()
    except NotWelcomeError as e:
        return str(e.strerror)
    except OSError:
        return ""
    finally:
        introduction.close()
    return ""


def _explain(code: grpc.StatusCode, details: str, target: str) -> CliError:
    words: dict[grpc.StatusCode, Callable[[], CliError]] = {
        grpc.StatusCode.UNAVAILABLE: lambda: HangingError(f"no answer from mfsd at {target}: {details}"),
        grpc.StatusCode.DEADLINE_EXCEEDED: lambda: HangingError(
            f"mfsd at {target} has not answered in time; see its log (journalctl -u mfsd)"
        ),
        grpc.StatusCode.PERMISSION_DENIED: lambda: NotPermittedError(f"mfsd refuses: {details}"),
        grpc.StatusCode.UNAUTHENTICATED: lambda: NotPermittedError(
            _turned_away(target) or f"mfsd does not know you: {details}"
        ),
        grpc.StatusCode.UNIMPLEMENTED: lambda: CliError(
            f"mfsd at {target} does not know this call ({details}); it is older than this mfsctl: restart it"
        ),
        grpc.StatusCode.INTERNAL: lambda: CliError(f"mfsd failed: {details}; see its log (journalctl -u mfsd)"),
        grpc.StatusCode.UNKNOWN: lambda: CliError(f"mfsd failed: {details}; see its log (journalctl -u mfsd)"),
    }
    return words.get(code, lambda: CliError(details or code.name.lower().replace("_", " ")))()


def paged(call: Any, request: Any, rows: str, limit: int, timeout: float = TIMEOUT_S) -> list[Any]:
    """All rows of a list that comes in pages; ``limit`` 0: all."""
    out: list[Any] = []
    while True:
        request.page_size = limit - len(out) if limit else 0
        page = call(request, timeout=timeout)
        out += getattr(page, rows)
        request.page_token = page.next_page_token
        if not page.next_page_token or (limit and len(out) >= limit):
            return out
