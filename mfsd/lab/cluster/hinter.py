# SPDX-License-Identifier: Apache-2.0
"""What the serving processes tell the daemons, and what goes wrong with it.

One client per sending host: a request is announced wherever bytes of it leave, as a router would pass its deadline on.
What a host's client is to do goes to a Voice (teller.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfsd.model import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mfsd.lab.cluster.jobs import Job
    from mfsd.lab.cluster.lanes import Lane
    from mfsd.lab.cluster.teller import Voice


@dataclass(frozen=True, slots=True)
class Faults:
    """How hints deviate from the truth."""

    size: float = 1.0
    """Announced sizes are wrong by up to this factor, either way, log-uniformly; 1: exact."""
    lost: float = 0.0
    """Share of transfers that are not announced."""
    marks_lost: float = 0.0
    """Share of collective connections that are not marked."""
    deadline: float = 1.0
    """Announced time to the deadline over the true one."""


class Hinter:
    """Says what serving processes would; hosts without a daemon are told nothing."""

    def __init__(self, voice: Voice, steps: int, faults: Faults, seed: int) -> None:
        self._voice, self._steps, self._faults = voice, steps, faults
        self._over: set[tuple[str, int]] = set()
        """(host, request) whose bytes there have all been handed over: it need not hear of them again."""
        self._passes: dict[str, dict[str, list[int]]] = {}
        """Forward pass -> hosts that know it, and its requests there."""
        self._rng = random.Random(seed)  # noqa: S311 - a reproducible experiment, not a secret

    def collective(self, lane: Lane) -> None:
        """A connection of a collective group."""
        if lane.src.name in self._voice.hosts and self._rng.random() >= self._faults.marks_lost:
            self._voice.say(lane.src.name, "mark", lane.cookie, Stage.COLLECTIVE)

    def request(self, hosts: Iterable[str], job: Job, compute: float) -> None:
        """A request has arrived; bytes of it will leave ``hosts``."""
        for host in hosts:
            if host in self._voice.hosts:
                left = job.slo * self._faults.deadline
                self._voice.say(host, "request", f"r{job.id}", ttft_left_s=left, compute_left_s=compute)

    def send(self, lane: Lane, job: Job, step: int, size: int) -> None:
        """A step's KV is about to be written to a lane."""
        if lane.src.name not in self._voice.hosts or self._rng.random() < self._faults.lost:
            return
        if self._faults.size > 1.0:
            size = max(int(size * self._faults.size ** self._rng.uniform(-1, 1)), 1)
        self._voice.say(
            lane.src.name, "transfer", f"r{job.id}/{lane.stage}/{step}/{lane.dst.name}", lane.cookie, size,
            stage=lane.stage, request=f"r{job.id}", layer=step,
        )  # fmt: skip

    def sent(self, host: str, job: Job) -> None:
        """The last byte of a request has been handed to the host's sockets."""
        if host in self._voice.hosts:
            self._over.add((host, job.id))
            self._voice.say(host, "done", request=f"r{job.id}")

    def batch(self, hosts: Mapping[str, list[Job]], name: str, layer_compute: float) -> None:
        """A forward pass begins; ``hosts`` have bytes of these requests."""
        told = self._passes[name] = {}
        for host, jobs in hosts.items():
            members = [j.id for j in jobs if (host, j.id) not in self._over]
            if host in self._voice.hosts and members:
                told[host] = members
                names = [f"r{i}" for i in members]
                self._voice.say(host, "batch", name, names, layers=self._steps, layer_compute_s=layer_compute)

    def _concerned(self, name: str) -> list[str]:
        """Hosts that still have bytes of a pass: a daemon forgets a batch with the last of its requests."""
        told = self._passes[name].items()
        return [host for host, members in told if any((host, i) not in self._over for i in members)]

    def layer(self, name: str, step: int) -> None:
        """A pass is at this step."""
        for host in self._concerned(name):
            self._voice.say(host, "layer", name, step)

    def computed(self, name: str) -> None:
        """A pass has ended."""
        for host in self._concerned(name):
            self._voice.say(host, "layer", name, self._steps - 1, compute_done=True)
            self._voice.say(host, "done", batch=name)
        del self._passes[name]
