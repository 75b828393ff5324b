# SPDX-License-Identifier: Apache-2.0
"""What all classifiers of this host go by: the sign of life, and whether packets follow the levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mfsd.datapath import _abi
from mfsd.host import clock

if TYPE_CHECKING:
    import numpy.typing as npt

MS: Final = 1_000_000
"""Nanoseconds."""


class HostMap:
    """``struct mfsd_host`` (bpf/mfsd.h) as the daemon writes it; for any thread."""

    def __init__(self, row: npt.NDArray[Any] | None = None) -> None:
        """``row``: the map's memory, shape (1,), dtype HOST_DTYPE; None where there is no classifier."""
        self._row = row
        self._beaten = 0
        if row is not None:
            row["abi_version"] = _abi.ABI_VERSION

    def set_timeout(self, ms: float) -> None:
        """How long the classifier obeys without a sign of life."""
        if self._row is not None:
            self._row["timeout_ns"] = int(ms * MS)

    def set_steering(self, *, steers: bool) -> None:
        """Let packets follow the levels, or not; takes effect at the next packet."""
        if self._row is not None:
            self._row["flags"] = _abi.HOST_ENFORCE if steers else 0

    def beat(self) -> None:
        """Give the sign of life, by the clock that the classifier goes by."""
        if self._row is not None:
            self._row["heartbeat_ns"] = self._beaten = clock.monotonic_ns()

    @property
    def obeyed(self) -> bool:
        """The last sign of life is recent enough."""
        return self._row is not None and clock.monotonic_ns() - self._beaten <= int(self._row["timeout_ns"][0])

    def fall_silent(self) -> None:
        """From the next packet on the classifier leaves everything alone."""
        if self._row is not None:
            self._row["flags"] = 0
            self._row["heartbeat_ns"] = 0
