# SPDX-License-Identifier: Apache-2.0
"""Bands at line rate with floors: weights instead of strict priorities (net/sched/sch_ets.c).

prio serves a band only when all above it are empty, and needs no rate for it; but then nothing below is ever sure of
anything. ets takes the same classids and filters, serves its first bands strictly and the others by deficit round
robin, so that each backlogged one gets at least its weight of the link, whatever the link's rate is. Control alone is
strict here. The weights of the others are their floors, or what is guaranteed to them, and what is left of the link
goes to them in their order, three quarters of it to the first, then three quarters of the rest: nearly strict.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from mfsd.datapath.formats import (
    TCA_ETS_NBANDS,
    TCA_ETS_NSTRICT,
    TCA_ETS_PRIOMAP,
    TCA_ETS_PRIOMAP_BAND,
    TCA_ETS_QUANTA,
    TCA_ETS_QUANTA_BAND,
)
from mfsd.datapath.handles import MAJOR, ROOT
from mfsd.datapath.qdisc.tree import Group, Node
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.ground.bands import Bands

STRICT: Final = 1
"""Bands that are served strictly: control, whose packets are tiny."""
ROUND: Final = 4
"""A round of deficit round robin serves so many of the largest packets: 2 ms at 1 Gbit/s. Who is owed less than a
packet per round saves up for some rounds."""
LEAST: Final = 256
"""Bytes of a quantum. Newer kernels, 6.12.117 and 7.3.4 among them, raise what is less to this."""
STEP: Final = 0.75
"""What a band gets of what no floor needs and no band before it has got."""


def shares(bands: Bands, guaranteed: Mapping[int, float]) -> list[float]:
    """Weights of the bands after STRICT, which add up to 1, given what is ``guaranteed`` by index (0..1)."""
    own = [max(guaranteed.get(b.index, 0.0), b.floor) for b in bands.bands[STRICT:]]
    scale = 1.0 / max(sum(own), 1.0)
    out = [share * scale for share in own]
    left = 1.0 - sum(out)
    for i in range(len(out)):
        part = left if i == len(out) - 1 else left * STEP
        out[i] += part
        left -= part
    return out


def _quanta(bands: Bands, guaranteed: Mapping[int, float], gso: int) -> list[int]:
    return [max(int(share * ROUND * gso), LEAST) for share in shares(bands, guaranteed)]


def root(bands: Bands, place: int, where: str, gso: int, priomap: Sequence[int]) -> Group:
    """The qdisc with its bands, and their weights as classes, which can be changed while traffic flows.

    ``place``: handle of its parent, ``where``: the same for tc; ``gso``: the largest packet, in bytes.
    """
    quanta = _quanta(bands, {}, gso)
    places = b"".join(nl.attr(TCA_ETS_PRIOMAP_BAND, bytes([band])) for band in priomap)
    options = (
        nl.attr(TCA_ETS_NBANDS, bytes([len(bands)]))
        + nl.attr(TCA_ETS_NSTRICT, bytes([STRICT]))
        + nl.attr(nl.NLA_NESTED | TCA_ETS_QUANTA, b"".join(_quantum(q) for q in quanta))
        + nl.attr(nl.NLA_NESTED | TCA_ETS_PRIOMAP, places)
    )
    default = bands.default
    text = ", ".join(f"{b.name} {share:.0%}" for b, share in zip(bands.bands[STRICT:], shares(bands, {}), strict=True))
    return Group(
        f"Install ets with {len(bands)} bands; unknown packets go to band {default.index} ({default.name}); control "
        f"first, the others by weight while they are backlogged: {text}",
        f"tc qdisc replace dev DEV {where} handle {MAJOR:x}: ets bands {len(bands)} strict {STRICT} "
        f"quanta {' '.join(map(str, quanta))} priomap {' '.join(map(str, priomap))}",
        (Node("ets", ROOT, place, options), *_classes(quanta)),
    )


def guarantee(bands: Bands, guaranteed: Mapping[int, float], gso: int) -> list[Node]:
    """The classes with the weights that bands have when so much of the link is guaranteed to some, by index (0..1)."""
    return _classes(_quanta(bands, guaranteed, gso))


def _classes(quanta: Sequence[int]) -> list[Node]:
    # ets makes its classes itself; they can be changed, not added.
    return [
        Node("ets", ROOT | (STRICT + i + 1), ROOT, _quantum(q), "class", live=True, made=True)
        for i, q in enumerate(quanta)
    ]


def _quantum(quantum: int) -> bytes:
    return nl.attr(TCA_ETS_QUANTA_BAND, struct.pack("=I", quantum))
