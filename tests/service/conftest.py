# SPDX-License-Identifier: Apache-2.0
"""Daemons and stubs for the tests of this folder."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import Api, Running, connected
from support.relays import SENDER, WAITER, Hosts

from mfsd.client.introduction import introduced
from mfsd.lab.hosts.certificates import Authority

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts daemons on one socket, one after the other; keyword arguments are sections of the configuration."""
    started: list[Running] = []

    def make(**sections: Any) -> Running:
        for one in started:
            one.stop()
        started.append(Running(tmp_path, **sections))
        return started[-1]

    yield make
    for one in started:
        one.stop()


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    """A daemon with all defaults."""
    return start()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two that exchange hints."""
    authority = Authority(tmp_path / "ca")
    made = Hosts(tmp_path, authority.papers("sender.test", SENDER), authority.papers("waiter.test", WAITER))
    yield made
    made.stop()


@pytest.fixture
def reach() -> Iterator[Callable[[Running], Api]]:
    """Makes stubs of daemons."""
    with contextlib.ExitStack() as stack:
        yield lambda daemon: Api(stack.enter_context(introduced(daemon.target)))


@pytest.fixture
def api(running: Running, reach: Callable[[Running], Api]) -> Api:
    """Stubs of ``running``."""
    return reach(running)


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection over the loopback: (client, server)."""
    with connected() as pair:
        yield pair
