# SPDX-License-Identifier: Apache-2.0
"""The prio backend: bands at line rate, or under a shaper when a rate is given (net/sched/sch_prio.c, sch_drr.c).

Layout, for bands *b* in strict order::

    6d67:          tbf or htb, only with a rate
      6d66:        ets where the kernel has it, else prio; N bands; whatever names no band goes to the default band
        6d66:b+1   a band of one lane: the pfifo that ets or prio makes
        6d66:b+1   a band of several lanes: drr 6d80+b:
          6d80+b:1..  its lanes, served in turns by quantum

A lane is named by drr's own major number, which prio does not know: prio takes a priority of its own major as a band
and asks its filters about any other. So a cls_bpf filter of a few instructions sits on prio and maps drr's major
numbers to bands; drr then finds the class by the same skb->priority, without a filter. A second one on each drr
catches what names the band but no lane, because drr drops what it can't classify.

The shaper of prio with lanes is an htb of one class, not tbf. tbf looks at the next packet before it may send it, and
drr, when it is asked for that, takes the packet out of its lane (qdisc_peek_dequeued). With strict bands it stays out
there as soon as a band above has something, for as long as that is busy: no purge finds it, and the connection whose
next packet it is neither repeats it nor goes on (skb_still_in_host_queue), rescued or not. htb and devices take without
looking. ets looks, too, but its bands are all served by and by.

ets (ets.py) classifies as prio does, and gives every band its floor. Under prio there are none, and whatever stands
below a busy band waits. Counters of a band of one lane belong to its leaf, so a rescue starts them anew; Tree says so.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from mfsd.datapath import formats, tc
from mfsd.datapath.bpf import syscall
from mfsd.datapath.formats import TBF_QOPT, U32_MAX, ratespec, ticks
from mfsd.datapath.handles import CHILD_MAJOR, MAJOR, ROOT, SHAPER_MAJOR
from mfsd.datapath.qdisc import ets, htb
from mfsd.datapath.qdisc.tree import Filter, Group, Node, Tree, number_leaves
from mfsd.ground.bands import PRIO_BANDS, Bands, BandSpec
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.ground.units import Rate

_PRIOMAP: Final = 16
"""TC_PRIO_MAX + 1: priorities that prio maps to bands."""
_FILTER_HANDLE: Final = 1
_NAME: Final = "mfsd_lanes"
_PRIORITY: Final = 32
"""Offset of struct __sk_buff.priority, include/uapi/linux/bpf.h."""
_NO_RATE: Final = b"\0" * 12


def build(bands: Bands, rate: Rate | None, *, lanes: bool, weights: bool, gso: int = 65536, limit: int = 1000) -> Tree:
    """The tree for bands. ``limit``: the device's queue length, in packets.

    ``lanes`` False: one queue per band. ``weights``: ets, with floors, in place of prio.

    Raises ValueError for more bands than either has.
    """
    if len(bands) > PRIO_BANDS:
        raise ValueError(f"{len(bands)} bands, but prio has at most {PRIO_BANDS}: set bands.levels lower")
    groups: list[Group] = []
    split = [b for b in bands.bands if lanes and b.lanes > 1]
    if rate is not None:
        bytes_per_s = int(rate.bytes_per_s)
        takes = split and not weights
        groups += htb.shaper(SHAPER_MAJOR, bytes_per_s, gso) if takes else [_tbf(bytes_per_s, gso, limit)]
    place = SHAPER_MAJOR << 16 | 1 if rate is not None else tc.TC_H_ROOT
    where = f"parent {tc.classid(place)}" if rate is not None else "root"
    default = bands.default.index
    priomap = [default] * _PRIOMAP
    groups.append(ets.root(bands, place, where, gso, priomap) if weights else _prio(bands, place, where, priomap))
    for band in split:
        groups += _drr(band, gso)
    if split:
        pairs = tuple((_drr_major(b), ROOT | (b.index + 1)) for b in split)
        text = "Lead packets that name a lane to its band (cls_bpf)"
        groups.append(Group(text, _FILTER_TEXT, (), (Filter(ROOT, pairs, 0),)))
    queues = [
        (b, _drr_major(b) << 16 | 1, b.lanes) if b in split else (b, ROOT | (b.index + 1), 1) for b in bands.bands
    ]
    counters = {ROOT | (b.index + 1): b.index for b in bands.bands}
    return Tree(
        "prio",
        tuple(groups),
        number_leaves(queues),
        counters,
        counters_reset=True,
        guarantee=(lambda guaranteed: ets.guarantee(bands, guaranteed, gso)) if weights else None,
    )


def _prio(bands: Bands, place: int, where: str, priomap: Sequence[int]) -> Group:
    default = bands.default
    return Group(
        f"Install prio with {len(bands)} bands; unknown packets go to band {default.index} ({default.name})",
        f"tc qdisc replace dev DEV {where} handle {MAJOR:x}: prio bands {len(bands)} "
        f"priomap {' '.join(map(str, priomap))}",
        (Node("prio", ROOT, place, struct.pack("=i16B", len(bands), *priomap)),),
    )


_FILTER_TEXT: Final = "# tc filter add ... bpf: the program is generated, see mfsd/datapath/qdisc/prio.py"


def _drr_major(band: BandSpec) -> int:
    return CHILD_MAJOR + band.index


def _tbf(rate: int, gso: int, limit: int) -> Group:
    # tbf cuts packets larger than its bucket into segments (tbf_segment); two of the largest leave it alone.
    bucket = htb.burst(rate, 2 * gso)
    backlog = min(limit * gso, U32_MAX)
    parms = TBF_QOPT.pack(ratespec(rate), _NO_RATE, backlog, ticks(bucket, rate), 0)
    options = nl.attr(formats.TCA_TBF_PARMS, parms) + formats.wide(formats.TCA_TBF_RATE64, rate)
    return Group(
        "Install tbf at the root (the one graft), which paces the link",
        f"tc qdisc replace dev DEV root handle {SHAPER_MAJOR:x}: tbf rate {rate * 8}bit burst {bucket} limit {backlog}",
        (Node("tbf", SHAPER_MAJOR << 16, tc.TC_H_ROOT, options, live=True),),
    )


def _drr(band: BandSpec, gso: int) -> list[Group]:
    major, parent = _drr_major(band), ROOT | (band.index + 1)
    quantum = htb.turn(gso)
    options = nl.attr(formats.TCA_DRR_QUANTUM, struct.pack("=I", quantum))
    root = major << 16
    lanes = tuple(Node("drr", root | (i + 1), root, options, "class", live=True) for i in range(band.lanes))
    loop = (
        f"for i in $(seq 1 {band.lanes}); do tc class add dev DEV parent {major:x}: "
        f'classid {major:x}:$(printf %x "$i") drr quantum {quantum}; done'
    )
    return [
        Group(
            f"Band {band.index} ({band.name}): drr",
            f"tc qdisc add dev DEV parent {tc.classid(parent)} handle {major:x}: drr",
            (Node("drr", major << 16, parent, None),),
        ),
        Group(f"Its {band.lanes} lanes, served in turns", loop, lanes, (Filter(root, (), root | 1),)),
    ]


# --- the filter -------------------------------------------------------------------------------------------------------


def program(want: Filter) -> bytes:
    """BPF instructions: the class for the packet's major number, else ``otherwise``.

    A result other than 0 and -1 is the classid, 0 means no match (net/sched/cls_bpf.c, cls_bpf_classify).
    """
    out = [
        _insn(0x61, 1, _PRIORITY, 0),  # r0 = ctx->priority
        _insn(0x77, 0, 0, 16),  # r0 >>= 16
    ]
    for major, classid in want.classes:
        out += [_insn(0x55, 0, 2, major), _insn(0xB4, 0, 0, classid), _insn(0x95, 0, 0, 0)]
    out += [_insn(0xB4, 0, 0, want.otherwise), _insn(0x95, 0, 0, 0)]
    return b"".join(out)


def _insn(code: int, src: int, offset: int, value: int) -> bytes:
    """One struct bpf_insn; what it writes is r0."""
    signed = value - (1 << 32) if value > 0x7FFFFFFF else value
    return struct.pack("=BBhi", code, src << 4, offset, signed)


def load_program(want: Filter) -> int:
    """Load the filter's program and return its descriptor. Raises LoaderError."""
    return syscall.prog_load(syscall.SCHED_CLS, _NAME, program(want), "GPL")


def filter_message(want: Filter, ifindex: int, fd: int) -> bytes:
    """RTM_NEWTFILTER for a loaded program."""
    flags, options = nl.NLM_CREATE | nl.NLM_EXCL, tc.bpf_program(fd, _NAME)
    return tc.bpf_filter(tc.RTM_NEWTFILTER, flags, ifindex, _FILTER_HANDLE, want.parent, options)


def flush_message(ifindex: int, parent: int) -> bytes:
    """RTM_DELTFILTER for all filters of a qdisc."""
    return tc.message(tc.RTM_DELTFILTER, 0, ifindex, 0, parent)


def is_ours(found: tc.TcObject) -> bool:
    """A filter of such a message."""
    name = nl.attrs(found.options or b"").get(tc.TCA_BPF_NAME, b"") if found.kind == "bpf" else b""
    return name == f"{_NAME}\0".encode() and found.handle == _FILTER_HANDLE and found.info >> 16 == 1
