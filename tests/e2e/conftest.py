# SPDX-License-Identifier: Apache-2.0
"""A pair of namespaces with a running daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.habits import Sink
from support.rig import Daemon, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.client import Client, Event, Rejected


@pytest.fixture
def daemon(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Daemon]:
    """mfsd, enforcing htb on v0."""
    with running(Daemon(netns_pair, tmp_path)) as d:
        yield d


@pytest.fixture
def sink(netns_pair: NetnsPair) -> Iterator[Sink]:
    """Takes connections in namespace ``b`` and reads them."""
    with Sink(netns_pair) as s:
        yield s


@pytest.fixture
def events() -> list[Event]:
    """What the test's client was told."""
    return []


@pytest.fixture
def rejected() -> list[Rejected]:
    """What its hints were refused for."""
    return []


@pytest.fixture
def client(daemon: Daemon, events: list[Event], rejected: list[Rejected]) -> Iterator[Client]:
    """A client of the daemon with a request that there is time for."""
    with daemon.client(on_event=events.append, on_rejected=rejected.append) as c:
        assert c.flush(20)
        c.request("r", ttft_left_s=600)
        yield c
