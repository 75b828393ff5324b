# SPDX-License-Identifier: Apache-2.0
"""Every answer for operators: one function per message of proto/mfsd/v1/control.proto, straight from the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import psutil

import mfsd
from mfsd.bands import LEVEL_BACKGROUND, LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER
from mfsd.engine.slots import NS
from mfsd.model import INF, Mode, Stage
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from mfsd.api.operations import BandRow, Device, Operations
    from mfsd.engine.books import Connection, Transfer
    from mfsd.engine.engine import Engine
    from mfsd.policy.views import Views

SHOWN: Final = {LEVEL_NEW: -1, LEVEL_NONE: -1, LEVEL_SCAVENGER: -2, LEVEL_BACKGROUND: -3}
"""Level numbers as shown: -1 none or not decided yet, -2 scavenger, -3 background (proto mfsd.v1.Connection.level)."""
_PROCESS: Final = psutil.Process()


def status(daemon: Operations, now: float) -> pb.Status:
    """One screen."""
    engine, books = daemon.engine, daemon.engine.books
    p50, p99 = daemon.tick_durations()
    return pb.Status(
        version=mfsd.__version__,
        uptime_s=now - daemon.started,
        epoch=engine.epoch,
        mode=pb.MODE_ENFORCE if engine.mode is Mode.ENFORCE else pb.MODE_OBSERVE,
        paused=engine.paused,
        policy=engine.steering.policy.name,
        devices=[_device(engine, i, d) for i, d in enumerate(daemon.all_devices)],
        sessions=len(books.sessions),
        requests=books.requests.n,
        batches=books.batches.n,
        transfers=books.transfers.n,
        connections=len(engine.connections),
        slots=len(engine.connections.table),
        pending_selectors=len(books.waiting.rules),
        counters=pb.Counters(**{f.name: getattr(books.counters, f.name) for f in pb.Counters.DESCRIPTOR.fields}),
        rss_bytes=_PROCESS.memory_info().rss,
        tick_p50_ms=p50 * 1000,
        tick_p99_ms=p99 * 1000,
        notices=daemon.notices(),
    )


def _device(engine: Engine, index: int, device: Device) -> pb.Device:
    on, table = engine.connections.device[: engine.connections.table.high], engine.connections.table
    users = np.bincount(table.band[: table.high][table.used[: table.high] & (on == index)], minlength=256)
    return pb.Device(
        name=device.name,
        ifindex=device.ifindex,
        backend=device.backend,
        attach=device.hook,
        loader=device.loader,
        rate_bytes_per_s=device.estimator.configured,
        measured_bytes_per_s=device.estimator.measured,
        utilisation=device.estimator.utilisation,
        bands=[_band(engine, device, row, int(users[row.index])) for row in device.band_rows()],
        stats=device.stats(),
    )


def _band(engine: Engine, device: Device, row: BandRow, connections: int) -> pb.Band:
    spec = engine.steering.bands.bands[row.index]
    return pb.Band(
        index=row.index,
        name=spec.name,
        classid=row.classid,
        lanes=row.lanes,
        floor_bytes_per_s=spec.floor * device.estimator.configured if device.floors else 0.0,
        bytes=row.bytes,
        packets=row.packets,
        drops=row.drops,
        backlog_bytes=row.backlog,
        dscp=device.dscp.get(spec.name, -1),
        connections=connections,
    )


def connections(engine: Engine, now: float, limit: int = 0) -> list[pb.Connection]:
    """Known connections, most urgent first; ``limit`` 0: all."""
    ordered = sorted(engine.connections.by_slot.values(), key=lambda c: (c.band, c.slot))
    return [_connection(engine, c, now) for c in (ordered[:limit] if limit else ordered)]


def transfers(engine: Engine, now: float, limit: int = 0) -> list[pb.TransferState]:
    """Unfinished transfers, most urgent first; ``limit`` 0: all."""
    views, rows = engine.steering.views(now), engine.books.transfers
    ordered = np.lexsort((rows.live("deadline"), rows.live("level")))
    return [_transfer(rows.objects[row], row, views) for row in (ordered[:limit] if limit else ordered).tolist()]


def explanation(
    engine: Engine, now: float, *, slot: int | None = None, cookie: int | None = None, transfer_id: str | None = None
) -> pb.Explanation | None:
    """Why one connection (by slot or cookie) or transfer (by id, of any session) is where it is; None: unknown."""
    parts, conn = _find(engine, slot, cookie, transfer_id)
    if conn is None and not parts:
        return None
    if conn is not None and not parts:
        parts = list(conn.queue)
    views, rows = engine.steering.views(now), engine.books.transfers
    out = pb.Explanation(
        connection=None if conn is None else _connection(engine, conn, now),
        transfers=[_transfer(t, rows.row(t), views) for t in parts],
    )
    if parts:
        first = min(parts, key=lambda t: rows.get(t, "level"))
        why = engine.steering.policy.explain(rows.row(first), views)
        out.figures.update(why.figures)
        if conn is not None and len(parts) > 1:
            out.reasons.append(f"its most urgent transfer is {first.id!r} (of {len(parts)}; the byte stream is FIFO)")
        out.reasons.extend(why.reasons)
    elif conn is not None:
        out.reasons.append(_at_rest(engine, conn))
    if conn is None:
        out.reasons.append("no socket matches its selector yet; mfsd keeps looking")
    if not engine.steers:
        out.reasons.append("packets are not steered: " + ("paused" if engine.paused else "the mode is observe"))
    return out


def _find(
    engine: Engine, slot: int | None, cookie: int | None, transfer_id: str | None
) -> tuple[list[Transfer], Connection | None]:
    if transfer_id is not None:
        parts = [t for s in engine.books.sessions.values() for t in s.transfers.get(transfer_id, ())]
        return parts, parts[0].conn if parts else None
    if slot is not None:
        return [], engine.connections.by_slot.get(slot)
    return [], next((c for c in engine.connections.by_slot.values() if c.cookie == cookie), None)


def _at_rest(engine: Engine, conn: Connection) -> str:
    if conn.mark is not None:
        return f"it is marked as stage {conn.mark.stage.name.lower()} and has no announced transfers"
    last = Stage(engine.connections.last_stage[conn.slot])
    if last is Stage.NONE:
        return "nothing has been announced on it: default band"
    return f"no announced transfers are left; bytes without a hint inherit its last stage, {last.name.lower()}"


def _connection(engine: Engine, conn: Connection, now: float) -> pb.Connection:
    known, rows = engine.connections, engine.books.transfers
    where, sent = rows.rows(conn.queue), known.offset(conn)
    left = np.maximum(rows.live("end")[where] - np.maximum(rows.live("start")[where], sent), 0.0).sum()
    first = conn.queue[0] if conn.queue else conn.mark
    return pb.Connection(
        slot=conn.slot,
        cookie=conn.cookie,
        endpoints=str(conn.endpoints) if conn.endpoints is not None else f"cookie {conn.cookie}",
        level=_shown_level(conn.level),
        band=engine.steering.bands.bands[conn.band].name,
        lane=conn.lane,
        stage=int(known.last_stage[conn.slot]) if first is None else first.stage.value,  # type: ignore[arg-type]  # an open enum
        transfers=len(conn.queue),
        bytes_left=round(float(left)),
        bytes_sent=int(known.table.bytes[conn.slot]),
        promotions=conn.promotions,
        rescues=conn.rescues,
        expires_us=round((int(known.table.expires_ns[conn.slot]) / NS - now) * 1e6),
        session="" if first is None else first.session.name,
    )


def _transfer(transfer: Transfer, row: int, views: Views) -> pb.TransferState:
    view, late = views.transfers, transfer.stage is Stage.P2D
    out = pb.TransferState(
        id=transfer.id,
        session=transfer.session.name,
        request_id=transfer.request.id if transfer.request else "",
        batch_id=transfer.batch.id if transfer.batch else "",
        stage=transfer.stage.value,  # type: ignore[arg-type]  # an open enum on the wire
        target_layer=int(view.target_layer[row]),
        bytes=transfer.total,
        bytes_left=round(float(view.left[row])),
        level=_shown_level(int(view.level[row])),
        slot=int(view.conn[row]),
    )
    time_left = float(view.deadline[row]) - views.now
    if time_left < INF:
        out.deadline_us = round(time_left * 1e6)
    rate = float(views.link.rate[view.device[row]])
    if late and time_left < INF and rate > 0:
        out.mlu = float(view.left[row]) / (time_left * rate) if time_left > 0 else INF
    if not late:
        out.rli = int(view.target_layer[row] - view.current_layer[row])
    return out


def _shown_level(level: int) -> int:
    return SHOWN.get(level, level)
