# SPDX-License-Identifier: Apache-2.0
"""What a cluster looks like, and which kind of work it gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from mfsd.lab.models import MODELS, Scaled
from mfsd.units import Rate


@dataclass(frozen=True, slots=True)
class Cluster:
    """Hosts, links and instances.

    Every instance has one GPU in each prefill host (``prefill`` ranks in all), and the instances share the hosts' NICs,
    the stores and the decode hosts. Links carry ``rate`` out of and into each host; those of decode hosts carry
    ``decode_rate``, so that receivers are bottlenecks too.
    """

    prefill: int = 4
    decode: int = 2
    stores: int = 2
    instances: int = 1
    rate: str = "200mbit"
    decode_rate: str = "100mbit"
    model: str = "mixtral-8x7b"
    steps: int = 8
    """A forward pass is emulated in so many groups of layers."""
    max_batch: int = 8192
    """New tokens that an instance takes into a forward pass, unless one request alone has more."""

    @property
    def scaled(self) -> Scaled:
        """Sizes and times."""
        return Scaled(MODELS[self.model], Rate.parse(self.rate), self.prefill, self.steps)

    @property
    def hosts(self) -> list[str]:
        """Names, prefill first."""
        return [f"{role}{i}" for role, n in (("p", self.prefill), ("d", self.decode), ("s", self.stores))
                for i in range(n)]  # fmt: skip

    @property
    def links(self) -> tuple[str, ...]:
        """Clusters with the same value can be run on the same hosts."""
        return self.rate, self.decode_rate, *self.hosts

    def rate_of(self, host: str) -> Rate:
        """Of its link, either way."""
        return Rate.parse(self.decode_rate if host.startswith("d") else self.rate)


@dataclass(frozen=True, slots=True)
class Regime:
    """A cluster and the shape of its work. ``loads``: offered to the busiest link, as shares of its rate."""

    name: str
    title: str
    cluster: Cluster
    trace: str = "mooncake"
    hot: float = 0.0
    """Share of the requests that go to the first decode host whatever happens; the rest are spread evenly."""
    reuse: float = 0.0
    """Prompts have at least this share of their tokens in the stores; 0: as in the trace."""
    loads: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0)


_BASE: Final = Cluster()
MEAN_OF: Final = ("one", "several", "hot", "reuse")
"""Regimes over which means are taken. In "even" the prefill links carry mostly collectives, which no order shortens."""
REGIMES: Final[dict[str, Regime]] = {
    r.name: r
    for r in (
        Regime("one", "one instance", _BASE, loads=(0.3, 0.4, 0.5, 0.6)),
        Regime(
            "several",
            "four instances, slow decode NICs",
            dataclasses.replace(_BASE, instances=4, decode_rate="50mbit"),
            loads=(0.85, 1.0, 1.15, 1.25),
        ),
        Regime(
            "hot",
            "two instances, a hot decode host",
            dataclasses.replace(_BASE, instances=2),
            hot=0.6,
            loads=(0.8, 0.9, 1.0, 1.1),
        ),
        Regime(
            "reuse",
            "two instances, much reuse",
            dataclasses.replace(_BASE, instances=2),
            reuse=0.7,
            loads=(0.65, 0.75, 0.85, 0.95),
        ),
        Regime("even", "four instances, links bound by collectives", dataclasses.replace(_BASE, instances=4)),
    )
}
