# SPDX-License-Identifier: Apache-2.0
"""The reader of the ring of events, on memory that looks like the kernel's."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
from typing import Final

from mfsd.datapath.bpf.ring import Ring

SIZE: Final = 1 << 16
RECORD: Final = struct.pack("=II56s", 56, 0, b"x" * 56)
COUNT: Final = 1_200_000
WATCHER: Final = """
import mmap, sys
position = memoryview(mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE, prot=mmap.PROT_READ)).cast("Q")
print("ready", flush=True)
before = 0
while before < int(sys.argv[2]):
    now = position[0]
    assert now >= before, (before, now)
    before = now
"""


def test_what_has_been_read_never_seems_less() -> None:
    """The kernel looks at any time how much room there is, and drops an event where there seems to be none."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, 2 * mmap.PAGESIZE + 2 * SIZE)
    os.pwrite(fd, struct.pack("=Q", COUNT * len(RECORD)), mmap.PAGESIZE)
    os.pwrite(fd, RECORD * (2 * SIZE // len(RECORD)), 2 * mmap.PAGESIZE)
    argv = [sys.executable, "-c", WATCHER, str(fd), str(COUNT * len(RECORD))]
    with subprocess.Popen(argv, pass_fds=(fd,), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        ring = Ring(fd, SIZE)
        assert sum(len(record) for record in ring.read(COUNT)) == 56 * COUNT
        assert not ring.waiting
        ring.close()
        assert watcher.wait(60) == 0, watcher.communicate()[1]
    os.close(fd)
