# SPDX-License-Identifier: Apache-2.0
"""Rivals that look at sizes only: SJF, SRPT and PIAS."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from mfsd import units
from mfsd.policy.base import Policy, place
from mfsd.policy.parts import buckets
from mfsd.policy.parts.params import option

if TYPE_CHECKING:
    from mfsd.policy.views import F8, I2, Explanation, TransferView, Views

KEYS: Final = {"sjf": "size", "srpt": "left", "pias": "sent"}
MEANING: Final = {"size": "bytes in all", "left": "bytes left", "sent": "bytes sent"}


@dataclass(frozen=True, kw_only=True)
class BySize(Policy):
    """Few bytes first, whatever the stage. One class, three rivals.

    ``sjf``: by the transfer's whole size, fixed at its creation (baseline "SJF" of the MFS paper, section 6).
    ``srpt``: by what is left of it, recomputed at every evaluation (pFabric: Alizadeh et al., SIGCOMM 2013).
    ``pias``: by what has been sent, so that sizes need not be known: a transfer starts on top and is demoted at
    thresholds (PIAS: Bai et al., NSDI 2015). It is the only policy that lowers levels as it serves.

    Approximated with bands: the order is that of ``levels`` geometric size classes from ``low_kb`` to ``high_kb``, fair
    inside one. PIAS computes its thresholds from the size distribution; here they are geometric. pFabric's switches
    dequeue by exact remaining size; ``exact`` (sjf, srpt) does so with one level per distinct size, for simulation.
    """

    levels: int = 8
    low_kb: float = option(64.0, "upper edge of the first size class", low=1e-6)
    high_kb: float = option(262144.0, "lower edge of the last size class", low=1e-6, at_least="low_kb")
    exact: bool = option(default=False, doc="one level per distinct size: simulation only")

    @property
    def _key(self) -> str:
        return KEYS[self.name]

    @cached_property
    def _edges(self) -> tuple[float, ...]:
        return buckets.span(self.levels, self.low_kb * 1024, self.high_kb * 1024)

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
        return buckets.dense_rank(keys, self.levels) if self.exact else buckets.bucket(keys, self._edges)

    def _reasons(self, out: Explanation, row: int, level: int, view: Views) -> None:
        value = float(self._bytes(view.transfers)[row])
        lower = units.size(self._edges[level - 1]) if 0 < level <= len(self._edges) else units.size(0)
        upper = f"below {units.size(self._edges[level])}" if level < len(self._edges) else "up"
        span = "the rank of its size" if self.exact else f"for {lower} and {upper}"
        out.reasons.append(f"It has {units.size(value)} ({MEANING[self._key]}): {place(level)} is {span}.")
        if self._key == "left" and level and not self.exact:
            out.figures["threshold"] = self._edges[level - 1]
            out.reasons.append(f"It is promoted when less than {lower} is left.")
        elif self._key == "sent" and level < len(self._edges):
            out.figures["threshold"] = self._edges[level]
            out.reasons.append(f"It is demoted when {units.size(self._edges[level])} have been sent.")
        elif self._key == "size":
            out.reasons.append("Nothing promotes it.")
