# SPDX-License-Identifier: Apache-2.0
"""Throw-away network namespaces for tests; see the fixture netns_pair."""

from __future__ import annotations

import concurrent.futures
import contextlib
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mfsd.lab.hosts.enter import inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread of its own, whatever it does to that one; its exception comes back, too."""
    with concurrent.futures.ThreadPoolExecutor(1) as one:
        return one.submit(function).result()


@dataclass(frozen=True)
class NetnsPair:
    """Two namespaces joined by a veth pair: v0 (10.77.0.1, fd77::1) in ``a``, v1 (10.77.0.2, fd77::2) in ``b``."""

    a: str
    b: str
    dev_a: str = "v0"
    dev_b: str = "v1"
    addr_a: str = "10.77.0.1"
    addr_b: str = "10.77.0.2"
    addr6_a: str = "fd77::1"
    addr6_b: str = "fd77::2"

    inside = staticmethod(inside)

    def call(self, name: str, function: Callable[[], T]) -> T:
        """Run a function in a namespace, in a thread of its own; its exception comes back, too."""

        def body() -> T:
            with self.inside(name):
                return function()

        return in_thread(body)

    def run(self, name: str, command: str) -> str:
        """Run a shell command in a namespace and return what it printed."""
        done = subprocess.run(
            ["ip", "netns", "exec", name, "sh", "-ec", command], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@contextlib.contextmanager
def joined_namespaces() -> Iterator[NetnsPair]:
    """Two namespaces joined by a veth pair with four transmit queues each; leftovers are an AssertionError."""
    stem = f"mfsd-t-{secrets.token_hex(4)}"
    pair = NetnsPair(f"{stem}-a", f"{stem}-b")
    here = _devices()
    try:
        for name in (pair.a, pair.b):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        queues = ["numtxqueues", "4", "numrxqueues", "4"]
        peer = ["peer", "name", pair.dev_b, *queues, "netns", pair.b]
        ip("-n", pair.a, "link", "add", pair.dev_a, *queues, "type", "veth", *peer)
        ends = [(pair.a, pair.dev_a, pair.addr_a, pair.addr6_a), (pair.b, pair.dev_b, pair.addr_b, pair.addr6_b)]
        for name, dev, v4, v6 in ends:
            ip("-n", name, "addr", "add", f"{v4}/24", "dev", dev)
            ip("-n", name, "addr", "add", f"{v6}/64", "dev", dev, "nodad")
            ip("-n", name, "link", "set", dev, "up")
        yield pair
        for name in (pair.a, pair.b):
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
            assert not pids.split(), f"processes left in {name}: {pids.split()}"
    finally:
        for name in (pair.a, pair.b):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    left = [p.name for p in Path("/run/netns").glob(f"{stem}*")]
    assert not left, f"namespaces left: {left}"
    assert _devices() == here, "the test changed the devices of its own namespace"


def ip(*words: str) -> None:
    """Run iproute2's ip; fails where it does."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _devices() -> set[str]:
    return {p.name for p in Path("/sys/class/net").iterdir()}
