# SPDX-License-Identifier: Apache-2.0
"""Hosts, links, switch and daemons of a cluster.

The switch has an output queue per port, paced at the rate of the host behind it: receivers are bottlenecks as well as
senders. It knows nothing but the DSCP of a packet, in one of these settings:

    none      no queues at all: it forwards at the speed of memory, and hosts that only receive are not shaped
    fifo      one queue: what mfsd does on the hosts is all there is
    classes   three strict classes; which levels are in which is the policy's choice (Policy.classes), or the arm's
    levels    one strict class per band
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.daemon import config as configuration
from mfsd.daemon.config_bands import bands_of
from mfsd.ground.bands import Urgency
from mfsd.lab.hosts.governor import Governor
from mfsd.lab.hosts.net import RTO_MIN, RTO_MIN_US, SWITCH, Fabric, htb_shape, plain_link, remove_link, run_id, tool
from mfsd.policy.registry import make_policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.ground.units import Rate
    from mfsd.lab.arms import Arm
    from mfsd.lab.settings import Settings

QUEUE_S: Final = 0.05
"""Of a switch port and class, at its rate: a shallow one by LAN standards, several times what TCP needs."""
HIGH: Final = 46
"""DSCP of the first class (EF, RFC 3246)..."""
LOW: Final = 8
"""...and of the last (CS1, RFC 3662). Everything else, marked or not, is in the class between them."""
LEVELS_FROM: Final = 40
"""With a class per band: the DSCP of band b is this + b."""


class Network:
    """A cluster's hosts; ``govern`` puts them under an arm. A context manager: leaving removes everything.

    Raises LabError.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fabric = Fabric(settings.hosts, optional={RTO_MIN: str(RTO_MIN_US)})
        self.governors: dict[str, Governor] = {}
        self._stack = contextlib.ExitStack()
        self._state: tuple[Any, ...] = ()
        self._runs = 0
        self._plain = False

    def __enter__(self) -> Self:
        try:
            self._directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mfsd-")))
            self._stack.enter_context(self.fabric)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._dismiss()
        finally:
            self._stack.close()

    @property
    def targets(self) -> dict[str, str]:
        """Address of the daemon of each host; none when nothing governs."""
        return {name: g.target for name, g in self.governors.items()}

    def govern(self, arm: Arm, settings: Settings) -> None:
        """Put hosts and switch under an arm. Daemons that serve it already go on, with whatever they have learnt."""
        state = (*arm.daemon, settings.switch, settings.control_unhinted)
        if state == self._state:
            return
        self._dismiss()
        dscp = marks(arm, settings.switch)
        if arm.policy:
            self._start(arm, dscp, control_unhinted=settings.control_unhinted)
        else:
            for name in settings.shaped:
                plain_link(self.fabric.hosts[name], settings.rate_of(name))
            self._plain = True
        if settings.switch != "none":
            for name in settings.hosts:
                port(name, settings.rate_of(name), settings.switch, len(dscp))
        self._state = state

    def _start(self, arm: Arm, dscp: Mapping[str, int], *, control_unhinted: bool) -> None:
        self._runs += 1
        s, hosts = self.settings, self.fabric.hosts
        slowest = min((s.rate_of(name) for name in s.hosts), key=lambda rate: rate.bytes_per_s)
        target_ms = configuration.parse({}).network.target_s(slowest) * 1000
        tables = {
            "daemon": {"tick_ms": arm.tick_ms, "idle_tick_ms": max(100.0, arm.tick_ms)},
            "policy": {"name": arm.policy, **arm.params},
            "bands": {"levels": arm.levels, "dscp": dscp, "floors": list(arm.floors)},
            # The lab's sockets choose their congestion control, which need not be the machine's default; and receivers'
            # links may be slower than the senders', which the target must suit (docs/network.md).
            "network": {"yield": "on" if arm.yields else "off", "replace": True, "target_ms": target_ms},
            "peer": [{"network": hosts[name].address, "rate": s.decode_rate}
                     for name in s.hosts if arm.peers and name.startswith("d")],
        }  # fmt: skip
        directory = self._directory / str(self._runs)
        for name in s.shaped:
            device = {"control_unhinted": control_unhinted}
            self.governors[name] = Governor(hosts[name], directory, s.rate_of(name), tables, device)
            self.governors[name].launch()
        for governor in self.governors.values():
            governor.ready()

    def _dismiss(self) -> None:
        self._state = ()
        for governor in self.governors.values():
            governor.finish()
        for governor in self.governors.values():
            governor.stop()
        self.governors.clear()
        if self._plain:
            self._plain = False
            for name in self.settings.shaped:
                remove_link(self.fabric.hosts[name])


def marks(arm: Arm, switch: str) -> dict[str, int]:
    """DSCP by class or by band name, such that the switch can do what its setting says."""
    if not arm.policy or switch in {"none", "fifo"}:
        return {}
    policy = make_policy(arm.policy, arm.levels, arm.params)
    bands = bands_of(configuration.parse({"bands": {"levels": arm.levels}}), policy)
    if switch == "levels":
        return {b.name: LEVELS_FROM + b.index for b in bands.bands}
    if arm.classes is None:
        return {Urgency.URGENT: HIGH, Urgency.MIDDLE: 0, Urgency.LAST: LOW}
    first, second = arm.classes
    levels = {b.name: HIGH if i < first else 0 if i < second else LOW for i, b in enumerate(bands.level_bands)}
    last = {bands.background.name: LOW, bands.scavenger.name: LOW}
    return {bands.control.name: HIGH, **levels, bands.default.name: 0, **last}


def port(name: str, rate: Rate, switch: str, bands: int) -> None:
    """Give the switch's port to a host its queues, in place of those it had."""
    limit, shape = max(int(rate.bytes_per_s * QUEUE_S), 131_072), htb_shape(rate)
    if switch == "classes":
        classes, default = {HIGH: 0, LOW: 2}, 1
    elif switch == "levels":
        classes, default = {LEVELS_FROM + b: b for b in range(bands)}, bands
    else:
        classes, default = {}, 0
    namespace = f"mfsd-{run_id()}-{SWITCH}"
    lines = [f"qdisc replace dev {name} root handle 1: htb default {default + 2:x}"]
    if "htb" in tool("tc", "-n", namespace, "qdisc", "show", "dev", name):
        lines.insert(0, f"qdisc del dev {name} root")
    lines.append(f"class add dev {name} parent 1: classid 1:1 htb rate {int(rate.bits_per_s)}bit {shape}")
    for number in sorted({default, *classes.values()}):
        classid = f"1:{number + 2:x}"
        # All borrow from the link, in strict order; a guaranteed 8 bit/s is the least that htb has.
        lines.append(f"class add dev {name} parent 1:1 classid {classid} htb rate 8bit {shape} prio {min(number, 7)}")
        lines.append(f"qdisc add dev {name} parent {classid} handle {number + 16:x}: bfifo limit {limit}")
    lines += [
        f"filter add dev {name} parent 1: protocol ip prio 1 u32 match ip dsfield {dscp << 2:#x} 0xfc "
        f"flowid 1:{number + 2:x}"
        for dscp, number in classes.items()
    ]
    tool("tc", "-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")
