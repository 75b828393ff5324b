# SPDX-License-Identifier: Apache-2.0
"""The htb backend: strict bands with floors and lanes, paced at a configured rate (net/sched/sch_htb.c).

Layout, for bands *b* in strict order::

    6d66:            root, default class = the default band
      6d66:1         the link: rate = ceil = the device's rate
        6d66:B001    a band of one lane: rate = its floor, prio = the band's (B = b + 1, hexadecimal)
        6d66:B000    a band of several lanes: rate = its floor
          6d66:B001..  its lanes: rate ~ 0, prio = the band's, served in turns by quantum

Why it is strict and yet has floors: htb_dequeue serves all classes that are inside their own ``rate`` first (leaves,
then inner classes), the others, which borrow from the link, strictly by ``prio``. A rate of 1 byte/s is the smallest
there is and stands for "no floor"; since debts are forgiven after a minute (mbuffer), such a leaf may send one packet
ahead of others per minute.

Unhinted traffic while the tree is being built: until the default class exists, htb lets unknown packets through its
direct queue, first in first out and unshaped, and empties that queue before any class, so their order is kept. The
default and control leaves keep the pfifo that htb makes with the class, because replacing a leaf frees its packets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mfsd.datapath import tc
from mfsd.datapath.formats import (
    HTB_GLOB,
    HTB_OPT,
    HTB_VERSION,
    TCA_HTB_CEIL64,
    TCA_HTB_INIT,
    TCA_HTB_PARMS,
    TCA_HTB_RATE64,
    ratespec,
    ticks,
    wide,
)
from mfsd.datapath.handles import MAJOR, ROOT
from mfsd.datapath.qdisc.tree import Group, Node, Tree, number_leaves
from mfsd.ground.bands import HTB_PRIOS, MAX_HTB_LEVELS, Bands, BandSpec, Role
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from mfsd.ground.units import Rate

LINK_MINOR: Final = 1
MAX_LANES: Final = 0xFFE
"""Minor numbers per band, less the inner class."""
NO_FLOOR: Final = 1
"""Bytes/s. htb refuses a rate of 0."""
_R2Q: Final = 10
"""rate2quantum, htb's default; without effect, since every quantum is explicit."""


def burst(rate: int, smallest: int) -> int:
    """Bucket size in bytes for a rate in bytes/s: 1 ms worth, but at most 1 MiB unless 100 us need more.

    What passes while the timer that wakes htb is late must have been saved up: hrtimers come some 10 us late, on a
    busy virtual machine up to a millisecond. At 1 Gbit/s this is 125 kB, at 400 Gbit/s 5 MB.
    """
    return max(smallest, min(rate // 1000, 1 << 20), rate // 10_000)


def turn(gso: int) -> int:
    """Bytes that a lane may send before the next one, for the largest packet.

    Fair only if it covers that packet and the headers counted for each of its segments (net/core/dev.c,
    qdisc_pkt_len_init): some 4 % at an MSS of 1448.
    """
    return gso + gso // 16


def build(bands: Bands, rate: Rate, *, gso: int = 65536) -> Tree:
    """The tree for bands at a rate. ``gso``: largest packet the stack may hand down, in bytes.

    Raises ValueError for more bands than htb has priorities, or more lanes than minor numbers.
    """
    if not fits(bands):
        raise ValueError(
            f"{len(bands.level_bands)} levels, but htb has {HTB_PRIOS} priorities: set bands.levels to at most "
            f"{MAX_HTB_LEVELS}, or use backend prio (up to 16 bands)"
        )
    wide = [b for b in bands.bands if b.lanes > MAX_LANES]
    if wide:
        raise ValueError(f"band {wide[0].name!r} has {wide[0].lanes} lanes, htb's layout has {MAX_LANES} at most")
    link = max(int(rate.bytes_per_s), NO_FLOOR)
    maker = _Maker(link, gso)
    default = _leaf(bands.default)
    groups = [
        Group(
            "Install htb at the root (the one graft), unknown packets to the default band",
            f"tc qdisc replace dev DEV root handle {MAJOR:x}: htb default {default & 0xFFFF:x} r2q {_R2Q}",
            (Node("htb", ROOT, tc.TC_H_ROOT, _root_options(default)),),
        ),
        maker.single("The link itself, which alone is paced", ROOT | LINK_MINOR, ROOT, link, 0),
    ]
    # The default band first: unhinted packets wait for nothing else.
    for band in sorted(bands.bands, key=lambda b: b.role is not Role.DEFAULT):
        groups += maker.band(band)
    return Tree(
        "htb",
        tuple(groups),
        number_leaves((b, _leaf(b), b.lanes) for b in bands.bands),
        {_leaf(b) + i: b.index for b in bands.bands for i in range(b.lanes)},
        guarantee=lambda guaranteed: [
            maker.rated(b, int(link * max(guaranteed.get(b.index, 0.0), b.floor))) for b in bands.bands
        ],
    )


def shaper(major: int, rate: int, gso: int) -> list[Group]:
    """Htb at the root with one class, ``major``:1, in which another qdisc is to stand, at ``rate`` bytes/s."""
    root, maker = major << 16, _Maker(rate, gso)
    return [
        Group(
            "Install htb at the root (the one graft), which paces the link",
            f"tc qdisc replace dev DEV root handle {major:x}: htb default {LINK_MINOR:x} r2q {_R2Q}",
            (Node("htb", root, tc.TC_H_ROOT, _root_options(root | LINK_MINOR)),),
        ),
        maker.single("The link itself", root | LINK_MINOR, root, rate, 0),
    ]


def fits(bands: Bands) -> bool:
    """Htb has a priority for every band."""
    return bands.bands[-1].prio < HTB_PRIOS


def _leaf(band: BandSpec) -> int:
    """Classid of lane 0."""
    return _inner(band) + 1


def _inner(band: BandSpec) -> int:
    return ROOT | (band.index + 1) << 12


def _root_options(default: int) -> bytes:
    return nl.attr(TCA_HTB_INIT, HTB_GLOB.pack(HTB_VERSION, _R2Q, default & 0xFFFF, 0, 0))


class _Maker:
    """Classes of one device: all have the link's ceiling and a quantum of one largest packet."""

    def __init__(self, link: int, gso: int) -> None:
        self.link = link
        self.quantum = turn(gso)
        self.ceil_burst = burst(link, gso)

    def burst(self, rate: int) -> int:
        return self.ceil_burst if rate == self.link else 1 if rate == NO_FLOOR else burst(rate, 4096)

    def options(self, rate: int, prio: int) -> bytes:
        times = ticks(self.burst(rate), rate), ticks(self.ceil_burst, self.link)
        parms = HTB_OPT.pack(ratespec(rate), ratespec(self.link), *times, self.quantum, 0, prio)
        return nl.attr(TCA_HTB_PARMS, parms) + wide(TCA_HTB_RATE64, rate) + wide(TCA_HTB_CEIL64, self.link)

    def command(self, classid: str, parent: int, rate: int, prio: int) -> str:
        return (
            f"tc class add dev DEV parent {tc.classid(parent)} classid {classid} htb rate {rate * 8}bit "
            f"ceil {self.link * 8}bit burst {self.burst(rate)} cburst {self.ceil_burst} prio {prio} "
            f"quantum {self.quantum}"
        )

    def node(self, classid: int, parent: int, rate: int, prio: int) -> Node:
        return Node("htb", classid, parent, self.options(rate, prio), "class", live=True)

    def single(self, text: str, classid: int, parent: int, rate: int, prio: int) -> Group:
        return Group(
            text,
            self.command(tc.classid(classid), parent, rate, prio),
            (self.node(classid, parent, rate, prio),),
        )

    def rated(self, band: BandSpec, rate: int) -> Node:
        """The class that holds a band's own rate, with another one."""
        where = _leaf(band) if band.lanes == 1 else _inner(band)
        return self.node(where, ROOT | LINK_MINOR, min(max(rate, NO_FLOOR), self.link), band.prio)

    def band(self, band: BandSpec) -> list[Group]:
        floor = max(int(self.link * band.floor), NO_FLOOR)
        share = f"floor {band.floor:.1%} of the link" if band.floor else "no floor"
        link = ROOT | LINK_MINOR
        if band.lanes == 1:
            return [self.single(f"Band {band.index} ({band.name}): {share}", _leaf(band), link, floor, band.prio)]
        inner, first = _inner(band), _leaf(band)
        lanes = tuple(self.node(first + i, inner, NO_FLOOR, band.prio) for i in range(band.lanes))
        start = first & 0xFFFF
        loop = f"for i in $(seq {start} {start + band.lanes - 1}); do {{}}; done"
        one = self.command(f'{MAJOR:x}:$(printf %x "$i")', inner, NO_FLOOR, band.prio)
        return [
            self.single(f"Band {band.index} ({band.name}): {share}", inner, link, floor, band.prio),
            Group(f"Its {band.lanes} lanes, served in turns", loop.format(one), lanes),
        ]
