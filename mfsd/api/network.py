# SPDX-License-Identifier: Apache-2.0
"""What operators are told of connections that yield in the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mfsd.api.operations import Way
    from mfsd.engine.records import Connection


def rows(ways: Iterable[Way], bands: Sequence[str]) -> Iterator[pb.Yielding]:
    """A row per band that has ways, in the order of ``bands``."""
    known: dict[str, list[Way]] = {}
    for way in ways:
        known.setdefault(way.band, []).append(way)
    for band in bands:
        found = known.get(band, [])
        if found:
            samples, steered = sum(w.samples for w in found), sum(w.steered_s for w in found)
            yield pb.Yielding(
                band=band,
                hosts=len(found),
                connections=sum(w.connections for w in found),
                queue_ms=sum(w.queue_seconds_sum for w in found) * 1000 / max(samples, 1),
                target_ms=max(w.target_s for w in found) * 1000,
                yielding_share=sum(w.yielded_s for w in found) / steered if steered else 0.0,
            )


def reasons(ways: Iterable[Way], conn: Connection | None, band: str) -> Iterator[str]:
    """Why a connection in ``band`` sends no more than it does; nothing where it does not yield."""
    if conn is None or conn.endpoints is None:
        return
    peer = str(conn.endpoints.dst)
    for way in ways:
        if (way.peer, way.band) == (peer, band):
            yield (
                f"yields: {way.queue_s * 1000:.1f} ms of queue towards {peer}, where it leaves at most "
                f"{way.target_s * 1000:.1f} ms; {way.window:.3g} packets in flight"
            )
