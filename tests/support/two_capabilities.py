# SPDX-License-Identifier: Apache-2.0
"""Run by test_capabilities.py as a process of its own: everything that the daemon does with the classifier.

Usage: two_capabilities.py DEVICE ADDRESS [bcc], in a namespace where ADDRESS is reached through DEVICE. Ends with 0 if
all went well.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.parts.testrun import FOREVER, live
from mfsd.client import cookie_of
from mfsd.datapath import _abi
from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.attach import TCX_EGRESS, attach, remove_leftover
from mfsd.datapath.bpf.bcc import BccLoader
from mfsd.datapath.bpf.keys import cookie_key
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from support.privileges import DAEMON
from support.waiting import wait_for

if TYPE_CHECKING:
    from mfsd.datapath.bpf.loader import Classifier

ROW = 7


def check_capabilities() -> None:
    """Effective, permitted and bounding: exactly the two."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert int(status[name], 16) == sum(1 << c for c in DAEMON), f"{name} is {status[name]}"


def describe(c: Classifier) -> None:
    """A live daemon in enforce mode and a device with one band; by mmap."""
    live(c)
    c.dev["major"], c.dev["n_bands"], c.dev["control_band"] = 0x10000, 1, 1
    c.dev["bands"]["classid"][0, 0], c.dev["bands"]["lanes"] = 0x10010, 1
    c.dev["bands"]["dscp"] = _abi.DSCP_KEEP
    c.slots["expires_ns"][ROW] = FOREVER


def steers(c: Classifier, sender: socket.socket, address: str) -> None:
    """One datagram, seen in the slot and in the counters of this classifier."""
    slot, hits, band = (
        int(c.slots["packets"][ROW]),
        int(c.stats()[_abi.STAT_COOKIE]),
        int(c.bands()["packets"][0]),
    )
    sender.sendto(b"x" * 100, (address, 9))
    wait_for(lambda: int(c.stats()[_abi.STAT_COOKIE]) > hits, "a packet that is steered")
    assert int(c.slots["packets"][ROW]) > slot
    assert int(c.bands()["packets"][0]) > band


def main(device: str, address: str, by: str = "libbpf") -> None:
    """Load for two devices, fill the tables, attach, replace and detach with either method."""
    check_capabilities()
    index = socket.if_nametoindex(device)
    loader = BccLoader() if by == "bcc" else LibbpfLoader()
    with (
        loader.open_classifier(1024) as one,
        loader.open_classifier(1024, one) as two,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        describe(one)
        two.dev[:] = one.dev
        one.cookies.add(cookie_key(cookie_of(sender)), ROW)
        for row in range(500):
            one.cookies.add(cookie_key(2**60 + row), row)
        assert two.cookies.get(cookie_key(2**60 + 499)) == 499
        assert len(set(one.cookies)) == 501
        assert one.cookies.delete(cookie_key(2**60))
        for method in ("auto", "clsact"):
            with attach(one, index, method) as attachment:
                if attachment.method == "tcx":
                    ids = syscall.prog_query(index, TCX_EGRESS)
                    assert ids == [syscall.prog_id(one.prog_fd)]
                steers(one, sender, address)
                attachment.update(two)
                steers(two, sender, address)
            assert not remove_leftover(index)


if __name__ == "__main__":
    main(*sys.argv[1:])
