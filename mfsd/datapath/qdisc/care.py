# SPDX-License-Identifier: Apache-2.0
"""How a device's tree differs from the wanted one, filters included, and what else has changed about the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.datapath import tc
from mfsd.datapath.facts import QUEUE_LENGTH
from mfsd.datapath.handles import ROOT
from mfsd.datapath.qdisc import prio
from mfsd.datapath.qdisc.tree import Difference, How, differences

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.datapath.facts import DeviceFacts
    from mfsd.datapath.qdisc.tree import Tree
    from mfsd.ground.units import Rate


def off(sock: tc.TcSocket, ifindex: int, tree: Tree) -> list[Difference]:
    """Compare a device's tree and its filters with the wanted ones. Raises NetlinkError, OSError."""
    out = differences(tree, *sock.tree(ifindex))
    if any(d.how is How.REBUILD for d in out):
        return out
    for parent in dict.fromkeys([ROOT, *(want.parent for want in tree.filters)]):
        wanted = any(want.parent == parent for want in tree.filters)
        have = [f for f in sock.objects(tc.RTM_GETTFILTER, ifindex, parent) if f.handle]
        if any(not (wanted and prio.is_ours(f)) for f in have):
            out.insert(0, Difference(f"filters of {tc.classid(parent)} are not ours", How.REMOVE, filters=parent))
        elif wanted and not have:
            out.append(Difference(f"filter of {tc.classid(parent)} is missing", How.ADD))
    return out


def remarks(made: DeviceFacts, now: DeviceFacts, rate: Rate | None) -> list[str]:
    """What is not as it should be of a device whose tree is in place, and can't be helped.

    ``made``: what the tree was made for; ``rate``: the configured one.
    """
    out = []
    if not now.up:
        out.append("it is down")
    elif not now.carrier:
        out.append("it has no carrier: nothing leaves by it")
    if now.txqlen != (made.txqlen or QUEUE_LENGTH):
        out.append(f"its queue length was changed to {now.txqlen}; mfsd's queues keep theirs")
    if rate is None and now.speed is None and made.speed is not None:
        out.append("its link speed is unknown now; the bands keep the last rate")
    if rate is not None and now.speed is not None and not now.virtual and rate > now.speed:
        out.append(f"its link speed is {now.speed}, less than the configured rate {rate}: set device.rate")
    return out


def guaranteed(tree: Tree, shares: Mapping[int, float]) -> Tree:
    """The same tree with so much of the link (0..1) guaranteed to bands, by index."""
    return tree.with_nodes(tree.guarantee(shares)) if shares and tree.guarantee is not None else tree
