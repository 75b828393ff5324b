# SPDX-License-Identifier: Apache-2.0
"""The Control service: what operators see and do (proto/mfsd/v1/control.proto). mfsctl is its client."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

import numpy as np
import psutil
from google.rpc import code_pb2, status_pb2

import mfsd
from mfsd.api import errors, inspect
from mfsd.datapath import _abi
from mfsd.model import Mode
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import grpc

    from mfsd.daemon.devices import BandRow, GuardedPort
    from mfsd.engine.engine import Engine

    Context = grpc.aio.ServicerContext[Any, Any]

WATCH_MIN_US: Final = 100_000
WATCH_DEFAULT_US: Final = 1_000_000
MODES: Final = {pb.MODE_OBSERVE: Mode.OBSERVE, pb.MODE_ENFORCE: Mode.ENFORCE}
STATS: Final = {
    name.removeprefix("STAT_").lower(): number
    for name, number in vars(_abi).items()
    if name.startswith("STAT_") and name != "STAT_MAX"
}
"""Index by name of the classifier's counters (enum mfsd_stat in bpf/mfsd.h)."""


class Operations(Protocol):
    """What the service asks of the daemon; see mfsd.daemon.Daemon."""

    engine: Engine
    started: float

    @property
    def ports(self) -> Sequence[GuardedPort]:
        """The configured devices."""
        ...

    def notices(self) -> list[str]:
        """Things an operator should know."""
        ...

    def tick_durations(self) -> tuple[float, float]:
        """Median and 99th percentile, seconds."""
        ...

    def steering_changed(self) -> None:
        """Mode or pause have changed: tell the kernel."""
        ...

    async def set_mode(self, mode: Mode) -> None:
        """Observe or enforce; the latter installs the qdiscs where they are not yet."""
        ...

    async def plans(self, ports: Sequence[GuardedPort]) -> list[pb.DevicePlan]:
        """What enforcing changes, or has changed."""
        ...

    async def restore(self, ports: Sequence[GuardedPort]) -> tuple[list[str], list[str]]:
        """Put qdiscs back; names of the restored devices, and problems."""
        ...


class ControlService(control_pb2_grpc.ControlServicer):
    """Serves mfsd.v1.Control."""

    def __init__(self, daemon: Operations, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._daemon = daemon
        self._clock = clock
        self._process = psutil.Process()

    # --- looking ------------------------------------------------------------------------------------------------------

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.Status:  # noqa: ARG002, N802 - as generated
        """See the proto; so are the others."""
        return self.status()

    async def ListConnections(  # noqa: N802 - as generated
        self,
        request: pb.ListConnectionsRequest,
        context: Context,  # noqa: ARG002
    ) -> pb.ListConnectionsReply:
        """Connections, most urgent first."""
        return pb.ListConnectionsReply(connections=self.connections(request.limit))

    async def ListTransfers(  # noqa: N802 - as generated
        self,
        request: pb.ListTransfersRequest,
        context: Context,  # noqa: ARG002
    ) -> pb.ListTransfersReply:
        """Unfinished transfers, most urgent first."""
        found = inspect.transfers(self._daemon.engine, self._clock(), request.limit)
        return pb.ListTransfersReply(transfers=[_transfer(t) for t in found])

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchReply]:  # noqa: N802 - as generated
        """Status every interval, until the client hangs up."""
        interval = request.interval_us or WATCH_DEFAULT_US
        if interval < WATCH_MIN_US:
            await _invalid(context, "interval_us", f"{interval} us", f"at least {WATCH_MIN_US}, or 0 for one second")
        while True:
            yield pb.WatchReply(status=self.status(), connections=self.connections() if request.connections else ())
            await asyncio.sleep(interval / 1e6)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.Explanation:  # noqa: N802 - as generated
        """Why one connection or transfer is where it is."""
        engine, now = self._daemon.engine, self._clock()
        target = request.WhichOneof("target")
        if target is None:
            await _invalid(context, "target", "is not set", "name a slot, cookie or transfer_id")
        if target == "slot":
            found = inspect.explain(engine, now, slot=request.slot)
        elif target == "cookie":
            found = inspect.explain(engine, now, cookie=request.cookie)
        else:
            found = inspect.explain(engine, now, transfer_id=request.transfer_id)
        if found is None:
            value = getattr(request, str(target))
            await _not_found(context, f"no {target} {value!r}; it may be finished: list connections or transfers")
        return pb.Explanation(
            connection=_connection(found.connection) if found.connection is not None else None,
            transfers=[_transfer(t) for t in found.transfers],
            reasons=found.reasons,
            figures=found.figures,
        )

    # --- acting -------------------------------------------------------------------------------------------------------

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.Status:  # noqa: ARG002, N802 - as generated
        """Stop steering, keep hints and qdiscs."""
        self._daemon.engine.pause()
        self._daemon.steering_changed()
        return self.status()

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.Status:  # noqa: ARG002, N802 - as generated
        """Undo Pause."""
        self._daemon.engine.resume()
        self._daemon.steering_changed()
        return self.status()

    async def SetMode(self, request: pb.SetModeRequest, context: Context) -> pb.Status:  # noqa: N802 - as generated
        """Observe or enforce."""
        mode = MODES.get(request.mode)
        if mode is None:
            await _invalid(context, "mode", f"unknown mode {request.mode}", "use MODE_OBSERVE (1) or MODE_ENFORCE (2)")
        await self._daemon.set_mode(mode)
        return self.status()

    async def GetPlan(self, request: pb.GetPlanRequest, context: Context) -> pb.Plan:  # noqa: N802 - as generated
        """What enforcing would change, or has changed."""
        return pb.Plan(devices=await self._daemon.plans(await self._named(request.device, context)))

    async def Restore(self, request: pb.RestoreRequest, context: Context) -> pb.RestoreReply:  # noqa: N802 - as generated
        """Put the qdiscs back."""
        restored, problems = await self._daemon.restore(await self._named(request.device, context))
        return pb.RestoreReply(restored=restored, problems=problems)

    async def _named(self, name: str, context: Context) -> list[GuardedPort]:
        ports = [p for p in self._daemon.ports if name in ("", p.name)]
        if name and not ports:
            known = ", ".join(p.name for p in self._daemon.ports) or "none"
            await _not_found(context, f"no device {name!r} is configured; configured: {known}")
        return ports

    # --- messages -----------------------------------------------------------------------------------------------------

    def connections(self, limit: int = 0) -> list[pb.Connection]:
        """Known connections, most urgent first."""
        return [_connection(c) for c in inspect.connections(self._daemon.engine, self._clock(), limit)]

    def status(self) -> pb.Status:
        """One screen."""
        daemon, engine = self._daemon, self._daemon.engine
        p50, p99 = daemon.tick_durations()
        counters = engine.counters
        return pb.Status(
            version=mfsd.__version__,
            uptime_s=self._clock() - daemon.started,
            epoch=engine.epoch,
            mode=pb.MODE_ENFORCE if engine.mode is Mode.ENFORCE else pb.MODE_OBSERVE,
            paused=engine.paused,
            policy=engine.steering.policy.name,
            devices=[self._device(i, p) for i, p in enumerate(daemon.ports)],
            sessions=len(engine.sessions),
            requests=engine.requests.n,
            batches=engine.batches.n,
            transfers=engine.transfers.n,
            connections=len(engine.connections),
            slots=len(engine.connections.table),
            pending_selectors=engine.pending_selectors,
            counters=pb.Counters(**{f.name: getattr(counters, f.name) for f in pb.Counters.DESCRIPTOR.fields}),
            rss_bytes=self._process.memory_info().rss,
            tick_p50_ms=p50 * 1000,
            tick_p99_ms=p99 * 1000,
            notices=daemon.notices(),
        )

    def _device(self, index: int, port: GuardedPort) -> pb.Device:
        stats = port.classifier.stats()
        users = np.zeros(_abi.MAX_BANDS, dtype=np.int64)
        connections = self._daemon.engine.connections
        for conn in connections.by_slot.values():
            if connections.port[conn.slot] == index:
                users[conn.band] += 1
        return pb.Device(
            name=port.name,
            ifindex=port.ifindex,
            backend=port.backend,
            attach=port.attachment.method if port.attachment is not None else "",
            loader=port.loader,
            rate_bytes_per_s=port.estimator.configured,
            measured_bytes_per_s=port.estimator.measured,
            utilisation=port.estimator.utilisation,
            bands=[_band(port, row, int(users[row.index])) for row in port.band_rows()],
            stats={name: int(stats[number]) for name, number in STATS.items()},
        )


def _band(port: GuardedPort, row: BandRow, connections: int) -> pb.Band:
    spec = port.bands.bands[row.index]
    return pb.Band(
        index=row.index,
        name=spec.name,
        classid=row.classid,
        lanes=row.lanes,
        floor_bytes_per_s=spec.floor * port.estimator.configured if port.floors else 0.0,
        bytes=row.bytes,
        packets=row.packets,
        drops=row.drops,
        backlog_bytes=row.backlog,
        dscp=port.dscp.get(spec.name, -1),
        connections=connections,
    )


def _connection(c: inspect.ConnectionInfo) -> pb.Connection:
    return pb.Connection(
        slot=c.slot,
        cookie=c.cookie,
        endpoints=c.endpoints,
        level=c.level,
        band=c.band,
        lane=c.lane,
        stage=int(c.stage),  # type: ignore[arg-type]  # an open enum on the wire
        transfers=c.transfers,
        bytes_left=c.bytes_left,
        bytes_sent=c.bytes_sent,
        promotions=c.promotions,
        rescues=c.rescues,
        expires_us=round(c.expires_s * 1e6),
        session=c.session,
    )


def _transfer(t: inspect.TransferInfo) -> pb.TransferState:
    out = pb.TransferState(
        id=t.id,
        session=t.session,
        request_id=t.request_id,
        batch_id=t.batch_id,
        stage=int(t.stage),  # type: ignore[arg-type]  # an open enum on the wire
        target_layer=t.target_layer,
        bytes=t.size,
        bytes_left=t.left,
        level=t.level,
        slot=t.slot,
    )
    if t.deadline_s is not None:
        out.deadline_us = round(t.deadline_s * 1e6)
    if t.mlu is not None:
        out.mlu = t.mlu
    if t.rli is not None:
        out.rli = t.rli
    return out


async def _invalid(context: Context, field: str, problem: str, fix: str) -> NoReturn:
    await errors.abort(context, errors.violation(code_pb2.INVALID_ARGUMENT, field, problem, fix))


async def _not_found(context: Context, message: str) -> NoReturn:
    await errors.abort(context, status_pb2.Status(code=code_pb2.NOT_FOUND, message=message))
