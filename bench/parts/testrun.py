# SPDX-License-Identifier: Apache-2.0
"""A classifier without daemon and device (BPF_PROG_TEST_RUN), for benchmarks and tests.

The kernel (net/bpf/test_run.c, bpf_prog_test_run_skb) makes an skb of the bytes, which must be an Ethernet frame, and
a fresh socket for it; converts the fields below into the skb; runs the program; and converts them back.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from mfsd.client import cookie_of
from mfsd.datapath import _abi
from mfsd.datapath.bpf import syscall
from mfsd.host import clock

if TYPE_CHECKING:
    from mfsd.datapath.bpf.loader import Classifier

FOREVER: Final = 2**63
"""Of ``expires_ns``."""
MAJOR: Final = 0x10000
BANDS: Final = 8
LANES: Final = 4
SK_BUFF: Final = np.dtype(
    {
        "names": ["len", "mark", "priority", "ifindex", "wire_len", "gso_segs", "gso_size"],
        "formats": ["u4", "u4", "u4", "u4", "u4", "u4", "u4"],
        "offsets": [0, 8, 32, 40, 160, 164, 176],
        "itemsize": 192,
    }
)
"""The fields of struct __sk_buff (include/uapi/linux/bpf.h) that matter here."""


def live(c: Classifier) -> None:
    """As a daemon that enforces, and shows so for an hour."""
    c.host["abi_version"], c.host["flags"] = _abi.ABI_VERSION, _abi.HOST_ENFORCE
    c.host["heartbeat_ns"], c.host["timeout_ns"] = clock.monotonic_ns(), 3600 * 10**9


def classid(band: int, lane: int = 0) -> int:
    """Leaf of a band on the device of ``describe``."""
    return MAJOR + 0x10 * (band + 1) + lane


def describe(c: Classifier) -> None:
    """A live daemon, and a device with BANDS bands of LANES lanes."""
    live(c)
    c.dev["major"], c.dev["n_bands"], c.dev["control_band"] = MAJOR, BANDS, 0
    c.dev["bands"]["classid"][0, :BANDS] = [classid(b) for b in range(BANDS)]
    c.dev["bands"]["lanes"], c.dev["bands"]["dscp"] = LANES, _abi.DSCP_KEEP


@dataclass(frozen=True, slots=True)
class Ran:
    """What the program made of the packet."""

    verdict: int
    """Return code, signed."""
    priority: int
    packet: bytes
    ns: int
    """Mean duration of one run, as the kernel measured it."""


def run_packet(
    prog_fd: int, packet: bytes, *, priority: int = 0, wire_len: int = 0, gso_segs: int = 0, repeat: int = 1
) -> Ran:
    """Run a SCHED_CLS program ``repeat`` times on one packet. Raises OSError, e.g. EINVAL for under 15 bytes."""
    ctx = np.zeros(1, dtype=SK_BUFF)
    ctx["priority"], ctx["wire_len"], ctx["gso_segs"] = priority, wire_len, gso_segs
    ran = syscall.prog_test_run(prog_fd, packet, ctx.tobytes(), repeat)
    after = np.frombuffer(ran.context, dtype=SK_BUFF)
    return Ran(ran.result, int(after["priority"][0]), ran.data, ran.ns)


_COOKIE_BATCH: Final = 4096
"""COOKIE_LOCAL_BATCH, include/linux/cookie.h."""


def upcoming_cookies(count: int) -> range:
    """Cookies that the next ``count`` sockets on this CPU will get, those of test runs included.

    Cookies are handed out per CPU, in batches of 4096, so the caller must be pinned to one CPU; other processes there
    may take a few, so ask for more than you need. Raises ValueError for more than half a batch.
    """
    if not 0 < count <= _COOKIE_BATCH // 2:
        raise ValueError(f"count = {count}: must be 1 to {_COOKIE_BATCH // 2}")
    for _ in range(_COOKIE_BATCH):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            last = cookie_of(s)
        if -last % _COOKIE_BATCH >= count:  # a batch ends with a multiple of its size
            break
    return range(last + 1, last + 1 + count)
