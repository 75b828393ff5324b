# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by several folders of tests."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Final

import hypothesis
import pytest
from support.namespaces import NetnsPair, joined_namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator

# No test asserts on time, which a busy machine has less of.
hypothesis.settings.register_profile("mfsd", deadline=None)
hypothesis.settings.load_profile("mfsd")

# A shell's background jobs ignore SIGINT, and so would all that tests start and interrupt.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MARKED_BY_FIXTURE: Final = {
    "netns_pair": "netns",
    "own_netns": "netns",
    "loaded": "bpf",
    "start": "daemon",
    "rig": "daemon",
    "site": "daemon",
}
"""Fixtures that need privileges or start something: who uses one has its marker, and `make check` leaves it out."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark before -m selects."""
    for item in items:
        for fixture in MARKED_BY_FIXTURE.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKED_BY_FIXTURE[fixture])


@pytest.fixture
def netns_pair() -> Iterator[NetnsPair]:
    """Two throw-away namespaces joined by a veth pair; whatever is left in or of them fails the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    with joined_namespaces() as pair:
        yield pair
