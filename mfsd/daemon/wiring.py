# SPDX-License-Identifier: Apache-2.0
"""Puts an engine together from a configuration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mfsd.daemon.config_bands import bands_of, policy_of
from mfsd.engine.connections import Connections
from mfsd.engine.engine import Engine
from mfsd.engine.slots import FlowTable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.daemon.config import Config, PeerConfig
    from mfsd.daemon.devices import Devices
    from mfsd.engine.sockets import Sockets
    from mfsd.ground.model import Address
    from mfsd.policy.base import Policy


def engine_of(
    config: Config,
    devices: Devices,
    policy: Policy,
    sockets: Sockets,
) -> Engine:
    """An engine over the devices' table."""
    connections = Connections(
        FlowTable(devices.rows),
        devices.keys,
        sockets,
        devices.bands,
        lambda: [d.ifindex for d in devices.all],
        far_rate_of(config.peer),
    )
    return Engine(
        connections,
        policy,
        devices.bands,
        devices.all,
        config.limits,
        config.rescue,
        config.tenants,
        mode=config.daemon.mode,
    )


def far_rate_of(peers: Sequence[PeerConfig]) -> Callable[[Address], float] | None:
    """Bytes/s of the link into a host: that of the narrowest network with its address; inf if there is none."""
    if not peers:
        return None
    narrow_first = sorted(peers, key=lambda p: -p.network.prefixlen)

    def far_rate(address: Address) -> float:
        return next((p.rate.bytes_per_s for p in narrow_first if address in p.network), math.inf)

    return far_rate


def change_policy(engine: Engine, config: Config) -> bool:
    """Change the policy of a running engine. False, with nothing changed, where that needs a restart.

    A policy that wants the default band elsewhere needs other qdiscs, which are installed once.
    """
    policy = policy_of(config)
    if bands_of(config, policy).default.index != engine.steering.bands.default.index:
        return False
    engine.steering.change_policy(policy)
    return True
