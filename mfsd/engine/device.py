# SPDX-License-Identifier: Apache-2.0
"""A shaped device as the engine sees it.

Whatever touches qdiscs may wait for the kernel's rtnl lock, which others hold for as long as they like; the engine
never does. So it leaves orders, which a thread of the device carries out at once, and it takes the results later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.engine.estimator import LinkEstimator, Reading
    from mfsd.engine.records import Connection


@dataclass(frozen=True, slots=True)
class Rescue:
    """Order: free what a promoted connection has left in a lane."""

    conn: Connection
    band: int
    lane: int
    promoted: float = 0.0
    """When the connection was."""
    let_out: bool = False
    """The band has been let out for it meanwhile: what is left is freed."""


@dataclass(frozen=True, slots=True)
class Rescued:
    """What became of an order."""

    order: Rescue
    freed: int
    """Bytes; 0: there was nothing, or it was left to drain."""


class Device(Protocol):
    """What the engine needs of a device (mfsd.daemon.device.Device). Nothing here waits, and nothing raises."""

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
        """The last counters that have not been taken yet, and an order to read new ones; None: there are none (yet)."""
        ...

    def rescue(self, orders: Sequence[Rescue]) -> None:
        """Carry these out together."""
        ...

    def rescued(self) -> list[Rescued]:
        """What has been carried out since the last call."""
        ...

    def empty(self, band: int, lane: int) -> bool:
        """The lane was empty when it was last looked at, which was lately. False also when nobody has looked yet."""
        ...

    def guarantee(self, shares: Mapping[int, float]) -> None:
        """Give bands (by index) so much of the link (0..1) even when bands above them are busy, others their floors."""
        ...
