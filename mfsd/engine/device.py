# SPDX-License-Identifier: Apache-2.0
"""A shaped device as the engine sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.estimator import LinkEstimator, Reading


class Device(Protocol):
    """What the engine needs of a device (mfsd.daemon.device.Device). Nothing here raises: failures are the device's."""

    estimator: LinkEstimator

    @property
    def name(self) -> str:
        """Of the network device."""
        ...

    @property
    def enforced(self) -> bool:
        """Our qdiscs are on the device. False when it is only observed: nothing is ever stuck there."""
        ...

    @property
    def floors(self) -> bool:
        """Bands get their floors on this device."""
        ...

    def read(self) -> Reading | None:
        """Counters now; None: not enforced, or the device can't be asked."""
        ...

    def backlog(self, band: int, lane: int) -> int:
        """Bytes queued in one lane now; 0 also when the device can't be asked."""
        ...

    def purge(self, lanes: Sequence[tuple[int, int]]) -> None:
        """Free all packets of these (band, lane) pairs."""
        ...
