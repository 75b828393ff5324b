# SPDX-License-Identifier: Apache-2.0
"""One shaped device: its classifier, its qdiscs and its link estimator.

The qdiscs come and go in a worker thread while the event loop reads counters and purges lanes. What the loop needs of
them is one immutable value, ``Shape``, that is put in place or taken away as a whole; each method looks at it once.
What the engine orders is done by a thread (hands.py). Failures are noted and logged here, and never reach the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog

from mfsd.api.operations import BandRow, Figures
from mfsd.daemon import hands
from mfsd.daemon.hands import Hands
from mfsd.datapath import _abi
from mfsd.datapath.errors import DatapathError
from mfsd.engine.estimator import LinkEstimator
from mfsd.ground.logs import Seldom

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future

    from mfsd.daemon.config import DeviceConfig
    from mfsd.datapath.bpf.attach import Attachment
    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
    from mfsd.datapath.qdisc.plan import DevicePlan
    from mfsd.engine.device import Rescue, Rescued
    from mfsd.engine.estimator import Reading
    from mfsd.ground.bands import Bands

STATS: Final = {
    name.removeprefix("STAT_").lower(): number
    for name, number in vars(_abi).items()
    if name.startswith("STAT_") and name != "STAT_MAX"
}
"""Index by name of the classifier's counters (enum mfsd_stat in bpf/mfsd.h)."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Shape(hands.Shape):
    """Qdiscs of ours in force on a device, and what is said of them."""

    plan: DevicePlan
    """What was planned before they were installed."""
    floors: bool
    """Bands get their floors."""

    @classmethod
    def of(cls, enforcer: DeviceEnforcer, plan: DevicePlan) -> Shape:
        """Of an enforcer that has applied its plan."""
        return cls(enforcer, tuple(enforcer.band_maps()), plan, enforcer.floors)


class Device:
    """A configured device (engine.device.Device). ``shape`` is None while it is only observed."""

    def __init__(
        self, config: DeviceConfig, bands: Bands, classifier: Classifier, loader: str, dscp: Mapping[str, int]
    ) -> None:
        """``dscp``: code points to write by name of the band."""
        self.config = config
        self.name = config.name
        self.bands = bands
        self.dscp = dscp
        self.classifier = classifier
        self.loader = loader
        self.ifindex = 0
        """0 while there is no such device."""
        self.attachment: Attachment | None = None
        rate = config.rate.bytes_per_s if config.rate is not None else 0.0
        self.estimator = LinkEstimator(configured=rate, bands=len(bands))
        self.notice = ""
        """Why the device is only observed, or not even that; empty when all is as configured."""
        self.failure = ""
        """Why the last access to the qdiscs failed; empty when it did not."""
        self.given_up = ""
        """Why the qdiscs are not to be installed again unasked: somebody replaced them. Empty when they may be."""
        self.lost: list[str] = []
        """What could not be put back, since somebody had replaced it."""
        self.asked = False
        """Somebody has just asked for the qdiscs, whatever is on the device."""
        self.put_back = False
        """The qdiscs were put back on request, and are not to be installed again unasked either."""
        self.was = 0
        """Index of the device that has had this name until it was renamed; 0: none."""
        self.passed: set[int] = set()
        """Programs of others before which the classifier has been put once."""
        self.stale = 0
        """Packets that had been left alone for want of a sign of life, when it was last looked."""
        self._shape: Shape | None = None
        self._hands = Hands(self.name, self._failed)
        self._seldom = Seldom()

    @property
    def shape(self) -> Shape | None:
        """Bind it once and use the bound value: it may be taken away between two looks."""
        return self._shape

    def put_in_force(self, shape: Shape | None) -> None:
        """Let packets go to these qdiscs, or to none."""
        self._shape, self.failure = shape, ""
        if shape is not None and shape.plan.rate is not None:
            self.estimator.configured = shape.plan.rate.bytes_per_s
        self.write_map()

    def write_map(self) -> None:
        """Tell the classifier where the bands are; takes effect at the next packet."""
        shape, entry = self._shape, np.zeros((), dtype=_abi.DEV_DTYPE)
        flags = 0
        if self.config.overwrite_foreign:
            flags |= _abi.DEV_OVERWRITE_FOREIGN
        if self.config.control_unhinted:
            flags |= _abi.DEV_CONTROL_UNHINTED
        if self.dscp:
            flags |= _abi.DEV_MARK_DSCP
        entry["flags"], entry["tiny_len"] = flags, self.config.tiny_len
        entry["n_bands"], entry["control_band"] = len(self.bands), self.bands.control.index
        entry["default_band"] = self.bands.default.index
        entry["major"] = 0 if shape is None else shape.enforcer.major
        for spec in self.bands.bands:
            row = entry["bands"][spec.index]
            row["classid"], row["lanes"] = (0, 1) if shape is None else shape.lanes[spec.index]
            row["dscp"] = self.dscp.get(spec.name, _abi.DSCP_KEEP)
        self.classifier.dev[0] = entry

    # --- engine.device.Device -----------------------------------------------------------------------------------------

    @property
    def enforced(self) -> bool:
        """Our qdiscs are on the device."""
        return self._shape is not None

    @property
    def floors(self) -> bool:
        """Bands get their floors on this device."""
        shape = self._shape
        return shape is not None and shape.floors

    def read(self) -> Reading | None:
        """See engine.device.Device; so are the others."""
        shape = self._shape
        return None if shape is None else self._hands.read(shape, self.classifier, self.bands)

    def rescue(self, orders: Sequence[Rescue]) -> None:
        """Free what promoted connections have left behind."""
        shape = self._shape
        if shape is not None:
            self._hands.rescue(shape, orders)

    def rescued(self) -> list[Rescued]:
        """What became of it."""
        return self._hands.rescued()

    def empty(self, band: int, lane: int) -> bool:
        """Nothing is queued in a lane."""
        shape = self._shape
        return shape is None or self._hands.empty(shape, band, lane)

    def guarantee(self, shares: Mapping[int, float]) -> None:
        """Give bands so much."""
        shape = self._shape
        if shape is not None and shape.floors:
            self._hands.guarantee(shape, shares)

    def _failed(self, what: str, shape: Any, error: Exception) -> None:
        """Called from any thread."""
        if shape is not self._shape:
            return  # taken away meanwhile, and closed: nothing is wrong
        self.failure = f"{what}: {error}"
        if self._seldom(what):
            log.warning("device access failed", device=self.name, what=what, error=str(error))

    # --- operators ----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """Of the qdiscs in force; empty when only observed."""
        shape = self._shape
        return "" if shape is None else shape.plan.backend

    @property
    def hook(self) -> str:
        """Where the classifier hangs; empty when it does not."""
        return "" if self.attachment is None else self.attachment.method

    def stats(self) -> dict[str, int]:
        """The classifier's counters by name."""
        counted = self.classifier.stats()
        return {name: int(counted[number]) for name, number in STATS.items()}

    def figures(self) -> Future[Figures]:
        """Counters for operators, read by the device's thread."""
        return self._hands.ask(lambda: Figures(self.band_rows(), self.stats()))

    def note(self, notice: str) -> None:
        """Say why the device is not as configured, or (empty) that it is."""
        if notice and notice != self.notice:
            log.warning("device", device=self.name, notice=notice)
        self.notice = notice

    def band_rows(self) -> list[BandRow]:
        """All bands: the qdisc's counters where we enforce, else what the classifier counted."""
        shape, counted = self._shape, self.classifier.bands()
        if shape is not None:
            try:
                counters = shape.enforcer.counters()
            except (OSError, DatapathError) as e:
                self._failed("counters", shape, e)
            else:
                return [
                    BandRow(i, f"{classid >> 16:x}:{classid & 0xFFFF:x}", lanes, *map(int, list(row)[:4]))
                    for i, ((classid, lanes), row) in enumerate(zip(shape.lanes, counters.tolist(), strict=True))
                ]
        return [
            BandRow(b.index, "", b.lanes, int(counted["bytes"][b.index]), int(counted["packets"][b.index]), 0, 0)
            for b in self.bands.bands
        ]

    def close(self) -> None:
        """End the thread, once it is through with its orders."""
        self._hands.close()

    def detach_quietly(self) -> None:
        """Take the classifier off the device; where that fails, its heartbeat is lost and it does nothing."""
        attachment, self.attachment = self.attachment, None
        if attachment is None:
            return
        try:
            attachment.detach()
        except (OSError, DatapathError) as e:
            log.warning("detaching failed", device=self.name, error=str(e))
