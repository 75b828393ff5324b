# SPDX-License-Identifier: Apache-2.0
"""The handles of mfsd's qdiscs, by which whoever comes later knows them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mfsd.datapath.tc import TC_H_ROOT

if TYPE_CHECKING:
    from mfsd.datapath.tc import TcObject

MAJOR: Final = 0x6D66
"""Major number of the root that the classifier names: "mf". Nobody's by chance: tc's users write small numbers and the
kernel hands out 0x8001 and up (net/sched/sch_api.c, qdisc_alloc_handle)."""
ROOT: Final = MAJOR << 16
SHAPER_MAJOR: Final = 0x6D67
"""Major number of a shaper above the bands (tbf or htb over prio)."""
CHILD_MAJOR: Final = 0x6D80
"""First major number of qdiscs inside the tree (drr of prio's bands)."""
LEAF_MAJORS: Final = range(0x1000, 0x6000)
"""Major numbers for the leaf queues that purges make: two per lane, taken in turns."""


def is_ours(thing: TcObject) -> bool:
    """True for a root qdisc that mfsd made."""
    return thing.parent == TC_H_ROOT and thing.handle >> 16 in (MAJOR, SHAPER_MAJOR)
