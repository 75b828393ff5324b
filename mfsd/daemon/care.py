# SPDX-License-Identifier: Apache-2.0
"""Work on devices: in a worker thread, one piece at a time; regularly, and when something has changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from mfsd.daemon import config_bands
from mfsd.datapath.errors import DatapathError
from mfsd.ground import logs
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.daemon.device import Device
    from mfsd.daemon.devices import Devices
    from mfsd.daemon.supervisor import Supervisor
    from mfsd.datapath.qdisc.plan import DevicePlan
    from mfsd.engine.engine import Engine

CARE_S: Final = 5.0
"""How often devices are looked after: missing, returned, or changed by somebody else."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Care:
    """Has the devices looked after, and takes over from the daemon before."""

    def __init__(self, devices: Devices, engine: Engine, supervisor: Supervisor) -> None:
        self._devices = devices
        self._engine = engine
        self._supervisor = supervisor
        self._predecessor = devices.predecessor
        self._turn = asyncio.Lock()
        self.failure = ""
        """Why devices could not be looked after; empty when they could."""

    async def do(self, work: Callable[[], T]) -> T:
        """Run blocking work on devices."""
        async with self._turn:
            return await asyncio.to_thread(work)

    async def look(self) -> None:
        """Bring every device to the state it should be in."""
        await self._tend(lambda: self._devices.care(self._engine.mode))

    async def _tend(self, work: Callable[[], None]) -> None:
        """Work after which the service manager may have to keep other descriptors."""
        async with self._turn:
            await asyncio.to_thread(work)
            if not self._predecessor.at_work:
                self._supervisor.keep(self._devices.descriptors())

    async def keep_looking(self) -> None:
        """Again and again."""
        seldom = logs.Seldom()
        while True:
            await asyncio.sleep(CARE_S)
            try:
                await self.look()
            except Exception as e:  # devices must be looked after next time all the same
                self.failure = f"looking after the devices failed: {type(e).__name__}: {e}".rstrip(": ")
                if seldom("care"):
                    log.exception("looking after the devices failed")
            else:
                self.failure = ""

    async def succeed(self) -> None:
        """Once its clients have had time to come back, take over from the daemon before."""
        if self._predecessor.at_work:
            await asyncio.sleep(self._predecessor.settle_s)
            await self.take_over()

    async def take_over(self) -> None:
        """At once."""
        if not self._predecessor.at_work:
            return
        await self._tend(lambda: self._devices.succeed(self._engine.mode))
        connections = len(self._engine.connections)
        log.info("took over", away_ms=round(self._predecessor.away_s * 1000), connections=connections)

    async def plans(self, names: Sequence[str]) -> list[pb.DevicePlan]:
        """What enforcing changes, or has changed, on these devices."""
        out = [_message(device, plan) for device, plan in await self.do(lambda: self._devices.plans(names))]
        for plan in out:
            plan.reasons.extend(filter(None, [self._devices.network.words]))
        return out


def _message(device: Device, plan: DevicePlan | DatapathError) -> pb.DevicePlan:
    if isinstance(plan, DatapathError):
        return pb.DevicePlan(device=device.name, refusals=[str(plan)])
    return pb.DevicePlan(
        device=plan.ifname,
        backend=plan.backend,
        found=plan.found,
        steps=[pb.PlanStep(what=s.text, command=s.command, done=device.enforced) for s in plan.steps],
        refusals=plan.refusals,
        undo=[f"{s.text}: {s.command}" for s in plan.undo],
        reasons=plan.reasons,
        marks=config_bands.marks_in_words(device.dscp, device.bands),
    )
