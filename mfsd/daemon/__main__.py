# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - see below
"""``mfsd`` and ``python -m mfsd.daemon``."""

from __future__ import annotations

import os
import signal

# First of all, before there is another thread and before what takes half a second to import: until there is a handler
# these would end the process. Blocked in all threads, they wait for their handlers. Ctrl-C just ends it, as SIGTERM
# does: nothing has been touched yet. Whatever else the process that started this one has blocked is not, or it could
# not be told to end.
signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.getpid() == 1:
    # Of a container, say. To the first process of a pid namespace come those signals only that it handles.
    for _number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(_number, lambda number, _frame: os._exit(128 + number))

# Where it has closed the standard descriptors, no map or socket may be what somebody writes his complaints to.
while (_fd := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(_fd)

import sys

from mfsd import WHEEL
from mfsd.daemon.predecessor import Predecessor


def main() -> None:
    """Run the daemon, if what it needs is installed, and keep at work what the one before it left."""
    predecessor = Predecessor.find()
    try:
        from mfsd.daemon.main import main as run  # noqa: PLC0415 - it takes a second on a busy machine
    except ModuleNotFoundError as e:
        sys.exit(f"mfsd: {e}; an install for workers has no daemon: pip install '{WHEEL}[daemon]'")
    run(obj=predecessor)


if __name__ == "__main__":
    main()
