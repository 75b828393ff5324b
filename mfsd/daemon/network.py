# SPDX-License-Identifier: Apache-2.0
"""Connections that yield in the network, as the daemon has them (datapath/bpf/yielding.py, docs/network.md).

Which bands yield follows from the bands: the levels below the default band, and, below those, background and scavenger.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog

from mfsd.api.operations import Way
from mfsd.daemon import config_bands
from mfsd.daemon.waker import Waker
from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import address_of
from mfsd.datapath.bpf.yielding import Yielding
from mfsd.datapath.errors import LoaderError
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from mfsd.daemon.network_section import NetworkConfig
    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.engine.engine import Engine
    from mfsd.ground.bands import Bands
    from mfsd.ground.model import Address

UNIT: Final = 1024
"""Of struct mfsd_path's fractions (bpf/yield.h)."""
FLOORS_S: Final = 0.1
"""How often it is reckoned what connections may always send."""
UNKNOWN: Final = Rate.parse("1gbit")
"""For the rate of a host whose devices say none: by 0, connections would sleep for half an hour between two packets."""

log = structlog.get_logger(__name__)


def classes_of(bands: Bands) -> dict[int, int]:
    """What the bands that yield are to the kernel (enum mfsd_yield_class), by index."""
    first, second = config_bands.yielding(bands)
    return {b.index: _abi.YIELD_FIRST for b in first} | {b.index: _abi.YIELD_SECOND for b in second}


@dataclass(slots=True)
class Network:
    """The algorithm at work, or why it is not. Only ``beat`` is for the event loop; the rest may wait."""

    config: NetworkConfig
    bands: Bands
    problem: str = ""
    """Why nothing yields although it should, as far as it goes."""
    _yielding: Yielding | None = None
    _deaf: bool = True
    """Connections have to be looked at, once or again and again."""
    _next_floors: float = 0.0
    _waker: Waker | None = None
    _far: dict[Address, float] = field(default_factory=dict)
    """Rates of peers' links as the kernel has them, bytes/s."""
    _promotions: int = 0
    """Of which connections have been told."""

    @classmethod
    def start(cls, config: NetworkConfig, bands: Bands, classifier: Classifier, rate: float) -> Network:
        """Load and attach it where that is wanted. ``rate``: as ``care``'s. Raises LoaderError where it must be."""
        out = cls(config, bands)
        if config.mode == "off":
            return out
        try:
            out._yielding = Yielding(classifier)
        except LoaderError as e:
            if config.mode == "on":
                raise
            out.problem = f"deferred connections do not yield in the network: {e}"
            log.warning("network", problem=str(e))
            return out
        out._waker = Waker(out._yielding.wake)
        settings = out._yielding.settings
        settings["flags"] = _abi.YIELD_REPLACE if config.replace else 0
        out._follow(rate)  # before the first connection yields: over a restart nobody looks after devices for seconds
        for band, kind in classes_of(bands).items():
            settings["class_of"][0, band] = kind
        log.info("yielding in the network", algorithm=out._yielding.name)
        return out

    @property
    def algorithm(self) -> str:
        """Name of the congestion control; empty where nothing yields."""
        return "" if self._yielding is None else self._yielding.name

    @property
    def words(self) -> str:
        """For plans; empty where nothing yields."""
        if self._yielding is None:
            return ""
        rate = Rate(float(self._yielding.settings["rate"][0]))
        return config_bands.yielding_in_words(self.config, self.bands, rate)

    def care(self, rate: float) -> None:
        """Follow the devices' rate (bytes/s; 0: unknown), and look at connections that the kernel does not tell of."""
        if self._yielding is None:
            return
        self._follow(rate)
        if not self._deaf:
            return
        try:
            switched, deaf = self._yielding.adopt()
        except OSError as e:
            self.problem = f"connections older than the daemon do not yield in the network: {e}"
            return
        self._deaf = deaf > 0
        if switched:
            log.info("yielding", connections=switched)

    def _follow(self, rate: float) -> None:
        if self._yielding is None:
            return
        settings = self._yielding.settings
        target = self.config.target_s(Rate(rate) if rate else None)
        settings["rate"], settings["target_us"] = int(rate or UNKNOWN.bytes_per_s), int(target * 1e6)

    def beat(self, engine: Engine, now: float) -> None:
        """After a tick: wake who has been promoted, and say what connections may always send."""
        if self._yielding is None:
            return
        promotions = engine.books.counters.promotions
        if promotions != self._promotions and self._waker is not None:
            self._promotions = promotions
            self._waker.call()
        if now >= self._next_floors:
            self._next_floors = now + FLOORS_S
            self._give_floors(self._yielding, engine)
            self._tell_far(self._yielding, engine)

    def _tell_far(self, yielding: Yielding, engine: Engine) -> None:
        """Which peers' links are slower than ours. What is learnt may be a share of one: too long a queue."""
        peers = engine.connections.peers
        configured = peers.configured[: len(peers.rate)]
        slower = np.flatnonzero(configured & (peers.rate < float(yielding.settings["rate"][0]))).tolist()
        rates = {peers.address(index): float(peers.rate[index]) for index in slower[: _abi.FARS]}
        if rates == self._far:
            return
        for peer in self._far.keys() - rates.keys():
            yielding.tell_far(peer, 0.0, 0.0)
        for peer, rate in rates.items():
            if self._far.get(peer) != rate:
                yielding.tell_far(peer, rate, self.config.target_s(Rate(rate)))
        self._far = rates

    def _give_floors(self, yielding: Yielding, engine: Engine) -> None:
        """What each connection of a band may always send: an even part of what its band gets at least."""
        devices = engine.steering.devices
        row = max(range(len(devices)), key=lambda r: devices[r].estimator.configured)
        rate, shares = devices[row].estimator.configured, engine.steering.guarantees.shares(row)
        connections = engine.connections.by_band()[row]
        floor = yielding.settings["floor"][0]
        for band in classes_of(self.bands):
            share = shares.get(band, self.bands.bands[band].floor)
            floor[band] = int(share * rate / max(int(connections[band]), 1))

    def ways(self) -> list[Way]:
        """What is known of the ways to peers, by band."""
        if self._yielding is None:
            return []
        keys, paths = self._yielding.paths()
        return [_way(key, path, self.bands) for key, path in zip(keys, paths, strict=True)]

    def close(self) -> None:
        """Unload it. Idempotent."""
        if self._waker is not None:
            self._waker.close()
            self._waker = None
        if self._yielding is not None:
            with contextlib.suppress(OSError):
                self._yielding.wake()  # who sleeps goes back now, and not when its next packet is due
            self._yielding.close()
            self._yielding = None


def _way(key: Any, path: Any, bands: Bands) -> Way:
    band = int(key["band"])
    return Way(
        peer=str(address_of(key["peer"].tobytes())),
        band=bands.bands[band].name if band < len(bands) else str(band),
        connections=int(path["flows"]),
        queue_s=int(path["delay_us"]) / 1e6,
        target_s=int(path["target_us"]) / 1e6,
        window=int(path["share"]) * int(path["part"]) / UNIT / UNIT,
        queue_seconds_sum=int(path["delay_sum"]) / 1e6,
        samples=int(path["samples"]),
        steered_s=int(path["steered_us"]) / 1e6,
        yielded_s=int(path["yielded_us"]) / 1e6,
    )
