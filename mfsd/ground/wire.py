# SPDX-License-Identifier: Apache-2.0
"""What the daemon and its clients agree on beside proto/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

TOKEN: Final = "mfsd-token"  # noqa: S105 - its name
"""Metadata of a call: who makes it (mfsd/api/identity.py)."""
LASTING: Final = "mfsd-lasting"
"""Metadata of an operator's single call: what it says outlives the connection that the token was given on."""
BESIDE: Final = ".id"
"""Appended to the path of the daemon's socket by the one that gives tokens."""
RELAYED: Final = "relay:"
"""Names of sessions begin so that say what daemons of other hosts bring."""
OWN: Final = ("mfsd:", RELAYED)
"""How names of sessions begin that are the daemon's own: whoever took one first would have what it is for."""
INTERLEAVED: Final = 1
"""Bit of TransferColumns.flags."""
SOCKETS_MAX: Final = 256
"""Of one cancellation, how far they had been written."""
PATHS_MAX: Final = 256
"""Of one question for advice."""
OVERTIME_S: Final = 30.0
"""What lives on when its time to live is over (Event.OVERTIME) does so for so long, unless more is said of it."""


def beside(socket_path: Path) -> Path:
    """The socket that gives tokens, which belongs to a daemon's."""
    return socket_path.with_name(f"{socket_path.name}{BESIDE}")
