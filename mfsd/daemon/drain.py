# SPDX-License-Identifier: Apache-2.0
"""Before qdiscs go, or nobody steers any more: what is queued in the bands of hinted traffic is let out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import structlog

from mfsd.bands import HINTED
from mfsd.datapath.errors import DatapathError
from mfsd.engine.guarantees import draining

if TYPE_CHECKING:
    from mfsd.bands import Bands
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer

DRAIN_S: Final = 0.25
"""How long that may take."""
DRAIN_LOOK_S: Final = 0.005

log = structlog.get_logger(__name__)


def drain(enforcer: DeviceEnforcer, bands: Bands) -> None:
    """A deferred connection must not stay behind in a lane: with the tree its packets go, or they wait for long."""
    until = time.monotonic() + DRAIN_S
    try:
        enforcer.guarantee(draining(bands))
        while enforcer.queued(HINTED) and time.monotonic() < until:
            time.sleep(DRAIN_LOOK_S)
    except (OSError, DatapathError) as e:
        log.warning("draining failed", device=enforcer.ifname, error=str(e))
