# SPDX-License-Identifier: Apache-2.0
"""mfsctl, the operator's command line: a client of the Control service.

Start-up is kept short (shell completion runs mfsctl on each Tab): this module and app.py import click only, and every
command's module is imported when it is used.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import sys

from mfsd import WHEEL


def main() -> None:
    """Entry point of ``mfsctl``; exits with one of `mfsd.cli.errors.Exit`."""
    # What is imported stays: to look through it again and again for garbage takes a tenth of a short command's time.
    gc.disable()
    # gRPC tells its own story on stderr ("Got goaway ...") otherwise; errors reach people through errors.py.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from mfsd.cli.app import mfsctl  # noqa: PLC0415 - importing mfsd.cli must not cost more than its name
    except ModuleNotFoundError as e:
        sys.exit(f"mfsctl: {e}; an install for workers has none of it: pip install '{WHEEL}[daemon]'")

    _stand_in()
    odd = next((word for word in sys.argv if not word.isascii() and "\udc80" <= max(word) <= "\udcff"), None)
    if odd is not None:
        sys.stderr.write(f"mfsctl: {odd!a} is not UTF-8\n")
        sys.exit(2)
    try:
        try:
            mfsctl(prog_name="mfsctl")
        finally:
            sys.stdout.flush()
    except OSError as e:  # the answer can't be written, or not all of it
        if e.errno != errno.EPIPE:
            with contextlib.suppress(OSError):  # both may be a terminal that is gone
                sys.stderr.write(f"mfsctl: {e}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains once more
        sys.exit(1)


def _stand_in() -> None:
    """Where standard streams are closed, nothing that is opened later must be taken for one."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for good
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names have characters that not every terminal's set has
