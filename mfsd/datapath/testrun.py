# SPDX-License-Identifier: Apache-2.0
"""Run a tc program on one packet without a device (BPF_PROG_TEST_RUN), for tests and the benchmark.

The kernel (net/bpf/test_run.c, bpf_prog_test_run_skb) makes an skb of the bytes, which must be an Ethernet frame, and
a fresh socket for it; converts the fields below into the skb; runs the program; and converts them back.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import numpy as np

from mfsd.datapath.libbpf import LibbpfCalls, RunOpts

SK_BUFF: Final = np.dtype(
    {
        "names": ["len", "mark", "priority", "ifindex", "wire_len", "gso_segs", "gso_size"],
        "formats": ["u4", "u4", "u4", "u4", "u4", "u4", "u4"],
        "offsets": [0, 8, 32, 40, 160, 164, 176],
        "itemsize": 192,
    }
)
"""The fields of struct __sk_buff (include/uapi/linux/bpf.h) that matter here."""


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
    data = ctypes.create_string_buffer(packet, len(packet))
    out = ctypes.create_string_buffer(len(packet) + 256)
    ctx_out = np.zeros(1, dtype=SK_BUFF)
    opts = RunOpts(
        data_in=ctypes.addressof(data),
        data_size_in=len(packet),
        data_out=ctypes.addressof(out),
        data_size_out=len(out),
        ctx_in=ctx.ctypes.data,
        ctx_size_in=SK_BUFF.itemsize,
        ctx_out=ctx_out.ctypes.data,
        ctx_size_out=SK_BUFF.itemsize,
        repeat=repeat,
    )
    LibbpfCalls().test_run(prog_fd, opts)
    verdict = ctypes.c_int32(opts.retval).value
    return Ran(verdict, int(ctx_out["priority"][0]), out.raw[: opts.data_size_out], opts.duration)
