# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by several folders of tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.namespaces import NetnsPair, joined_namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def netns_pair() -> Iterator[NetnsPair]:
    """Two throw-away namespaces joined by a veth pair; whatever is left in or of them fails the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    with joined_namespaces() as pair:
        yield pair
