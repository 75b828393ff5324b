# SPDX-License-Identifier: Apache-2.0
"""What the serving processes tell the daemons, and what goes wrong with it.

One client per sending host: a request is announced wherever bytes of it leave, as a router would pass its deadline on.
What a host's client is to do goes to a Voice (teller.py); hosts that it does not speak for are told nothing.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

from mfsd.ground.model import Stage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from typing import Any

    from mfsd.ground.model import Selector
    from mfsd.lab.arms import Faults
    from mfsd.lab.requests import Request
    from mfsd.lab.settings import Conduit


class Voice(Protocol):
    """Whoever takes hints for hosts."""

    @property
    def hosts(self) -> Collection[str]:
        """Those that it can speak for: they have a daemon."""
        ...

    def say(self, host: str, method: str, *args: Any, **kwargs: Any) -> None:
        """Have the client of ``host`` call a method; nothing comes back."""
        ...


class Hinter:
    """Says what serving processes would. ``connection``: what names it to the client."""

    def __init__(self, voice: Voice, steps: int, faults: Faults, seed: int) -> None:
        self._voice, self._steps, self._faults = voice, steps, faults
        self._over: set[tuple[str, int]] = set()
        """(host, request) whose bytes there have all been handed over: it need not hear of them again."""
        self._passes: dict[str, dict[str, list[int]]] = {}
        """Forward pass -> hosts that know it, and its requests there."""
        self._rng = random.Random(seed)  # noqa: S311 - a reproducible experiment, not a secret

    def collective(self, host: str, connection: Selector) -> None:
        """A connection of a collective group: marked once, so that no hint per message is needed."""
        if host in self._voice.hosts and self._rng.random() >= self._faults.marks_lost:
            self._voice.say(host, "mark", connection, Stage.COLLECTIVE)

    def request(self, hosts: Iterable[str], request: Request, left: float, compute: float = 0.0) -> None:
        """A request, due in ``left`` seconds, has arrived; bytes of it will leave ``hosts``."""
        left *= self._faults.deadline
        for host in hosts:
            if host in self._voice.hosts:
                self._voice.say(host, "request", f"r{request.id}", ttft_left_s=left, compute_left_s=compute)

    def send(self, conduit: Conduit, connection: Selector, request: Request, step: int, size: int) -> None:
        """A step's KV is about to be sent."""
        if conduit.src not in self._voice.hosts or self._rng.random() < self._faults.lost:
            return
        if self._faults.size > 1.0:
            size = max(int(size * self._faults.size ** self._rng.uniform(-1, 1)), 1)
        self._voice.say(
            conduit.src, "transfer", _name(conduit, request, step), connection, size, stage=conduit.stage,
            request=f"r{request.id}", layer=step,
        )  # fmt: skip

    def moved(self, conduit: Conduit, request: Request, step: int) -> None:
        """That is done. Bytes retire transfers by themselves where the connection is known for certain."""
        if conduit.src in self._voice.hosts:
            self._voice.say(conduit.src, "done", transfer=_name(conduit, request, step))

    def sent(self, host: str, request: Request) -> None:
        """The last byte of a request has been handed to the host's sockets."""
        if host in self._voice.hosts:
            self._over.add((host, request.id))
            self._voice.say(host, "done", request=f"r{request.id}")

    def batch(self, hosts: Mapping[str, list[Request]], name: str, layer_compute: float) -> None:
        """A forward pass begins; ``hosts`` have bytes of these requests."""
        told = self._passes[name] = {}
        for host, requests in hosts.items():
            members = [r.id for r in requests if (host, r.id) not in self._over]
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


def _name(conduit: Conduit, request: Request, step: int) -> str:
    return f"r{request.id}/{conduit.stage}/{step}/{conduit.dst}"
