# SPDX-License-Identifier: Apache-2.0
"""Every answer for operators: one function per message of proto/mfsd/v1/control.proto, straight from the engine."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

import mfsd
from mfsd.api import network
from mfsd.engine.slots import NS
from mfsd.ground.bands import LEVEL_BACKGROUND, LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER, BandSpec, Urgency
from mfsd.ground.model import INF, Mode, PortRange, ProcessSelector, RuleSelector, Stage, TupleSelector
from mfsd.policy.base import place
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from mfsd.api.operations import BandRow, Device, Figures, Operations, Verdict, Way
    from mfsd.engine.engine import Engine
    from mfsd.engine.peers import Known
    from mfsd.engine.records import Connection, Transfer, Watch
    from mfsd.engine.urgency import Use
    from mfsd.ground.model import Selector
    from mfsd.policy.views import Views

RULES: Final = "mfsd:rules"
"""The session whose marks are the configuration's rules."""
NAMED: Final = 8
"""Selectors without a connection that the notices name."""
PEERS: Final = 100
"""Peers that a status lists."""
SHOWN: Final = 1000
"""Transfers that an explanation lists."""
TENANTS: Final = 100
"""Rows of tenants that a status lists."""
_SHOWN_LEVEL: Final = {LEVEL_NEW: -1, LEVEL_NONE: -1, LEVEL_SCAVENGER: -2, LEVEL_BACKGROUND: -3}
"""Level numbers as shown: -1 none or not decided yet, -2 scavenger, -3 background (proto mfsd.v1.Connection.level)."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def status(daemon: Operations, figures: Sequence[Figures], ways: Sequence[Way], now: float) -> pb.Status:
    """One screen. ``figures``: of all devices; ``ways``: of connections that yield."""
    engine, books = daemon.engine, daemon.engine.books
    p50, p99 = daemon.tick_durations()
    unseen = [w for w in engine.watches.unseen(now) if not _carried(engine, w)]
    return pb.Status(
        version=mfsd.__version__,
        uptime_s=now - daemon.started,
        epoch=engine.epoch,
        mode=pb.MODE_ENFORCE if engine.mode is Mode.ENFORCE else pb.MODE_OBSERVE,
        paused=engine.paused,
        policy=engine.steering.policy.name,
        devices=[
            _device(engine, i, *one)
            for i, one in enumerate(zip(daemon.all_devices, figures, engine.connections.by_band(), strict=False))
        ],
        sessions=len(books.sessions),
        requests=books.requests.n,
        requests_no_deadline=books.without_deadline,
        batches=books.batches.n,
        transfers=books.transfers.n,
        connections=len(engine.connections),
        slots=len(engine.connections.table),
        pending_selectors=len(unseen),
        counters=pb.Counters(**{f.name: getattr(books.counters, f.name) for f in pb.Counters.DESCRIPTOR.fields}),
        rss_bytes=_resident(),
        tick_p50_ms=p50 * 1000,
        tick_p99_ms=p99 * 1000,
        notices=[*daemon.notices(), *_unseen(unseen)],
        peers=[_peer(p) for p in engine.connections.peers.known(now)[:PEERS]],
        tenants=[_tenant(u) for u in islice(engine.steering.urgency.uses(), TENANTS)],
        yielding=network.rows(ways, [b.name for b in engine.steering.bands.bands]),
    )


def _resident() -> int:
    """Bytes of memory (proc_pid_statm(5)); 0: nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        return 0


def _tenant(use: Use) -> pb.Tenant:
    return pb.Tenant(
        uid=use.uid,
        device=use.device,
        connections=use.connections,
        moved_bytes_per_s=use.moved,
        urgent_bytes_per_s=use.urgent,
        allowed_bytes_per_s=use.allowed,
        demoted=use.demoted,
        demotions=use.demotions,
    )


def _peer(known: Known) -> pb.Peer:
    return pb.Peer(
        address=str(known.address),
        configured_bytes_per_s=known.configured if known.configured < INF else 0.0,
        learnt_bytes_per_s=known.learnt,
        sightings=known.sightings,
        used_bytes_per_s=known.used if known.used < INF else 0.0,
        given_up=known.given_up,
        in_time=known.in_time,
        raised=known.raised,
    )


def _carried(engine: Engine, watch: Watch) -> bool:
    """Packets of an exact tuple pass, although no socket of this host is behind it (bridged pods)."""
    packets = engine.connections.table.packets
    return watch.stream is not None and any(packets[conn.slot] for conn in watch.stream.members)


def _unseen(watches: Sequence[Watch]) -> Iterator[str]:
    """Selectors that match nothing, in words; a few of them."""
    for watch in watches[:NAMED]:
        kind = "marks" if watch.mark is not None else "announces transfers on"
        yield f"session {watch.session.name} {kind} {_words(watch.selector)}, which matches no connection"
    if len(watches) > NAMED:
        yield f"{len(watches) - NAMED} more selectors match no connection"


def _words(selector: Selector) -> str:
    if isinstance(selector, TupleSelector):
        src = "" if selector.src is None else str(selector.src)
        return f"{_host(src, selector.sport)} -> {_host(str(selector.dst), selector.dport)}"
    if isinstance(selector, ProcessSelector):
        remote = "anywhere" if selector.remote is None else str(selector.remote)
        return f"process {selector.pid} -> {_host(remote, selector.dport)}"
    if isinstance(selector, RuleSelector):
        return conditions(selector)
    return f"cookie {selector.cookie}"


def conditions(selector: RuleSelector) -> str:
    """What a rule asks for, in words."""
    maker = selector.maker
    words = [f"remote {selector.remote}"] if selector.remote is not None else []
    words += [f"remote port {selector.dport}"] if selector.dport != PortRange() else []
    words += [f"local port {selector.sport}"] if selector.sport != PortRange() else []
    words += [f"process {maker.pid}"] if maker.pid else []
    words += [f"{what} {value}" for what in ("executable", "thread", "cgroup") if (value := getattr(maker, what))]
    words += [f"user {maker.uid}"] if maker.uid >= 0 else []
    return ", ".join(words)


def _host(address: str, ports: PortRange) -> str:
    text = f"[{address}]" if ":" in address else address or "any"
    return text if ports == PortRange() else f"{text}:{ports}"


def rules(daemon: Operations, verdicts: Sequence[Verdict]) -> pb.ListRulesReply:
    """Rules in force, with what they name now."""
    marks = daemon.engine.books.sessions.get(RULES)
    held = {} if marks is None else {selector: len(mark.conns) for selector, mark in marks.marks.items()}
    return pb.ListRulesReply(
        rules=[
            pb.Rule(
                name=r.name,
                source=r.source,
                conditions=conditions(r.selector),
                stage=int(r.stage),  # type: ignore[arg-type] # the same numbers
                interleaved=not r.ordered,
                deadline_us=0 if r.due_in == INF else int(r.due_in * 1e6),
                connections=held.get(r.selector, 0),
                problem=r.problem,
            )
            for r in daemon.rules
        ],
        verdicts=[
            pb.RuleVerdict(
                connection=str(v.socket.endpoints),
                cookie=v.socket.cookie,
                pid=v.socket.pid,
                rule=v.rule.name,
                failing=v.failing,
            )
            for v in verdicts
        ],
    )


def _device(engine: Engine, index: int, device: Device, figures: Figures, users: npt.NDArray[np.int64]) -> pb.Device:
    steering = engine.steering
    shares = steering.guarantees.shares(index) if device.floors else {}
    standing = steering.guarantees.standing(index)
    classes = steering.ladder.classes(steering.policy.classes)
    return pb.Device(
        name=device.name,
        ifindex=device.ifindex,
        backend=device.backend,
        attach=device.hook,
        loader=device.loader,
        rate_bytes_per_s=device.estimator.configured,
        measured_bytes_per_s=device.estimator.measured,
        utilisation=device.estimator.utilisation,
        bands=[
            _band(
                steering.bands.bands[r.index],
                device,
                r,
                int(users[r.index]),
                shares.get(r.index, 0.0),
                classes,
                stands=r.index in standing,
            )
            for r in figures.bands
        ],
        stats=figures.stats,
    )


def _band(
    spec: BandSpec,
    device: Device,
    row: BandRow,
    connections: int,
    share: float,
    classes: Sequence[Urgency],
    *,
    stands: bool,
) -> pb.Band:
    given = share * device.estimator.configured
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
        urgency=classes[row.index],
        guaranteed_bytes_per_s=0.0 if stands else given,
        standing_bytes_per_s=given if stands else 0.0,
        got_bytes_per_s=float(device.estimator.band_load[row.index]) * device.estimator.rate,
    )


def connections(engine: Engine, now: float, which: Iterable[Connection]) -> list[pb.Connection]:
    """Connections as shown, in the order given."""
    streams, rows = engine.books.streams, engine.books.transfers
    of, high = rows.live("stream"), streams.high
    left = np.bincount(of, weights=engine.steering.views(now).transfers.left, minlength=high).astype(np.float64)
    waiting = np.bincount(of, minlength=high).astype(np.int64)
    levels = engine.steering.levels()
    return [_connection(engine, c, now, int(levels[c.slot]), left, waiting) for c in which]


def transfers(engine: Engine, now: float, which: Iterable[int]) -> list[pb.TransferState]:
    """Unfinished transfers as shown, by row, in the order given."""
    views, objects = engine.steering.views(now), engine.books.transfers.objects
    return [_transfer(objects[row], row, views) for row in which]


def explanation(
    engine: Engine,
    now: float,
    ways: Sequence[Way] = (),
    *,
    slot: int | None = None,
    cookie: int | None = None,
    transfer_id: str | None = None,
) -> pb.Explanation | None:
    """Why one connection (by slot or cookie) or transfer (by id, of any session) is where it is; None: unknown."""
    parts, conn = _find(engine, slot, cookie, transfer_id)
    if conn is None and not parts:
        return None
    if conn is not None and not parts:
        parts = [t for stream in conn.streams for t in stream.queue]
    views, rows = engine.steering.views(now), engine.books.transfers
    out = pb.Explanation(
        connection=None if conn is None else connections(engine, now, [conn])[0],
        transfers=[_transfer(t, rows.row(t), views) for t in parts[:SHOWN]],
    )
    if parts:
        first = min(parts, key=lambda t: rows.get(t, "level"))
        why = engine.steering.policy.explain(rows.row(first), views)
        out.figures.update(why.figures)
        if conn is not None and len(parts) > 1:
            out.reasons.append(f"its most urgent transfer is {first.id!r} (of {len(parts)}; the byte stream is FIFO)")
        out.reasons.extend(why.reasons)
        level = rows.live("level")
        moves_at = int(engine.steering.moving(level)[rows.row(first)])
        if moves_at < level[rows.row(first)]:
            out.reasons.append(
                f"it is written in turns with what else its connection carries, which moves at {place(moves_at)}, as "
                "its stage does, since nothing there could be held back alone"
            )
    elif conn is not None:
        out.reasons.append(_at_rest(engine, conn))
    if conn is None:
        out.reasons.append(
            "no connection matches its selector yet; the first one that does is put into its band at once"
        )
    if conn is not None and engine.steering.urgency.demoted(conn):
        out.reasons.insert(
            0, "its user has moved more urgent traffic than its budget: demoted for now (status, tenants)"
        )
    out.reasons.extend(network.reasons(ways, conn, out.connection.band))
    if not engine.steers:
        out.reasons.append("packets are not steered: " + ("paused" if engine.paused else "the mode is observe"))
    return out


def _find(
    engine: Engine, slot: int | None, cookie: int | None, transfer_id: str | None
) -> tuple[list[Transfer], Connection | None]:
    known = engine.connections
    if transfer_id is not None:
        parts = [s.transfers[transfer_id] for s in engine.books.sessions.values() if transfer_id in s.transfers]
        return parts, known.by_slot.get(int(engine.books.streams.slot[parts[0].stream.index])) if parts else None
    return [], known.by_slot.get(slot) if slot is not None else known.by_cookie.get(cookie or 0)


def _at_rest(engine: Engine, conn: Connection) -> str:
    if conn.marks:
        stages = ", ".join(sorted({m.stage.name.lower() for m in conn.marks}))
        return f"it is marked as stage {stages} and has no announced transfers"
    last = Stage(engine.connections.last_stage[conn.slot])
    if last is Stage.NONE:
        return "nothing has been announced on it: default band"
    return f"no announced transfers are left; bytes without a hint inherit its last stage, {last.name.lower()}"


def _connection(
    engine: Engine,
    conn: Connection,
    now: float,
    level: int,
    left: npt.NDArray[np.float64],
    waiting: npt.NDArray[np.int64],
) -> pb.Connection:
    """``left`` and ``waiting``: bytes and transfers by stream. Those of several connections count for each of them."""
    known = engine.connections
    first = next((s.queue.first for s in conn.streams if s.queue), None) or next(iter(conn.marks), None)
    return pb.Connection(
        slot=conn.slot,
        cookie=conn.cookie,
        endpoints=str(conn.endpoints) if conn.endpoints is not None else f"cookie {conn.cookie}",
        level=shown_level(level),
        band=engine.steering.bands.bands[conn.band].name,
        lane=conn.lane,
        stage=int(known.last_stage[conn.slot]) if first is None else first.stage.value,  # type: ignore[arg-type]  # an open enum
        transfers=sum(int(waiting[s.index]) for s in conn.streams),
        bytes_left=round(sum(float(left[s.index]) for s in conn.streams)),
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
        batch_id=transfer.computed_in.id if transfer.computed_in else "",
        stage=transfer.stage.value,  # type: ignore[arg-type]  # an open enum on the wire
        target_layer=int(view.target_layer[row]),
        bytes=int(view.size[row]),
        bytes_left=round(float(view.left[row])),
        level=shown_level(int(view.level[row])),
        slot=int(view.conn[row]),
    )
    time_left = float(view.deadline[row]) - views.now
    if time_left < INF:
        out.deadline_us = round(time_left * 1e6)
    rate = float(views.link.rate[view.device[row]])
    if time_left < INF:
        out.laxity_s = time_left - (float(view.left[row]) / rate if rate > 0 else 0.0)
    if late and time_left < INF and rate > 0:
        out.mlu = float(view.left[row]) / (time_left * rate) if time_left > 0 else INF
    if transfer.stage.early:
        out.rli = int(view.target_layer[row] - view.current_layer[row])
    return out


def shown_level(level: int) -> int:
    """As in proto mfsd.v1.Connection.level."""
    return _SHOWN_LEVEL.get(level, level)
