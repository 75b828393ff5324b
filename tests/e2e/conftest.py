# SPDX-License-Identifier: Apache-2.0
"""A pair of namespaces with a running daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.rig import Daemon, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair


@pytest.fixture
def daemon(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Daemon]:
    """mfsd, enforcing htb on v0."""
    with running(Daemon(netns_pair, tmp_path)) as d:
        yield d
