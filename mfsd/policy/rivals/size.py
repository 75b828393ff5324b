# SPDX-License-Identifier: Apache-2.0
"""Rivals that look at sizes only: SJF, SRPT and PIAS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mfsd.ground import units
from mfsd.policy.base import Policy, place
from mfsd.policy.parts import buckets
from mfsd.policy.parts.params import option

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I2, Explanation, TransferView, Views

KEYS: Final = {"sjf": "size", "srpt": "left", "pias": "sent"}
MEANING: Final = {"size": "bytes in all", "left": "bytes left", "sent": "bytes sent"}


def size_edges(view: Views, classes: int, low_kb: float, high_kb: float) -> tuple[float, ...]:
    """Upper edges of all but the last of some size classes, bytes, ascending; see ``BySize``."""
    if low_kb:
        return buckets.span(classes, low_kb * 1024, high_kb * 1024)
    return buckets.quantiles(view.sizes if len(view.sizes) else view.transfers.size, classes)


@dataclass(frozen=True, kw_only=True)
class BySize(Policy):
    """Few bytes first, whatever the stage. One class, three rivals.

    ``sjf``: by the transfer's whole size, fixed at its creation (baseline "SJF" of the MFS paper, section 6).
    ``srpt``: by what is left of it, recomputed at every evaluation (pFabric: Alizadeh et al., SIGCOMM 2013).
    ``pias``: by what has been sent, so that sizes need not be known: a transfer starts on top and is demoted at
    thresholds (PIAS: Bai et al., NSDI 2015). It is the only policy that lowers levels as it serves.

    Approximated with bands: the order is that of ``levels`` size classes, fair inside one. Their edges are quantiles of
    the sizes seen lately, so that each class has as many transfers; with ``low_kb`` they are geometric, up to
    ``high_kb``, whatever is seen. PIAS optimises its thresholds for the distribution of sizes; here they are the same
    quantiles. pFabric's switches dequeue by exact remaining size; ``exact`` (sjf, srpt) does so with one level per
    distinct size, for simulation.

    Collectives are transfers like all others: announced, they count with their bytes. Bytes of which only the stage is
    known (a static mark) have no size. By ``sjf`` and ``srpt`` they are in the middle, as half of all sizes are
    smaller, just above unhinted traffic; by ``pias`` last, as such connections go on sending.
    """

    levels: int = 8
    low_kb: float = option(0.0, "upper edge of the first size class; 0: classes by the sizes seen", low=0.0)
    high_kb: float = option(0.0, "lower edge of the last size class, if low_kb is given", low=0.0, at_least="low_kb")
    exact: bool = option(default=False, doc="one level per distinct size: simulation only")

    @property
    def _key(self) -> str:
        return KEYS[self.name]

    def _edges(self, view: Views) -> tuple[float, ...]:
        return size_edges(view, self.levels, self.low_kb, self.high_kb)

    @property
    def default_after(self) -> int:
        """Unhinted traffic stands in the middle: above the large transfers, below the small ones."""
        return (self.levels + 1) // 2

    def _bytes(self, transfers: TransferView) -> F8:
        if self._key == "sent":
            return transfers.size - transfers.left
        return transfers.left if self._key == "left" else transfers.size

    def _level(self, view: Views) -> I2:
        keys = self._bytes(view.transfers)
        return buckets.dense_rank(keys, self.levels) if self.exact else buckets.among(keys, self._edges(view))

    def unannounced(self) -> I2:
        """In the middle, or last."""
        level = self.levels - 1 if self._key == "sent" else (self.levels - 1) // 2
        return self.by_stage(kv_reuse=level, collective=level, p2d=level)

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        value, edges = float(self._bytes(view.transfers)[row]), self._edges(view)
        lower = units.size(edges[level - 1]) if 0 < level <= len(edges) else units.size(0)
        upper = f"below {units.size(edges[level])}" if level < len(edges) else "up"
        span = "the rank of its size" if self.exact else f"for {lower} and {upper}"
        out.reasons.append(f"It has {units.size(value)} ({MEANING[self._key]}): {place(level)} is {span}.")
        if self._key == "left" and level and not self.exact:
            out.figures["threshold"] = edges[level - 1]
            out.reasons.append(f"It is promoted when less than {lower} is left.")
        elif self._key == "sent" and level < len(edges):
            out.figures["threshold"] = edges[level]
            out.reasons.append(f"It is demoted when {units.size(edges[level])} have been sent.")
        elif self._key == "size":
            out.reasons.append("Nothing promotes it.")
