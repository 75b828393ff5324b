# SPDX-License-Identifier: Apache-2.0
"""Puts an engine together from a configuration, and changes a running one where it can be changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mfsd.bands import LEVEL_NEW, Bands, Ladder
from mfsd.engine.connections import Connections
from mfsd.engine.engine import Engine
from mfsd.engine.rescue import Rescuer
from mfsd.engine.slots import FlowTable
from mfsd.engine.steering import Steering
from mfsd.host.routes import RouteLookup
from mfsd.policy.registry import make_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.daemon.config import Config, PeerConfig
    from mfsd.daemon.devices import Devices, GuardedPort
    from mfsd.engine.connections import Resolver
    from mfsd.model import Address, Endpoints
    from mfsd.policy.base import Policy

RELOADABLE: Final = frozenset(
    {
        "daemon.mode",
        "daemon.tick_ms",
        "daemon.idle_tick_ms",
        "daemon.heartbeat_ms",
        "daemon.heartbeat_timeout_ms",
        "daemon.on_exit",
        "daemon.log_format",
        "daemon.log_level",
        "device.overwrite_foreign",
        "device.control_unhinted",
        "device.tiny_len",
        "bands.dscp",
    }
)
"""Keys that a running daemon can change, besides the sections below."""
RELOADABLE_SECTIONS: Final = frozenset({"policy", "limits", "rescue"})


def bands_of(config: Config, policy: Policy) -> Bands:
    """The bands that a configuration asks for, with the default band where the policy wants it. Raises ValueError."""
    plan = _bands(config, default_after=0)
    # A policy with more levels than there are bands counts in its own levels; the ladder says where those end.
    steps = Ladder(plan, policy.levels).band_of.tolist()
    return _bands(config, default_after=len(set(steps[: policy.default_after])))


def _bands(config: Config, default_after: int) -> Bands:
    b = config.bands
    return Bands.build(
        b.levels,
        default_after=default_after,
        lanes=b.lanes,
        control_floor=b.control_floor,
        default_floor=b.default_floor,
        level_floors=b.floors,
        scavenger_floor=b.scavenger_floor,
    )


def policy_of(config: Config) -> Policy:
    """The configured policy. Raises ValueError naming the parameter."""
    return make_policy(config.policy.name, config.bands.levels, config.policy.params)


def engine_of(
    config: Config,
    devices: Devices,
    policy: Policy,
    resolver: Resolver,
    watch: Callable[[int, Callable[[], None]], bool],
    unwatch: Callable[[int], None],
) -> Engine:
    """An engine over the devices' table."""
    bands, ports = devices.bands, devices.ports
    connections = Connections(
        FlowTable(devices.rows), devices.keys, resolver, bands, port_of(ports), far_rate_of(config.peer)
    )
    rescuer = Rescuer(ports, connections, bands, config.rescue)
    steering = Steering(connections, policy, bands, ports, rescuer)
    return Engine(connections, steering, config.limits, mode=config.daemon.mode, watch=watch, unwatch=unwatch)


def port_of(ports: Sequence[GuardedPort]) -> Callable[[Endpoints | None], int]:
    """Which device carries a connection. With one device there is no question; with several, the route decides."""
    if len(ports) < 2:
        return lambda _endpoints: 0
    return RouteLookup(ports)


def far_rate_of(peers: Sequence[PeerConfig]) -> Callable[[Address], float] | None:
    """Bytes/s of the link into a host: that of the narrowest network with its address; inf if there is none."""
    if not peers:
        return None
    narrow_first = sorted(peers, key=lambda p: -p.network.prefixlen)

    def far_rate(address: Address) -> float:
        return next((p.rate.bytes_per_s for p in narrow_first if address in p.network), math.inf)

    return far_rate


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys whose values differ between two configurations."""

    now: tuple[str, ...]
    """Can be changed in a running daemon."""
    restart: tuple[str, ...]
    """Need a restart."""


def changes(old: Config, new: Config) -> Changes:
    """Compare two configurations key by key."""
    now: list[str] = []
    restart: list[str] = []
    for section in type(old).model_fields:
        a, b = getattr(old, section), getattr(new, section)
        if a == b:
            continue
        if section == "peer":
            restart.append(section)
            continue
        if section == "device":
            _device_changes(old, new, now, restart)
            continue
        keys = a.model_dump() | b.model_dump()
        for key in keys:
            if getattr(a, key, None) != getattr(b, key, None):
                name = f"{section}.{key}"
                (now if section in RELOADABLE_SECTIONS or name in RELOADABLE else restart).append(name)
    return Changes(tuple(now), tuple(restart))


def _device_changes(old: Config, new: Config, now: list[str], restart: list[str]) -> None:
    if [d.name for d in old.device] != [d.name for d in new.device]:
        restart.append("device")
        return
    for i, (a, b) in enumerate(zip(old.device, new.device, strict=True)):
        for key in type(a).model_fields:
            if getattr(a, key) != getattr(b, key):
                (now if f"device.{key}" in RELOADABLE else restart).append(f"device[{i}].{key}")


def merge(old: Config, new: Config) -> Config:
    """The configuration in force after a reload: ``new`` where a running daemon can change it, else ``old``."""
    update: dict[str, object] = {name: getattr(new, name) for name in RELOADABLE_SECTIONS}
    for section in ("daemon", "bands"):
        a, b = getattr(old, section), getattr(new, section)
        keys = [k for k in type(a).model_fields if f"{section}.{k}" in RELOADABLE]
        update[section] = a.model_copy(update={k: getattr(b, k) for k in keys})
    if [d.name for d in old.device] == [d.name for d in new.device]:
        keys = [k for k in type(old.device[0]).model_fields if f"device.{k}" in RELOADABLE] if old.device else []
        update["device"] = tuple(
            a.model_copy(update={k: getattr(b, k) for k in keys}) for a, b in zip(old.device, new.device, strict=True)
        )
    return old.model_copy(update=update)


def change_policy(engine: Engine, config: Config) -> bool:
    """Change the policy of a running engine. False, with nothing changed, where that needs a restart.

    A policy that wants the default band elsewhere needs other qdiscs, which are installed once.
    """
    policy = policy_of(config)
    if bands_of(config, policy).default.index != engine.steering.bands.default.index:
        return False
    engine.steering.set_policy(policy)
    # Levels of another policy mean nothing to this one, and most policies only ever raise them.
    engine.transfers.live("level")[:] = LEVEL_NEW
    engine.requests.live("pruned")[:] = False
    engine.arrange_wanted = True
    return True
