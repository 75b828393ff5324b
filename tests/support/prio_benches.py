# SPDX-License-Identifier: Apache-2.0
"""The bench of tests/enforce, for prio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from support.benches import Bench, plan
from support.waiting import wait_for

if TYPE_CHECKING:
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
    from support.namespaces import NetnsPair

CONTROL, LEVEL0, LEVEL1, DEFAULT, LEVEL2, LEVEL3, BACKGROUND, SCAVENGER = range(8)
BUCKET: Final = 65536
"""Bytes that pass at once on an idle shaper of ours, at least; see prio.build."""


@dataclass
class PrioBench(Bench):
    """Sends from one namespace to the other over a veth pair."""

    weights: bool = False
    """Bands have weights (ets)."""

    def applied(self, rate: str | None, lanes: int) -> DeviceEnforcer:
        """Prio in force, bare (no rate) or under tbf."""
        e = self.enforcer(rate, "prio", plan(lanes=lanes))
        e.apply()
        assert e.verify() == []
        return e

    def freeze(self, e: DeviceEnforcer) -> None:
        """Empty the bucket and keep level 0 busy for many seconds: what is queued below it stands still."""
        assert not self.weights
        self.send(e.band_maps()[LEVEL0][0], 300)
        wait_for(lambda: e.link_bytes()[0] >= BUCKET)


def fixed_neighbours(pair: NetnsPair) -> None:
    """Neighbour discovery would count as default traffic."""
    ends = ((pair.a, pair.dev_a, pair.addr_a), (pair.b, pair.dev_b, pair.addr_b))
    for (name, dev, _), (far, far_dev, address) in (ends, ends[::-1]):
        mac = pair.run(far, f"cat /sys/class/net/{far_dev}/address").strip()
        pair.run(name, f"ip neigh replace {address} lladdr {mac} dev {dev} nud permanent")
        pair.run(name, f"sysctl -qw net.ipv6.conf.{dev}.disable_ipv6=1")
