# SPDX-License-Identifier: Apache-2.0
"""What the daemon and its clients agree on beside proto/."""

from __future__ import annotations

from typing import Final

TOKEN: Final = "mfsd-token"  # noqa: S105 - its name
"""Metadata of a call: who makes it (mfsd/api/identity.py)."""
LASTING: Final = "mfsd-lasting"
"""Metadata of an operator's single call: what it says outlives the connection that the token was given on."""
BESIDE: Final = ".id"
"""Appended to the path of the daemon's socket by the one that gives tokens."""
INTERLEAVED: Final = 1
"""Bit of TransferColumns.flags."""
PATHS_MAX: Final = 256
"""Of one question for advice."""
