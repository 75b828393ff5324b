# SPDX-License-Identifier: Apache-2.0
"""mfsctl, the operator's command line: a client of the Control service.

Start-up is kept short (shell completion runs mfsctl on each Tab): this module and app.py import click only, and every
command's module is imported when it is used.
"""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Entry point of ``mfsctl``; exits with one of `mfsd.cli.errors.Exit`."""
    # What is imported stays: to look through it again and again for garbage takes a tenth of a short command's time.
    gc.disable()
    # gRPC tells its own story on stderr ("Got goaway ...") otherwise; errors reach people through errors.py.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from mfsd.cli.app import mfsctl  # noqa: PLC0415 - importing mfsd.cli must not cost more than its name
    except ModuleNotFoundError as e:
        sys.exit(f"mfsctl: {e}; an install for workers has none of it: pip install 'mfsd[daemon]'")

    mfsctl(prog_name="mfsctl")
