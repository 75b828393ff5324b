# SPDX-License-Identifier: Apache-2.0
"""Fewer capabilities, for a thread or a process: the daemon has two."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from support.namespaces import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.namespaces import NetnsPair

T = TypeVar("T")

CAP_NET_ADMIN: Final = 12
CAP_PERFMON: Final = 38
CAP_BPF: Final = 39
DAEMON: Final = frozenset({CAP_NET_ADMIN, CAP_BPF})
"""All that the unit grants (AmbientCapabilities=)."""
SETPRIV: Final = tuple(f"--{which}=-all,+bpf,+net_admin" for which in ("bounding-set", "inh-caps"))
"""Options of setpriv(1) with which root starts a process that has just these."""


def call_with(capabilities: frozenset[int], function: Callable[[], T]) -> T:
    """Call something in a thread that has only these capabilities (they are per thread); hands on its exception."""

    def body() -> T:
        _keep(capabilities)
        return function()

    return in_thread(body)


def do_all_with_two(pair: NetnsPair, *loader: str) -> None:
    """Run two_capabilities.py, all that the daemon does with the classifier, as a process with just these."""
    here = Path(__file__).resolve().parent
    script = [sys.executable, str(here / "two_capabilities.py"), pair.dev_a, pair.addr_b, *loader]
    done = subprocess.run(
        ["ip", "netns", "exec", pair.a, "setpriv", *SETPRIV, *script],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here.parent}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clsact" not in pair.run(pair.a, f"tc qdisc show dev {pair.dev_a}")


def _keep(capabilities: frozenset[int]) -> None:
    """Reduce the effective set of the calling thread (capset(2), version 3: two words of each set)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; again for the upper word
    assert libc.capget(header, data) == 0
    mask = sum(1 << c for c in capabilities)
    data[0], data[3] = data[0] & mask, data[3] & mask >> 32
    assert libc.capset(header, data) == 0
