# SPDX-License-Identifier: Apache-2.0
"""One shaped device as the engine sees it: classifier, qdiscs and link estimator behind one small interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import cookie_key, tuple_key
from mfsd.engine.estimator import LinkEstimator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.bands import Bands
    from mfsd.daemon.config import DeviceConfig
    from mfsd.datapath.bpf.attach import Attachment
    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
    from mfsd.model import Endpoints


class KernelKeys:
    """table.KeyMap on the classifier's hash maps, which all devices share."""

    def __init__(self, classifier: Classifier) -> None:
        self._cookies, self._tuples = classifier.cookies, classifier.tuples

    def add_cookie(self, cookie: int, slot: int) -> None:
        """See table.KeyMap."""
        self._cookies.add(cookie_key(cookie), slot)

    def delete_cookie(self, cookie: int) -> None:
        """See table.KeyMap."""
        self._cookies.delete(cookie_key(cookie))

    def add_tuple(self, endpoints: Endpoints, slot: int) -> None:
        """See table.KeyMap."""
        self._tuples.add(tuple_key(endpoints), slot)

    def delete_tuple(self, endpoints: Endpoints) -> None:
        """See table.KeyMap."""
        self._tuples.delete(tuple_key(endpoints))


class Port:
    """A device: ``enforcer`` is None while it is only observed."""

    def __init__(
        self,
        config: DeviceConfig,
        ifindex: int,
        bands: Bands,
        classifier: Classifier,
        attachment: Attachment | None,
        enforcer: DeviceEnforcer | None,
        rate: float,
        dscp: Mapping[str, int],
    ) -> None:
        """``rate`` in bytes/s, 0 if unknown: then nothing is known until the link has been busy.

        ``dscp``: code points to write by name of the band.
        """
        self.config = config
        self.name = config.name
        self.ifindex = ifindex
        self.bands = bands
        self.dscp = dscp
        self.classifier = classifier
        self.attachment = attachment
        self.enforcer = enforcer
        self.estimator = LinkEstimator(configured=rate, bands=len(bands))

    @property
    def enforced(self) -> bool:
        """Our qdiscs are on the device."""
        return self.enforcer is not None

    def write_device_map(self) -> None:
        """Tell the classifier where the bands are; takes effect at the next packet."""
        entry = np.zeros((), dtype=_abi.DEV_DTYPE)
        flags = 0
        if self.config.overwrite_foreign:
            flags |= _abi.DEV_OVERWRITE_FOREIGN
        if self.config.control_unhinted:
            flags |= _abi.DEV_CONTROL_UNHINTED
        if self.dscp:
            flags |= _abi.DEV_MARK_DSCP
        entry["flags"], entry["tiny_len"] = flags, self.config.tiny_len
        entry["n_bands"], entry["control_band"] = len(self.bands), self.bands.control.index
        maps = self.enforcer.band_maps() if self.enforcer is not None else [(0, 1)] * len(self.bands)
        if self.enforcer is not None:
            entry["major"] = self.enforcer.major
        for spec, (classid, lanes) in zip(self.bands.bands, maps, strict=True):
            row = entry["bands"][spec.index]
            row["classid"], row["lanes"] = classid, lanes
            row["dscp"] = self.dscp.get(spec.name, _abi.DSCP_KEEP)
        self.classifier.dev[0] = entry

    # --- steering.Port ------------------------------------------------------------------------------------------------

    def read(self) -> tuple[int, int, npt.NDArray[np.float64]] | None:
        """Bytes sent and queued by the root qdisc, and bytes offered per band, cumulative; None: not enforced."""
        if self.enforcer is None:
            return None
        sent, backlog = self.enforcer.link_bytes()
        offered: npt.NDArray[Any] = self.classifier.bands()["bytes"][: len(self.bands)]
        return sent, backlog, offered.astype(np.float64)

    # --- rescue.LaneDriver --------------------------------------------------------------------------------------------

    @property
    def floors(self) -> bool:
        """Bands get their floors on this device."""
        return self.enforcer is not None and self.enforcer.floors

    def backlog(self, band: int, lane: int) -> int:
        """Bytes queued in one lane now."""
        return 0 if self.enforcer is None else int(self.enforcer.backlog(band, self._lane(band, lane))[0])

    def purge(self, lanes: Sequence[tuple[int, int]]) -> None:
        """Free all packets of these (band, lane) pairs."""
        if self.enforcer is not None:
            self.enforcer.rescue([(band, self._lane(band, lane)) for band, lane in lanes])

    def _lane(self, band: int, lane: int) -> int:
        """As the classifier does: a band may have fewer lanes on this device than the table knows."""
        assert self.enforcer is not None  # noqa: S101 - callers have checked; for the type checker
        return lane % int(self.enforcer.band_maps()[band][1])

    def close(self) -> None:
        """Detach the classifier."""
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = None
