# SPDX-License-Identifier: Apache-2.0
"""A network namespace of its own for each test, with nothing but lo: the thread enters it and leaves it again."""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
from support.realnet import Net

from mfsd.host.sockets import SocketResolver

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNET: Final = 0x40000000


@pytest.fixture
def own_netns() -> Iterator[None]:
    """Unnamed, so that it goes with its last user, whatever happens."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a network namespace")
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        os.close(home)


@pytest.fixture
def resolver(own_netns: None) -> Iterator[SocketResolver]:  # noqa: ARG001 - made inside the namespace
    with SocketResolver() as r:
        yield r


@pytest.fixture
def net(own_netns: None) -> Iterator[Net]:  # noqa: ARG001 - sockets must be made inside the namespace
    n = Net()
    yield n
    for s in n.open:
        s.close()
