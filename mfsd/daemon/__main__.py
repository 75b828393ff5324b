# SPDX-License-Identifier: Apache-2.0
"""``mfsd`` and ``python -m mfsd.daemon``."""

from __future__ import annotations

import sys

from mfsd.daemon.predecessor import Predecessor


def main() -> None:
    """Run the daemon, if what it needs is installed, and keep at work what the one before it left."""
    predecessor = Predecessor.find()
    try:
        from mfsd.daemon.main import main as run  # noqa: PLC0415 - it takes a second on a busy machine
    except ModuleNotFoundError as e:
        sys.exit(f"mfsd: {e}; an install for workers has no daemon: pip install 'mfsd[daemon]'")
    run(obj=predecessor)


if __name__ == "__main__":
    main()
