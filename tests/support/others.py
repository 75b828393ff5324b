# SPDX-License-Identifier: Apache-2.0
"""Processes of other users: what they need to run our code."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
_MOVE: Final = """
closed=$1 root=$2; shift 2
mount --bind "$root" /srv
mount -t tmpfs -o mode=755 mfsd-tests "$closed"
mkdir -p "$root"
mount --move /srv "$root"
exec "$@"
"""


def within_reach() -> tuple[str, ...]:
    """What goes before a command of root's that becomes another user's: the checkout is in everybody's reach there.

    In a mount namespace of its own, where an empty folder that holds nothing but the checkout is in the place of the
    first folder above it that others may not enter (a home, say). Nothing if there is none.
    """
    above = [p for p in reversed(ROOT.parents) if not p.stat().st_mode & 0o001]
    if not above:
        return ()
    return ("unshare", "--mount", "sh", "-ec", _MOVE, "sh", str(above[0]), str(ROOT))
