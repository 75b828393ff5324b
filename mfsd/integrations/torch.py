# SPDX-License-Identifier: Apache-2.0
"""torch.distributed under mfsd: one call marks the connections of a process group as collectives.

    import torch.distributed as dist
    from mfsd.integrations.torch import mark_group

    mark_group(lambda: dist.init_process_group("gloo", ...))
    experts = mark_group(lambda: dist.new_group([0, 1], backend="gloo"))

gloo connects while the group is made. NCCL connects at the group's first collective, so let it do one: pass a function
that makes the group and runs a barrier. What the process connects or accepts meanwhile is taken for the group's and is
marked by socket: exactly, whatever ports it has. The connection to the store (rank 0's port) may be among them; it
carries next to nothing.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, TypeVar

from mfsd.client import Cookie, Stage, cookie_of
from mfsd.integrations import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mfsd.client import Client

T = TypeVar("T")
_guard = guard.Guard()
_clients: dict[int, Client] = {}
"""By process: after a fork, the parent's is closed."""


def default_client() -> Client:
    """The client of this process, made at the first call, and again after a fork."""
    process = os.getpid()
    if process not in _clients:
        _clients[process] = guard.client()
    return _clients[process]


def mark_group(make: Callable[[], T], *, client: Client | None = None, stage: Stage = Stage.COLLECTIVE) -> T:
    """Run ``make``, and mark the TCP connections that the process has got meanwhile. Returns what ``make`` does.

    ``client``: that of the process, if it has one; its marks end with it.
    """
    before: set[int] = set()
    _guard("looking at sockets", lambda: before.update(connections()))
    made = make()
    _guard("a group's marks", lambda: _mark(client, set(connections()) - before, stage))
    return made


def _mark(client: Client | None, cookies: Iterable[int], stage: Stage) -> None:
    hints = client if client is not None else default_client()
    for cookie in cookies:
        hints.mark(Cookie(cookie), stage)


def connections() -> list[int]:
    """Cookies of the TCP connections that this process has open."""
    out = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        try:
            fd = os.dup(int(name))
        except OSError:
            continue  # that of the listing
        try:
            one = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)  # no socket
            continue
        with one:
            cookie = _cookie(one)
        if cookie:
            out.append(cookie)
    return out


def _cookie(one: socket.socket) -> int:
    """0: no TCP connection."""
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return 0
    try:
        one.getpeername()
        return cookie_of(one)
    except OSError:
        return 0
