# SPDX-License-Identifier: Apache-2.0
"""A daemon to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import structlog
from support.ctl import Rig
from support.daemons import Running
from support.examined import config
from support.tap import Tap, served

from mfsd.client.introduction import introduced
from mfsd.doctor import Context

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A real daemon without devices, in which nothing goes wrong; what mfsctl asks it is noted."""
    with structlog.testing.capture_logs() as logged:  # it would log to the stdout that mfsctl has in this process
        running = Running(tmp_path)
        with introduced(running.target) as channel:
            tap = Tap(channel)
            with served(tmp_path / "tap", tap):
                yield Rig(tap, tmp_path / "tap")
        running.stop()
    assert not [event for event in logged if event["log_level"] not in ("debug", "info")]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """An empty machine."""
    return Context((), config(tmp_path), tmp_path)
