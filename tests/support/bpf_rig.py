# SPDX-License-Identifier: Apache-2.0
"""A loaded classifier on a bench: slots, a device with eight bands, packets in, verdicts out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.parts.testrun import BANDS, FOREVER, Ran, describe, run_packet, upcoming_cookies
from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import cookie_key

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.datapath.bpf.loader import Classifier

ROWS: Final = 512
EXCLUSIVE: Final = _abi.STAT_NOT_IP + 1
"""Every packet is in exactly one of the first so many counters."""


@dataclass
class Result:
    """One packet's fate."""

    ran: Ran
    stats: npt.NDArray[np.int64]
    """What the counters of the device grew by."""
    slot: dict[str, int]
    """What the counters of the watched slot grew by; ``last_ns`` as it is."""
    bands: npt.NDArray[Any]
    """Packets per band: what the counters grew by."""

    @property
    def stat(self) -> int:
        """The one exclusive counter that counted the packet."""
        (one,) = np.flatnonzero(self.stats[:EXCLUSIVE])
        return int(one)

    @property
    def priority(self) -> int:
        return self.ran.priority


@dataclass
class Rig:
    """The classifier and what the daemon would do with it."""

    classifier: Classifier
    cookies: list[bytes] = field(default_factory=list)

    def reset(self) -> None:
        """A live daemon in enforce mode, an empty table, a plain device."""
        c = self.classifier
        for keys in (c.cookies, c.tuples):
            for key in list(keys):
                keys.delete(key)
        c.slots[:] = 0
        c.dev[:] = 0
        describe(c)
        c.dev["default_band"] = BANDS

    def slot(self, row: int, **fields: int) -> None:
        """Fill the user half of a row; by default band 3, never expiring."""
        for name, value in ({"expires_ns": FOREVER, "band": 3} | fields).items():
            self.classifier.slots[name][row] = value

    def add_tuple(self, key: bytes, row: int = 7, **fields: int) -> None:
        """A hinted connection that is matched by its tuple."""
        self.slot(row, **fields)
        self.classifier.tuples.add(key, row)

    def expect_cookie(self, row: int = 7, **fields: int) -> None:
        """Make the next packet's socket a hinted one.

        The kernel makes a socket per test run, whose cookie is the next of a per-CPU sequence that jumps every 4096
        (include/linux/cookie.h); the tests are pinned to one CPU, and other processes there may take a few.
        """
        self.slot(row, **fields)
        c = self.classifier.cookies
        for key in self.cookies:
            c.delete(key)
        self.cookies = [cookie_key(cookie) for cookie in upcoming_cookies(100)]
        for key in self.cookies:
            c.add(key, row)

    def run(self, frame: bytes, *, row: int = 7, **kwargs: int) -> Result:
        """One packet through the classifier; checks what must hold for every packet."""
        c = self.classifier
        before, slot, bands = c.stats().astype(np.int64), c.slots[row].copy(), c.bands()
        ran = run_packet(c.prog_fd, frame, **kwargs)
        stats = c.stats().astype(np.int64) - before
        assert ran.verdict == -1, "every packet goes on to whatever else hangs on the hook"
        assert stats[:EXCLUSIVE].sum() == 1, f"not counted exactly once: {stats}"
        grown = {n: int(c.slots[n][row] - slot[n]) for n in ("bytes", "packets", "sent")}
        return Result(
            ran, stats, grown | {"last_ns": int(c.slots["last_ns"][row])}, c.bands()["packets"] - bands["packets"]
        )
