# SPDX-License-Identifier: Apache-2.0
"""Purge: free a promoted connection's packets from the starved queue that they sit in.

Two GSO segments of a starved TCP connection stay in its old lane, and while they do, TCP sends nothing more
(tcp_small_queue_check) and repeats nothing (skb_still_in_host_queue, net/ipv4/tcp_output.c). Grafting a fresh leaf onto
the lane's class frees the old one with its packets, and TCP goes on at once, in the new level.

The message is RTM_NEWQDISC with CREATE, REPLACE and EXCL and an explicit handle that the device does not have: that
grafts (net/sched/sch_api.c, __tc_modify_qdisc). Without a handle, newer kernels (6.18 for one) take the
request for a change of the queue that is there and answer EEXIST or do nothing. So every lane owns two handles and
takes them in turns.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mfsd.datapath import tc
from mfsd.datapath.handles import LEAF_MAJORS
from mfsd.datapath.qdisc.tree import PURGEABLE
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.datapath.qdisc.tree import BandQueues, Tree

_ADDED: Final = nl.NLM_CREATE | nl.NLM_REPLACE | nl.NLM_EXCL
_RETRY: Final = frozenset({errno.EEXIST, errno.EINVAL})


class Purged(NamedTuple):
    """What was freed in a lane. Counted right before the purge, so up to one packet per CPU may be missing."""

    band: int
    lane: int
    bytes: int
    packets: int


@dataclass(slots=True)
class _Lane:
    band: int
    lane: int
    classid: int
    query: bytes
    purges: tuple[bytes, bytes]
    turn: int = 0


class LanePurger:
    """Prebuilt messages of every lane that may be purged. Not thread-safe by itself; the enforcer's lock is above.

    ``gone`` (band index -> bytes, packets, drops) holds what purged leaves had counted, on backends whose counters
    belong to the leaf.
    """

    def __init__(self, sock: tc.TcSocket, ifindex: int, tree: Tree, limit: int) -> None:
        """``limit``: packets in a queue, as in those that a purge replaces."""
        self._sock = sock
        self._reader = tc.StatsReader()
        self._tree = tree
        self._lanes = {
            (band.spec.index, lane): _lane(ifindex, band, lane, limit)
            for band in tree.bands
            if band.spec.role in PURGEABLE
            for lane in range(band.lanes)
        }
        self.gone: dict[int, tuple[int, int, int]] = {}

    def sync(self, classes: Iterable[tc.TcObject]) -> None:
        """Learn from a class dump which of its two handles each lane's leaf has now."""
        leaf = {c.handle: c.info for c in classes}
        for lane in self._lanes.values():
            now = leaf.get(lane.classid, 0) >> 16
            lane.turn = 1 if now and now % 2 == 0 else 0

    def purge(self, lanes: Sequence[tuple[int, int]]) -> list[Purged]:
        """Purge (band, lane) pairs.

        Raises ValueError for a lane that must not be purged, before purging any; NetlinkError when the kernel refuses
        one, which stops none of the others.
        """
        return self._purge([self._find(band, lane) for band, lane in dict.fromkeys(lanes)])

    def _find(self, band: int, lane: int) -> _Lane:
        found = self._lanes.get((band, lane))
        if found is None:
            name = self._tree.queues(band, lane).spec.name
            raise ValueError(f"band {band} ({name}) carries unhinted or control traffic: never purged")
        return found

    def _purge(self, lanes: list[_Lane], *, again: bool = True) -> list[Purged]:
        answers = self._sock.batch([part for lane in lanes for part in (lane.query, lane.purges[lane.turn])])
        out: list[Purged] = []
        refused: list[_Lane] = []
        refusal: nl.NetlinkError | None = None
        for lane, held, done in zip(lanes, answers[::2], answers[1::2], strict=True):
            if held.kind == nl.NLMSG_ERROR:
                refusal = refusal or nl.NetlinkError(held.code, f"look at lane {tc.classid(lane.classid)}", held.note)
                continue
            if done.code in _RETRY and again:
                lane.turn ^= 1
                refused.append(lane)
                continue
            if done.code:
                refusal = refusal or nl.NetlinkError(done.code, f"purge lane {tc.classid(lane.classid)}", done.note)
                continue
            lane.turn ^= 1
            before = self._reader.read(held)
            out.append(Purged(lane.band, lane.lane, before.backlog_bytes, before.backlog_packets))
            if self._tree.counters_reset and self._tree.bands[lane.band].lanes == 1:
                b, p, d = self.gone.get(lane.band, (0, 0, 0))
                self.gone[lane.band] = b + before.bytes, p + before.packets, d + before.drops
        # Somebody else gave the lane the handle whose turn it was: the other one is free.
        if refused:
            out += self._purge(refused, again=False)
        if refusal is not None:
            raise refusal
        return out


def _lane(ifindex: int, band: BandQueues, lane: int, limit: int) -> _Lane:
    classid = band.classid + lane
    # Without a limit it would be as long as the device's transmit queue, which somebody may have set to 0 meanwhile:
    # such a queue takes nothing.
    body = tc.kind_attr("pfifo") + nl.attr(tc.TCA_OPTIONS, struct.pack("=I", limit))
    first = LEAF_MAJORS.start + 2 * (band.first_leaf + lane)
    purges = [
        tc.message(tc.RTM_NEWQDISC, _ADDED, ifindex, (first + turn) << 16, classid, body=body) for turn in range(2)
    ]
    query = tc.query(tc.RTM_GETTCLASS, ifindex, classid)
    return _Lane(band.spec.index, lane, classid, query, (purges[0], purges[1]))
