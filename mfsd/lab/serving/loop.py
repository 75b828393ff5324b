# SPDX-License-Identifier: Apache-2.0
"""One process that plays all hosts of a cluster: an event loop stands for all GPUs.

Sixteen ranks as processes would need sixteen processors to keep time, and two are all there is. One thread that runs
whenever it wants to (SCHED_RR) serves them all, less than 0.1 ms late per step of a pass, so figures come from this
driver. It can't show what processes on one host do to each other; processes.py can.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Final

import numpy as np
import psutil

from mfsd.lab.arms import arm_of
from mfsd.lab.hosts.machine import real_time
from mfsd.lab.serving.conduits import Conduits, cross_traffic, receive_kv
from mfsd.lab.serving.driver import Played
from mfsd.lab.serving.forward import Instance, Log, replay
from mfsd.lab.serving.hinter import Hinter
from mfsd.lab.serving.teller import Teller
from mfsd.lab.serving.wire import ARRIVAL, Ends

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from mfsd.lab.serving.driver import Task

SETTLE_S: Final = 0.2
LOOK_S: Final = 0.05


def play(task: Task) -> Played:
    """See driver.py. Raises LabError."""
    gc.collect()
    gc.disable()  # a collection in the middle would look like a late machine
    try:
        return asyncio.run(_play(task))
    except ExceptionGroup as e:
        raise e.exceptions[0] from e
    finally:
        gc.enable()


async def _play(task: Task) -> Played:
    settings, work, hosts = task.settings, task.work, task.network.fabric.hosts
    loop, log, arm = asyncio.get_running_loop(), Log(), arm_of(settings.arm)
    with Ends(settings.conduits(), hosts, settings.hosts) as ends, Teller(task.network.targets) as teller:
        ends.listen()
        ends.connect()
        receive_kv(settings, work, ends, log)
        hinter = Hinter(teller, settings.scaled.rounds, arm.faults, settings.seed)
        transports = [Conduits(i, settings, settings.hosts, ends, hinter, log) for i in range(settings.instances)]
        instances = {i: Instance(i, f"i{i}", settings, t, hinter, log) for i, t in enumerate(transports)}
        teller.settle()
        own = sum(psutil.Process().cpu_times()[:2])
        # Real GPUs do not wait for a processor that the daemons of eight hosts are using.
        with task.measure, real_time():
            begin = loop.time() + SETTLE_S
            endless = [*(i.run() for i in instances.values()), cross_traffic(settings, ends)]
            await _until_done(task, begin, log, [replay(work, begin, instances, log), *endless])
        own = sum(psutil.Process().cpu_times()[:2]) - own
        return Played(begin, log, np.array(ends.arrivals, dtype=ARRIVAL), teller.stats(), own)


async def _until_done(task: Task, begin: float, log: Log, all_of_it: Sequence[Coroutine[None, None, None]]) -> None:
    loop, until = asyncio.get_running_loop(), begin + task.work[-1].at + task.settings.patience
    failures: list[Exception] = []
    loop.set_exception_handler(lambda _loop, context: failures.append(context["exception"]))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(c) for c in all_of_it]
        while len(log.done) < len(task.work) and loop.time() < until:
            await asyncio.sleep(LOOK_S)
            task.on_progress(loop.time() - begin)
            if failures:
                raise failures[0]
        for each in running:
            each.cancel()
