# SPDX-License-Identifier: Apache-2.0
"""Where the time of one request went: the answer to ``Trace`` of proto/mfsd/v1/control.proto."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mfsd.api.messages import shown_level
from mfsd.engine.tally import EndedTransfer, spent
from mfsd.ground.model import INF
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.engine.engine import Engine
    from mfsd.engine.records import Request
    from mfsd.engine.steering import Steering

    Interval = tuple[float, float]


def of_request(engine: Engine, now: float, name: str, session: str = "") -> pb.RequestTrace | None:
    """The request that is not over, else the latest that is; None: neither is known."""
    sessions = engine.books.sessions
    wanted = [sessions[session]] if session in sessions else [] if session else list(sessions.values())
    live = next((s.requests[name] for s in wanted if name in s.requests), None)
    tally, requests = engine.books.tally, engine.books.requests
    if live is not None:
        of, over, end = live.session.name, False, now
        begin, deadline = float(requests.get(live, "arrival")), float(requests.get(live, "deadline"))
    else:
        gone = tally.finished_as(name, session)
        if gone is None:
            return None
        of, over, begin, deadline = gone.session, True, gone.arrival, gone.deadline
        end = gone.ended if gone.ended < INF else now
    done = [t for t in tally.of_request(name) if t.session == of and t.created >= begin]
    under_way = _live(engine, live, now)
    every = [*done, *under_way]
    shown = [_transfer(t, begin, over=n < len(done)) for n, t in enumerate(every)]
    return pb.RequestTrace(
        request_id=name,
        session=of,
        over=over,
        seconds=end - begin,
        slack_s=deadline - end if deadline < INF else None,
        spent=_spent(every, begin, end),
        held_back_s=_held_back(every, begin, end, engine.steering),
        transfers=sorted(shown, key=lambda t: t.announced_s),
    )


def _live(engine: Engine, request: Request | None, now: float) -> list[EndedTransfer]:
    """Its unfinished transfers, as if they ended now."""
    if request is None:
        return []
    columns = engine.books.transfers
    return [
        EndedTransfer(
            t.id, t.session.name, request.id, t.stage, float(columns.get(t, "size")),
            float(columns.get(t, "created")), float(columns.get(t, "begun")), now, False,
            float(columns.get(t, "deadline")), int(columns.get(t, "first_level")), t.path, t.rescues,
        )
        for t in request.transfers
    ]  # fmt: skip


def _transfer(t: EndedTransfer, begin: float, *, over: bool) -> pb.TransferTrace:
    levels = [level for _, level in [(t.created, t.first_level), *t.path]]
    return pb.TransferTrace(
        id=t.id,
        stage=t.stage.value,  # type: ignore[arg-type]  # an open enum on the wire
        bytes=int(t.size),
        announced_s=t.created - begin,
        begun_s=t.begun - begin if t.begun else None,
        ended_s=t.ended - begin if over else None,
        delivered=t.delivered,
        slack_s=t.deadline - t.ended if t.deadline < INF else None,
        levels=[
            pb.LevelTime(level=shown_level(level), seconds=seconds)
            for level, seconds in spent(t.first_level, t.path, t.created, t.ended).items()
        ],
        promotions=sum(b < a for a, b in pairwise(levels)),
        rescues=t.rescues,
    )


def _spent(transfers: Sequence[EndedTransfer], begin: float, end: float) -> pb.Spent:
    """Each moment counts once: as wire where bytes of any were on their way, else as queue where any waited."""
    wire = _union((t.started if t.begun else t.ended, t.ended) for t in transfers)
    busy = _union((t.created, t.ended) for t in transfers)
    on_wire, either = _length(wire, begin, end), _length(busy, begin, end)
    return pb.Spent(elsewhere_s=max(end - begin - either, 0.0), queue_s=max(either - on_wire, 0.0), wire_s=on_wire)


def _held_back(transfers: Sequence[EndedTransfer], begin: float, end: float, steering: Steering) -> float:
    """Seconds in which some were under way, and none of them in the band of unhinted traffic or above it."""
    default = steering.bands.default.index
    forward: list[Interval] = []
    for t in transfers:
        since, levels = zip(*[(t.created, t.first_level), *t.path, (t.ended, t.first_level)], strict=True)
        band = steering.ladder.bands(np.array(levels, dtype=np.int16))
        spans = zip(pairwise(since), band.tolist(), strict=False)
        forward += [(a, min(b, t.ended)) for (a, b), place in spans if place <= default]
    busy = _length(_union((t.created, t.ended) for t in transfers), begin, end)
    return max(busy - _length(_union(forward), begin, end), 0.0)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    out: list[Interval] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


def _length(intervals: Iterable[Interval], begin: float, end: float) -> float:
    return sum(max(min(b, end) - max(a, begin), 0.0) for a, b in intervals)
