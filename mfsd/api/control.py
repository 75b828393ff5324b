# SPDX-License-Identifier: Apache-2.0
"""The Control service: what operators see and do (proto/mfsd/v1/control.proto). mfsctl is its client."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

from google.rpc import code_pb2

from mfsd.api import errors, messages, pages, trace
from mfsd.engine.recorder import MOST, Recorder
from mfsd.ground.model import INF, PORT_MAX, HintError, Mode
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import grpc

    from mfsd.api.operations import Operations

    Context = grpc.aio.ServicerContext[Any, Any]

WATCH_MIN_US: Final = 100_000
WATCH_DEFAULT_US: Final = 1_000_000
RECORD_S: Final = 0.1
"""Between two replies to whoever makes a record."""
WATCHERS: Final = 64
"""At a time."""
LEVELS: Final = {
    pb.LOG_LEVEL_UNSPECIFIED: None,
    pb.LOG_LEVEL_DEBUG: "debug",
    pb.LOG_LEVEL_INFO: "info",
    pb.LOG_LEVEL_WARNING: "warning",
    pb.LOG_LEVEL_ERROR: "error",
}
LEVEL_NUMBERS: Final = {name: number for number, name in LEVELS.items()}
MODES: Final = {pb.MODE_OBSERVE: Mode.OBSERVE, pb.MODE_ENFORCE: Mode.ENFORCE}


class ControlService(control_pb2_grpc.ControlServicer):
    """Serves mfsd.v1.Control."""

    def __init__(self, daemon: Operations, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._daemon = daemon
        self._clock = clock
        self._watchers = 0
        self._views: dict[bool, tuple[float, pb.WatchReply]] = {}
        """When made, by whether connections are in it."""

    # --- looking ------------------------------------------------------------------------------------------------------

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.Status:
        """See the proto; so are the others."""
        return await self._status()

    async def ListConnections(
        self,
        request: pb.ListConnectionsRequest,
        context: Context,
    ) -> pb.ListConnectionsReply:
        """Connections, most urgent first."""
        try:
            return pages.connections(self._daemon.engine, self._clock(), request)
        except HintError as e:
            await errors.abort(context, e)

    async def ListTransfers(
        self,
        request: pb.ListTransfersRequest,
        context: Context,
    ) -> pb.ListTransfersReply:
        """Unfinished transfers, most urgent first."""
        try:
            return pages.transfers(self._daemon.engine, self._clock(), request)
        except HintError as e:
            await errors.abort(context, e)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchReply]:
        """Status every interval, until the client hangs up."""
        interval = request.interval_us or WATCH_DEFAULT_US
        if interval < WATCH_MIN_US:
            await _invalid(context, "interval_us", f"{interval} us", f"at least {WATCH_MIN_US}, or 0 for one second")
        if self._watchers >= WATCHERS:
            await _refuse(context, code_pb2.RESOURCE_EXHAUSTED, f"{WATCHERS} are watching already; end one of them")
        self._watchers += 1
        try:
            while True:
                yield await self._view(connections=request.connections)
                await asyncio.sleep(interval / 1e6)
        finally:
            self._watchers -= 1

    async def _view(self, *, connections: bool) -> pb.WatchReply:
        """What watchers see; made once for all of them who look at about the same time."""
        now = self._clock()
        made, view = self._views.get(connections, (-INF, pb.WatchReply()))
        if now - made >= WATCH_MIN_US / 2e6:
            first = pb.ListConnectionsRequest()
            page = pages.connections(self._daemon.engine, now, first).connections if connections else ()
            view = pb.WatchReply(status=await self._status(), connections=page)
            self._views[connections] = now, view
        return view

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.Explanation:
        """Why one connection or transfer is where it is."""
        engine, now = self._daemon.engine, self._clock()
        target = request.WhichOneof("target")
        if target is None:
            await _invalid(context, "target", "is not set", "name a slot, cookie or transfer_id")
        ways = await self._daemon.ways()
        if target == "slot":
            found = messages.explanation(engine, now, ways, slot=request.slot)
        elif target == "cookie":
            found = messages.explanation(engine, now, ways, cookie=request.cookie)
        else:
            found = messages.explanation(engine, now, ways, transfer_id=request.transfer_id)
        if found is None:
            value, what = getattr(request, str(target)), str(target).removesuffix("_id")
            if any(value in s.requests for s in engine.books.sessions.values()):
                await _not_found(context, f"{value!r} is a request; name one of its transfers, or a connection")
            await _not_found(context, f"no {what} {value!r}; it may be finished: list connections or transfers")
        return found

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.Metrics:
        """All metrics."""
        return pb.Metrics(text=await self._daemon.metrics())

    async def Trace(self, request: pb.TraceRequest, context: Context) -> pb.RequestTrace:
        """Where the time of one request went."""
        found = trace.of_request(self._daemon.engine, self._clock(), request.request_id, request.session)
        if found is None:
            await _not_found(context, f"no request {request.request_id!r} that is not over or was lately")
        return found

    # --- acting -------------------------------------------------------------------------------------------------------

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.Status:
        """Stop steering, keep hints and qdiscs."""
        self._daemon.engine.pause()
        self._daemon.steering_changed()
        return await self._status()

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.Status:
        """Undo Pause."""
        self._daemon.engine.resume()
        self._daemon.steering_changed()
        return await self._status()

    async def SetMode(self, request: pb.SetModeRequest, context: Context) -> pb.Status:
        """Observe or enforce."""
        mode = MODES.get(request.mode)
        if mode is None:
            await _invalid(context, "mode", f"unknown mode {request.mode}", "use MODE_OBSERVE (1) or MODE_ENFORCE (2)")
        await self._daemon.set_mode(mode)
        return await self._status()

    async def GetPlan(self, request: pb.GetPlanRequest, context: Context) -> pb.Plan:
        """What enforcing would change, or has changed."""
        return pb.Plan(devices=await self._daemon.plans(await self._named(request.device, context)))

    async def Restore(self, request: pb.RestoreRequest, context: Context) -> pb.RestoreReply:
        """Put the qdiscs back."""
        restored, problems = await self._daemon.restore(await self._named(request.device, context))
        return pb.RestoreReply(restored=restored, problems=problems)

    async def ListRules(self, request: pb.ListRulesRequest, context: Context) -> pb.ListRulesReply:
        """Rules, and what they say of connections."""
        if request.port > PORT_MAX:
            await _invalid(context, "port", f"{request.port} is no port", f"1 to {PORT_MAX}")
        verdicts = await self._daemon.verdicts(request.cookie, request.port)
        if (request.cookie or request.port) and not verdicts and self._daemon.rules:
            what = f"cookie {request.cookie}" if request.cookie else f"port {request.port}"
            await _not_found(context, f"no TCP connection of this host has {what}")
        return messages.rules(self._daemon, verdicts)

    async def Record(self, request: pb.RecordRequest, context: Context) -> AsyncIterator[pb.RecordReply]:
        """Hints and decisions as they happen."""
        engine = self._daemon.engine
        recorders = engine.books.recorders
        if len(recorders) >= MOST:
            await _refuse(
                context, code_pb2.RESOURCE_EXHAUSTED, f"{MOST} records are being made already; end one of them"
            )
        recorder = Recorder(engine.steering.policy, engine.steering.devices, self._clock())
        recorders.append(recorder)
        try:
            while True:
                yield pb.RecordReply(lines=recorder.take(self._clock()))
                await asyncio.sleep(RECORD_S)
        finally:
            recorders.remove(recorder)

    async def SetLogLevel(self, request: pb.SetLogLevelRequest, context: Context) -> pb.SetLogLevelReply:
        """Log more, or less."""
        if request.level not in LEVELS:
            await _invalid(context, "level", f"unknown level {request.level}", "use LOG_LEVEL_DEBUG (1) to ERROR (4)")
        return pb.SetLogLevelReply(level=LEVEL_NUMBERS[self._daemon.set_log_level(LEVELS[request.level])])

    async def _status(self) -> pb.Status:
        figures = await self._daemon.figures()
        return messages.status(self._daemon, figures, await self._daemon.ways(), self._clock())

    async def _named(self, name: str, context: Context) -> list[str]:
        known = [d.name for d in self._daemon.all_devices]
        if name and name not in known:
            await _not_found(context, f"no device {name!r} is configured; configured: {', '.join(known) or 'none'}")
        return [name] if name else known


async def _invalid(context: Context, field: str, problem: str, fix: str) -> NoReturn:
    await errors.abort(context, HintError(field, problem, fix))


async def _not_found(context: Context, message: str) -> NoReturn:
    await _refuse(context, code_pb2.NOT_FOUND, message)


async def _refuse(context: Context, code: int, message: str) -> NoReturn:
    await errors.abort(context, errors.Refused(code, message))
