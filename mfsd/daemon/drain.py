# SPDX-License-Identifier: Apache-2.0
"""Letting out what is queued, before qdiscs go or are left alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import structlog

from mfsd.datapath.errors import DatapathError
from mfsd.engine.guarantees import draining
from mfsd.ground.bands import HINTED

if TYPE_CHECKING:
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer

DRAIN_S: Final = 0.25
"""How long it may take."""
LOOK_S: Final = 0.005

log = structlog.get_logger(__name__)


def drain(enforcer: DeviceEnforcer) -> None:
    """Packets go nowhere but to the default band from now on: let out what is queued in the other bands, if it goes.

    A deferred connection must not stay behind in a lane: with the tree its packets are lost, or they wait for long.
    """
    until = time.monotonic() + DRAIN_S
    try:
        enforcer.guarantee(draining(enforcer.bands))
        while enforcer.queued(HINTED) and time.monotonic() < until:
            time.sleep(LOOK_S)
    except (OSError, DatapathError) as e:
        log.warning("draining failed", device=enforcer.ifname, error=str(e))
