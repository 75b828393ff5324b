# SPDX-License-Identifier: Apache-2.0
"""What operators may see of the engine, as plain values; control.py turns them into protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mfsd.bands import LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER
from mfsd.engine.slots import NS
from mfsd.model import INF, Stage

if TYPE_CHECKING:
    from mfsd.engine.books import Connection, Transfer
    from mfsd.engine.engine import Engine
    from mfsd.policy.views import Views

SHOWN_SCAVENGER = -2
"""Level numbers as shown: -1 none, -2 scavenger (proto mfsd.v1.Connection.level)."""


@dataclass(slots=True)
class ConnectionInfo:
    """One connection (proto mfsd.v1.Connection)."""

    slot: int
    cookie: int
    endpoints: str
    level: int
    band: str
    lane: int
    stage: Stage
    transfers: int
    bytes_left: int
    bytes_sent: int
    promotions: int
    rescues: int
    expires_s: float
    session: str


@dataclass(slots=True)
class TransferInfo:
    """One unfinished transfer (proto mfsd.v1.TransferState)."""

    id: str
    session: str
    request_id: str
    batch_id: str
    stage: Stage
    target_layer: int
    size: int
    left: int
    deadline_s: float | None
    """From now; negative: late; None: implicit."""
    mlu: float | None
    rli: int | None
    level: int
    slot: int


@dataclass(slots=True)
class ExplanationInfo:
    """Why a connection or transfer is where it is (proto mfsd.v1.Explanation)."""

    connection: ConnectionInfo | None
    transfers: list[TransferInfo]
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def shown_level(level: int) -> int:
    """Level number for people: -1 none or not decided yet, -2 scavenger."""
    if level == LEVEL_SCAVENGER:
        return SHOWN_SCAVENGER
    return LEVEL_NONE if level in (LEVEL_NEW, LEVEL_NONE) else level


def connections(engine: Engine, now: float, limit: int = 0) -> list[ConnectionInfo]:
    """Known connections, most urgent first; ``limit`` 0: all."""
    ordered = sorted(engine.connections.by_slot.values(), key=lambda c: (c.band, c.slot))
    return [_connection(engine, c, now) for c in (ordered[:limit] if limit else ordered)]


def transfers(engine: Engine, now: float, limit: int = 0) -> list[TransferInfo]:
    """Unfinished transfers, most urgent first; ``limit`` 0: all."""
    views = engine.steering.views(engine, now)
    level, deadline = engine.transfers.live("level"), engine.transfers.live("deadline")
    ordered = sorted(engine.transfers.objects, key=lambda t: (level[t.row], deadline[t.row]))
    return [_transfer(t, views, now) for t in (ordered[:limit] if limit else ordered)]


def explain(
    engine: Engine, now: float, *, slot: int | None = None, cookie: int | None = None, transfer_id: str | None = None
) -> ExplanationInfo | None:
    """Why one connection (by slot or cookie) or transfer (by id, of any session) is where it is; None: unknown."""
    parts, conn = _find(engine, slot, cookie, transfer_id)
    if conn is None and not parts:
        return None
    views = engine.steering.views(engine, now)
    if conn is not None and not parts:
        parts = list(conn.queue)
    out = ExplanationInfo(
        connection=None if conn is None else _connection(engine, conn, now),
        transfers=[_transfer(t, views, now) for t in parts],
    )
    if parts:
        level = engine.transfers.live("level")
        first = min(parts, key=lambda t: level[t.row])
        why = engine.steering.policy.explain(first.row, views)
        out.figures = why.figures
        if conn is not None and len(parts) > 1:
            out.reasons.append(f"its most urgent transfer is {first.id!r} (of {len(parts)}; the byte stream is FIFO)")
        out.reasons += why.reasons
    elif conn is not None:
        out.reasons.append(_at_rest(conn))
    if conn is None:
        out.reasons.append("no socket matches its selector yet; mfsd keeps looking")
    if not engine.steers:
        out.reasons.append("packets are not steered: " + ("paused" if engine.paused else "the mode is observe"))
    return out


def _find(
    engine: Engine, slot: int | None, cookie: int | None, transfer_id: str | None
) -> tuple[list[Transfer], Connection | None]:
    if transfer_id is not None:
        parts = [t for s in engine.sessions.values() for t in s.transfers.get(transfer_id, ())]
        return parts, parts[0].conn if parts else None
    if slot is not None:
        return [], engine.connections.by_slot.get(slot)
    return [], next((c for c in engine.connections.by_slot.values() if c.cookie == cookie), None)


def _at_rest(conn: Connection) -> str:
    if conn.mark is not None:
        return f"it is marked as stage {conn.mark.stage.name.lower()} and has no announced transfers"
    if conn.last_stage is Stage.NONE:
        return "nothing has been announced on it: default band"
    return (
        f"no announced transfers are left; bytes without a hint inherit its last stage, {conn.last_stage.name.lower()}"
    )


def _connection(engine: Engine, conn: Connection, now: float) -> ConnectionInfo:
    table, rows = engine.connections.table, engine.transfers
    sent = engine.connections.offset(conn)
    left = sum(max(float(rows.end[t.row]) - max(sent, float(rows.start[t.row])), 0.0) for t in conn.queue)
    stage = Stage(conn.queue[0].stage) if conn.queue else (conn.mark.stage if conn.mark else conn.last_stage)
    return ConnectionInfo(
        slot=conn.slot,
        cookie=conn.cookie,
        endpoints=str(conn.endpoints) if conn.endpoints is not None else f"cookie {conn.cookie}",
        level=shown_level(conn.level),
        band=engine.steering.bands.bands[conn.band].name,
        lane=conn.lane,
        stage=stage,
        transfers=len(conn.queue),
        bytes_left=round(left),
        bytes_sent=int(table.bytes[conn.slot]),
        promotions=conn.promotions,
        rescues=conn.rescues,
        expires_s=int(table.expires_ns[conn.slot]) / NS - now,
        session=conn.queue[0].session.name if conn.queue else (conn.mark.session.name if conn.mark else ""),
    )


def _transfer(transfer: Transfer, views: Views, now: float) -> TransferInfo:
    row, view = transfer.row, views.transfers
    deadline = float(view.deadline[row])
    timed = deadline < INF
    rate = float(views.link.rate[view.device[row]]) if len(views.link.rate) else 0.0
    late = transfer.stage is Stage.P2D
    mlu = None
    if late and timed and rate > 0:
        time_left = deadline - now
        mlu = float(view.left[row]) / (time_left * rate) if time_left > 0 else INF
    return TransferInfo(
        id=transfer.id,
        session=transfer.session.name,
        request_id=transfer.request.id if transfer.request else "",
        batch_id=transfer.batch.id if transfer.batch else "",
        stage=transfer.stage,
        target_layer=int(view.target_layer[row]),
        size=transfer.total,
        left=round(float(view.left[row])),
        deadline_s=deadline - now if timed else None,
        mlu=mlu,
        rli=None if late else int(view.target_layer[row] - view.current_layer[row]),
        level=shown_level(int(view.level[row])),
        slot=int(view.conn[row]),
    )
