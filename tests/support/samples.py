# SPDX-License-Identifier: Apache-2.0
"""Control and Hints with set answers, for a real gRPC server: mfsctl's tables and exit codes need no engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc, hints_pb2, hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

COOKIE = 2**63 + 5
"""Too big for a double and for a signed integer."""
LONG_V6 = "[fd12:3456:789a:bcde:f012:3456:789a:bcde]:65535 -> [fd12:3456:789a:bcde:f012:3456:789a:bcdf]:65534"


def status(**changes: Any) -> pb.Status:
    out = pb.Status(
        version="9.8.7",
        uptime_s=7980.0,
        epoch=77,
        mode=pb.MODE_ENFORCE,
        policy="mfs",
        sessions=2,
        requests=3,
        transfers=4,
        connections=5,
        slots=16384,
        rss_bytes=88_000_000,
        tick_p50_ms=0.31,
        tick_p99_ms=0.92,
        notices=["eth1: observed only: [link] is foreign"],
        counters=pb.Counters(deadlines_met=1_234_567, deadlines_missed=1, promotions=9, rescues=4),
    )
    device = out.devices.add(
        name="eth0", ifindex=2, backend="htb", attach="tcx", loader="libbpf", rate_bytes_per_s=125e6, utilisation=0.73
    )
    device.bands.add(name="control", classid="6d66:1001", lanes=1, floor_bytes_per_s=2.5e6, dscp=-1)
    device.bands.add(
        index=1, name="level 0", classid="6d66:2001", lanes=32, bytes=10**15, packets=10**12, drops=5, dscp=46,
        backlog_bytes=262144, connections=5,
    )  # fmt: skip
    device.stats["cookie"] = 10**9
    device.stats["miss"] = 0
    for name, value in changes.items():
        setattr(out, name, value)
    return out


def connection() -> pb.Connection:
    return pb.Connection(
        slot=16383, cookie=COOKIE, endpoints=LONG_V6, level=0, band="level 0", lane=31, stage=hints_pb2.STAGE_P2D,
        transfers=12, bytes_left=10**12, bytes_sent=999_999_999_999, promotions=100, rescues=99, expires_us=29_900_000,
        session="host:1:2",
    )  # fmt: skip


def transfers() -> list[pb.TransferState]:
    return [
        pb.TransferState(
            id="t" * 60, request_id="request-" * 8, stage=hints_pb2.STAGE_P2D, target_layer=79, bytes=10**12,
            bytes_left=999_999_999_999, deadline_us=-686_000, mlu=1.25, level=-2, slot=7,
        ),
        pb.TransferState(id="t2", batch_id="b", stage=hints_pb2.STAGE_COLLECTIVE, bytes=5, rli=0, level=-1, slot=-1),
    ]  # fmt: skip


class Canned(control_pb2_grpc.ControlServicer, hints_pb2_grpc.HintsServicer):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.mode = pb.MODE_ENFORCE
        self.paused = False
        self.empty = False
        self.fail: grpc.StatusCode | None = None
        self.batches: list[hints_pb2.HintBatch] = []
        self.asked: list[Any] = []

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.asked.append(request)
        if self.fail is not None:
            context.abort(self.fail, "so it was told")

    def _status(self) -> pb.Status:
        return pb.Status(version="9.8.7") if self.empty else status(mode=self.mode, paused=self.paused)

    def GetStatus(self, request: Any, context: grpc.ServicerContext) -> pb.Status:  # noqa: N802 - as generated
        self._note(request, context)
        return self._status()

    def ListConnections(self, request: Any, context: grpc.ServicerContext) -> pb.ListConnectionsReply:  # noqa: N802
        self._note(request, context)
        return pb.ListConnectionsReply(connections=[] if self.empty else [connection()])

    def ListTransfers(self, request: Any, context: grpc.ServicerContext) -> pb.ListTransfersReply:  # noqa: N802
        self._note(request, context)
        return pb.ListTransfersReply(transfers=[] if self.empty else transfers())

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.WatchReply]:  # noqa: N802
        self._note(request, context)
        while context.is_active():
            yield pb.WatchReply(status=self._status(), connections=[connection()] if request.connections else [])
            time.sleep(0.01)

    def Explain(self, request: Any, context: grpc.ServicerContext) -> pb.Explanation:  # noqa: N802
        self._note(request, context)
        if request.transfer_id == "nobody":
            context.abort(grpc.StatusCode.NOT_FOUND, "no transfer_id 'nobody'")
        return pb.Explanation(
            connection=connection(),
            transfers=transfers(),
            reasons=["word " * 60 + "end", "second"],
            figures={"mlu": float("inf"), "rho": 0.25},
        )

    def Pause(self, request: Any, context: grpc.ServicerContext) -> pb.Status:  # noqa: N802
        self._note(request, context)
        self.paused = True
        return self._status()

    def Resume(self, request: Any, context: grpc.ServicerContext) -> pb.Status:  # noqa: N802
        self._note(request, context)
        self.paused = False
        return self._status()

    def SetMode(self, request: Any, context: grpc.ServicerContext) -> pb.Status:  # noqa: N802
        self._note(request, context)
        self.mode = request.mode
        return self._status()

    def GetPlan(self, request: Any, context: grpc.ServicerContext) -> pb.Plan:  # noqa: N802
        self._note(request, context)
        if request.device == "refused":
            return pb.Plan(devices=[pb.DevicePlan(device="refused", found=["qdisc taprio"], refusals=["not exactly"])])
        step = pb.PlanStep(what="A step", command="tc class add " + "dev eth0 " * 30, done=True)
        return pb.Plan(
            devices=[
                pb.DevicePlan(device="eth0", backend="htb", found=["qdisc mq 0: root"], steps=[step], undo=["back"]),
                pb.DevicePlan(device="eth1", backend="prio", reasons=["auto"]),
            ]
        )

    def Restore(self, request: Any, context: grpc.ServicerContext) -> pb.RestoreReply:  # noqa: N802
        self._note(request, context)
        if request.device == "broken":
            return pb.RestoreReply(problems=["broken: somebody replaced the root"])
        return pb.RestoreReply(restored=["eth0"])

    def Stream(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[hints_pb2.HintReply]:  # noqa: N802
        """Not used by mfsctl."""
        return (self.Send(batch, context) for batch in request_iterator)

    def Send(self, request: hints_pb2.HintBatch, context: grpc.ServicerContext) -> hints_pb2.HintReply:  # noqa: N802
        self._note(request, context)
        self.batches.append(request)
        reply = hints_pb2.HintReply(seq=request.seq, epoch=77)
        if request.session == "bad":
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field="transfer.bytes", description="must be above zero")
            wrong = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="not to be seen")
            wrong.details.add().Pack(bad)
            reply.rejected.add(index=0).status.CopyFrom(wrong)
        else:
            reply.accepted = 1
            reply.events.add(kind=hints_pb2.Event.INFEASIBLE, transfer_id="t9", reason="too late")
        return reply
