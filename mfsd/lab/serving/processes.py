# SPDX-License-Identifier: Apache-2.0
"""A process per host: what the demo and the real transports are played by. The other ends: worker.py.

gloo and Mooncake's transfer engine know one host per process, and the demo is to show daemon and serving processes side
by side as they are on real hosts, so here ranks are processes, and agree over the network what they compute next. They
keep time only as long as there are few of them; loop.py plays whole clusters.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mfsd.lab.hosts.child import Child
from mfsd.lab.hosts.governor import added_up
from mfsd.lab.hosts.levels import LevelWatch
from mfsd.lab.serving import real
from mfsd.lab.serving.driver import Part, Played
from mfsd.lab.serving.forward import Log

if TYPE_CHECKING:
    from mfsd.lab.serving.driver import Task

READY_S: Final = 60.0
"""Importing torch takes a while, twice on two cores."""
SETTLE_S: Final = 0.3
LOOK_S: Final = 0.1
END_S: Final = 20.0


def play(task: Task) -> Played:
    """See driver.py. Raises LabError."""
    s, network = task.settings, task.network
    env = {}
    if s.transport == "real":
        real.check_extra()
        env = real.ENVIRONMENT
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mfsd-")))
        children: dict[str, Child] = {}
        for host in s.hosts:
            children[host] = child = stack.enter_context(Child("mfsd.lab.serving.worker", host, env=env))
            child.say(Part(host, directory, s, network.fabric.hosts, network.targets, list(task.work)))
        return _replay(task, children)


def _replay(task: Task, children: dict[str, Child]) -> Played:
    """What is said and when: worker.py."""
    peers = {host: child.hear(READY_S) for host, child in children.items()}
    _tell(children, peers)
    cookies = {host: child.hear(END_S) for host, child in children.items()}
    governors = task.network.governors.items()
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(LevelWatch(g, cookies[host])) for host, g in governors if cookies[host]]
        stack.enter_context(task.measure)
        begin = time.monotonic() + SETTLE_S
        _tell(children, begin)
        until = begin + task.work[-1].at + task.settings.patience
        done = 0
        while done < len(task.work) and time.monotonic() < until:
            time.sleep(LOOK_S)
            task.on_progress(time.monotonic() - begin)
            for child in children.values():
                while child.heard():
                    done += child.hear(END_S)
    _tell(children, "stop")
    each = [_last(child) for child in children.values()]
    log = Log()
    for one in each:
        log.add(one.log)
    arrivals, hints = np.concatenate([one.arrivals for one in each]), added_up(one.hints for one in each)
    return Played(begin, log, arrivals, hints, sum(one.cpu_s for one in each), [c for w in watches for c in w.changes])


def _tell(children: dict[str, Child], message: Any) -> None:
    for child in children.values():
        child.say(message)


def _last(child: Child) -> Played:
    while not isinstance(said := child.hear(END_S), Played):
        pass
    return said
