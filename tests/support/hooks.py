# SPDX-License-Identifier: Apache-2.0
"""A device to hang programs on, and what this kernel has to hang them with."""

from __future__ import annotations

import concurrent.futures
import errno
import socket
import subprocess
from typing import TYPE_CHECKING, Literal, TypeVar

import pytest

from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.attach import TCX_EGRESS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.datapath.bpf.loader import Classifier


T = TypeVar("T")


Method = Literal["auto", "tcx", "clsact"]


class Namespace:
    """A throw-away network namespace with a veth pair d0 - d1, and a thread that lives in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def run(self, function: Callable[[], T]) -> T:
        """Call something in the namespace."""
        return self._thread.submit(function).result()

    def sh(self, command: str) -> str:
        """Run tc or ip there; returns what it prints."""
        done = subprocess.run(["ip", "netns", "exec", self.name, *command.split()], check=True, capture_output=True)
        return done.stdout.decode()

    def close(self) -> None:
        self._thread.shutdown()


def index(ns: Namespace, name: str = "d0") -> int:
    return ns.run(lambda: socket.if_nametoindex(name))


def traces(ns: Namespace) -> str:
    """Everything that could be left behind on the device."""
    return ns.sh("tc qdisc show dev d0") + ns.sh("tc filter show dev d0 egress")


def send(ns: Namespace) -> None:
    """One UDP datagram out of d0."""

    def go() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.sendto(b"x" * 100, ("10.9.0.2", 9))

    ns.run(go)


def runs(ns: Namespace, c: Classifier) -> bool:
    """True if traffic of the device passes the classifier."""
    before = int(c.stats().sum())
    send(ns)
    return int(c.stats().sum()) > before


def has_tcx() -> bool:
    """Linux 6.6 and later."""
    try:
        syscall.prog_query(1, TCX_EGRESS)  # lo
    except OSError as e:
        return e.errno != errno.EINVAL
    return True


TCX = pytest.mark.skipif(not has_tcx(), reason="this kernel has no tcx")


METHODS = pytest.mark.parametrize("method", ["auto", pytest.param("tcx", marks=TCX), "clsact"])
