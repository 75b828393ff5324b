# SPDX-License-Identifier: Apache-2.0
"""What the classes of a device have counted, added up per band."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.datapath import tc
from mfsd.datapath.handles import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.datapath.qdisc.tree import Tree

BAND_DTYPE: Final = np.dtype(
    [("bytes", "u8"), ("packets", "u8"), ("drops", "u8"), ("backlog_bytes", "u8"), ("backlog_packets", "u8")]
)
"""Counters of one band. ``bytes`` and ``packets`` have left it; ``drops`` found it full (on prio, purged ones too)."""


def by_band(
    sock: tc.TcSocket, reader: tc.StatsReader, ifindex: int, tree: Tree, gone: Mapping[int, Sequence[int]]
) -> np.ndarray[Any, np.dtype[Any]]:
    """Shape (bands,), dtype BAND_DTYPE: one dump of the classes, and what classes that were replaced had counted."""
    rows = [[0] * 5 for _ in tree.bands]
    for m in sock.parts(tc.RTM_GETTCLASS, ifindex, ROOT):
        band = tree.counter_classes.get(tc.TCMSG.unpack_from(m.data, m.body)[4])
        if band is None:
            continue
        s = reader.read(m)
        row = rows[band]
        row[0] += s.bytes
        row[1] += s.packets
        row[2] += s.drops
        row[3] += s.backlog_bytes
        row[4] += s.backlog_packets
    for band, counts in gone.items():
        for i, value in enumerate(counts):
            rows[band][i] += value
    return np.array([tuple(row) for row in rows], dtype=BAND_DTYPE)
