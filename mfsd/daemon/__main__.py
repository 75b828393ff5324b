# SPDX-License-Identifier: Apache-2.0
"""``mfsd`` and ``python -m mfsd.daemon``."""

from __future__ import annotations

from mfsd.daemon.predecessor import Predecessor


def main() -> None:
    """Run the daemon. What the one before it left at work is kept so from the first moment on."""
    predecessor = Predecessor.find()
    from mfsd.daemon.main import main as run  # noqa: PLC0415 - it takes a second on a busy machine

    run(obj=predecessor)


if __name__ == "__main__":
    main()
