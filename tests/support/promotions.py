# SPDX-License-Identifier: Apache-2.0
"""The real daemon in a guest, and how long a promotion takes with and without rescue."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, Final

from mfsd.ground.model import Stage
from support.rig import Daemon, Flow, flows, running
from support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mfsd.client import Client
    from support.namespaces import NetnsPair

RATE_MBIT: Final = 50
LINK: Final = RATE_MBIT * 125_000
LONG_S: Final = 90.0
"""Bound of waits under emulation."""
WATCH_S: Final = 6.0
"""How long a promotion is waited for."""
TRIALS: Final = 5
BUSY: Final = 3


class GuestDaemon(Daemon):
    """With a slower link and whatever backend, loader and device a test is about."""

    def __init__(self, pair: NetnsPair, folder: Path, **more: Any) -> None:
        self.backend = more.pop("backend", "htb")
        self.rate = more.pop("rate", f"{RATE_MBIT}mbit")
        self.device = more.pop("device", pair.dev_a)
        self.loader = more.pop("loader", "auto")
        super().__init__(pair, folder, **more)

    def write_config(self, extra: str = "", **more: Any) -> None:
        super().write_config(extra, **{"daemon": f'loader = "{self.loader}"'} | more)
        text = self.config.read_text()
        before, _, after = text.partition("[[device]]")
        _, _, after = after.partition("[policy]")
        rate = f'rate = "{self.rate}"\n' if self.rate else ""
        device = f'[[device]]\nname = "{self.device}"\nbackend = "{self.backend}"\n{rate}'
        self.config.write_text(f"{before}{device}[policy]{after}")


def promotion_ms(daemon: Daemon, client: Client, late: Flow, busy: list[Flow]) -> float:
    """From the hint to the first 50 ms in which the promoted flow gets half of the link; WATCH_S if none is."""
    client.mark(late.sender, Stage.P2D)
    assert client.flush(30)
    wait_for(lambda: daemon.band_of(late) == "level 4", "deferral", LONG_S)
    seen = sum(f.received for f in busy)
    wait_for(lambda: sum(f.received for f in busy) - seen > LINK, "a second of starvation", LONG_S)
    begin = time.monotonic()
    client.mark(late.sender, Stage.COLLECTIVE)
    while time.monotonic() - begin < WATCH_S:
        time.sleep(0.02)
        recent = [(at - begin, n) for at, n in list(late.arrivals) if at >= begin]
        for at, _ in recent:
            if sum(n for t, n in recent if at <= t < at + 0.05) >= 0.5 * LINK * 0.05:
                return at * 1000
    return WATCH_S * 1000


def compare(
    pair: NetnsPair, folder: Path, record: Callable[[str, object], None], **daemon: Any
) -> dict[bool, list[float]]:
    """Latencies in ms with (True) and without rescue; both and the ratio of their medians go into the report.

    Ratios within one guest, because the processors are emulated.
    """
    out: dict[bool, list[float]] = {}
    for enabled in (True, False):
        own = folder / str(enabled)
        own.mkdir()
        extra = f"[rescue]\nenabled = {str(enabled).lower()}"
        with (
            running(GuestDaemon(pair, own, extra=extra, **daemon)) as mfsd,
            flows(pair, 1 + BUSY) as (late, *busy),
            mfsd.client() as client,
        ):
            # prio itself has no floors: what is sent before the first hint would wait in the default band.
            for flow in busy:
                client.mark(flow.sender, Stage.KV_REUSE)
            client.mark(late.sender, Stage.P2D)
            assert client.flush(30)
            wait_for(lambda: all(mfsd.band_of(f) for f in (late, *busy)), "all hints to hold", LONG_S)
            for flow in (*busy, late):
                flow.saturate(600)
            # The first starves all sockets anew and is not counted.
            promotion_ms(mfsd, client, late, busy)
            times = out[enabled] = [promotion_ms(mfsd, client, late, busy) for _ in range(TRIALS)]
            record(f"{'rescue' if enabled else 'plain'}_ms", [round(t) for t in times])
            counters = mfsd.status().counters
            assert counters.promotions >= TRIALS
            assert bool(counters.rescues) == enabled
    record("ratio", round(statistics.median(out[False]) / statistics.median(out[True]), 1))
    return out
