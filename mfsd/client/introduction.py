# SPDX-License-Identifier: Apache-2.0
"""How a client says who it is: a connection to the socket beside the daemon's, on which the kernel vouches for it.

The daemon answers with a token for the metadata of calls, and takes the connection's end for the client's.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from mfsd.ground.wire import BESIDE, TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TIMEOUT_S: Final = 2.0
LINE_MAX: Final = 512


class NotWelcomeError(OSError):
    """The daemon, or the owner of its socket, does not want us; the text says why, and what to do."""


class Introduction:
    """At most one connection; for one thread, but ``close`` may be called by any."""

    def __init__(self, target: str) -> None:
        """``target`` is a gRPC address; only unix sockets have another one beside them."""
        self._path = target.removeprefix("unix:").removeprefix("//") if target.startswith("unix:") else ""
        self._sock: socket.socket | None = None
        self._token = ""
        self.absent = False
        """There is a daemon's socket, but none beside it."""

    def token(self) -> str:
        """Ours, connecting anew if need be; empty: there is nobody to ask.

        Raises OSError when the daemon can't be reached, NotWelcomeError when that is not for want of a daemon.
        """
        if not self._path:
            return ""
        if self._sock is not None and not self._alive(self._sock):
            self.close()
        if self._sock is None:
            try:
                self._sock, self._token = _connect(f"{self._path}{BESIDE}")
            except FileNotFoundError:
                _probe(self._path)
                self.absent = True
                return ""
            self.absent = False
        return self._token

    @staticmethod
    def _alive(sock: socket.socket) -> bool:
        try:
            return bool(sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True  # nothing to read, so it is open
        except OSError:
            return False

    def close(self) -> None:
        """End all that was said under the token. Idempotent."""
        sock, self._sock, self._token = self._sock, None, ""
        if sock is not None:
            sock.close()


class _Named(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Shows our token with every call."""

    def __init__(self, introduction: Introduction) -> None:
        self._introduction = introduction

    def _details(self, details: Any) -> Any:
        with contextlib.suppress(OSError):  # the call itself fails as well, and says so in gRPC's ways
            token = self._introduction.token()
            if token:
                return details._replace(metadata=[*(details.metadata or ()), (TOKEN, token)])
        return details

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """See grpc; so are the others."""
        return continuation(self._details(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """One request, many answers."""
        return continuation(self._details(client_call_details), request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Many of both."""
        return continuation(self._details(client_call_details), request_iterator)


@contextlib.contextmanager
def introduced(
    target: str, options: Sequence[tuple[str, Any]] = (), credentials: grpc.ChannelCredentials | None = None
) -> Iterator[grpc.Channel]:
    """A channel to a daemon that is told who we are before each call, if need be. ``credentials``: with TLS."""
    introduction = Introduction(target)
    try:
        with (
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
        ) as channel:
            yield grpc.intercept_channel(channel, _Named(introduction))
    finally:
        introduction.close()


def _connect(path: str) -> tuple[socket.socket, str]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(TIMEOUT_S)
        _knock(sock, path)
        token = _read(sock)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock, token


def _read(sock: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        part = sock.recv(LINE_MAX)
        if not part or len(line) > LINE_MAX:
            raise ConnectionResetError(errno.ECONNRESET, "no token")
        line += part
    text = line.decode(errors="replace").strip()
    if text.startswith("!"):
        raise NotWelcomeError(errno.EACCES, f"mfsd refuses this process: {text[1:]}")
    return text


def _probe(path: str) -> None:
    """Connect to a daemon's socket and hang up. Raises OSError, or NotWelcomeError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_S)
        _knock(sock, path)


def _knock(sock: socket.socket, path: str) -> None:
    try:
        sock.connect(path)
    except OSError as e:
        if e.errno is None:  # Python's own word
            raise NotWelcomeError(
                errno.ENAMETOOLONG, f"{path}: too long for a socket's path; 107 bytes at most"
            ) from None
        if e.errno not in (errno.EACCES, errno.EPERM):
            raise
        raise NotWelcomeError(errno.EACCES, f"this process may not use {path}{who_may(path)}") from None


def who_may(path: str) -> str:
    """Who may use a socket and how to become one of them, in words, as far as one can see from here."""
    try:
        info = Path(path).stat()
    except OSError:
        return ": its folder is closed"
    owner, group, user = str(info.st_uid), str(info.st_gid), str(os.geteuid())
    with contextlib.suppress(KeyError):
        owner = pwd.getpwuid(info.st_uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(info.st_gid).gr_name
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(os.geteuid()).pw_name
    text = f" (owner {owner}, group {group}, mode {stat.S_IMODE(info.st_mode):04o})"
    if info.st_mode & stat.S_IWGRP and info.st_gid not in (os.getegid(), *os.getgroups()):
        joins = f"join the group (usermod -aG {group} {user}) and start it again"
        text += f": {joins if info.st_gid else 'it is for root until daemon.socket_group names a group'}"
    return text
