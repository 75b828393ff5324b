# SPDX-License-Identifier: Apache-2.0
"""``mfsd`` and ``python -m mfsd.daemon``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the daemon, if what it needs is installed."""
    try:
        from mfsd.daemon.main import main as run  # noqa: PLC0415 - so that there is somebody to say what is missing
    except ModuleNotFoundError as e:
        sys.exit(f"mfsd: {e}; an install for workers has no daemon: pip install 'mfsd[daemon]'")
    run()


if __name__ == "__main__":
    main()
