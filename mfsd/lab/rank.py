# SPDX-License-Identifier: Apache-2.0
"""A prefill rank: continuous batching over real connections, with a sleep where the GPU would compute.

Two ranks run the layers of an iteration in lock step, as data-parallel attention with shared experts does. Per layer:

1. wait for the layer's cached KV of every request in the batch (stage 1, fetched from the other rank);
2. compute: sleep;
3. exchange with the other rank (stage 2), dispatch and combine in one message each way;
4. hand the layer's KV to the lanes to the decode host (stage 3).

A fetch is asked for on arrival. Whoever has the blocks sends them, layer by layer, and announces them to *its* daemon:
the asking rank told it the deadline. Requests for fetches and the beginning of iterations go over a unix socket, which
stands for the management network.
"""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.lab.traffic import Frame, Lane
from mfsd.lab.workload import next_batch
from mfsd.model import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.client import Client
    from mfsd.lab.messages import Messages
    from mfsd.lab.models import Scaled
    from mfsd.lab.workload import Job

KV_LANES: Final = 2
P2D_LANES: Final = 4
"""Per peer, as Mooncake's transfer engine keeps; a collective group has one connection per pair, as gloo's."""


@dataclass(slots=True)
class Lanes:
    """Outgoing connections of a rank."""

    exchange: Lane
    kv: list[Lane]
    p2d: list[Lane]

    def all(self) -> list[Lane]:
        """Every one of them."""
        return [self.exchange, *self.kv, *self.p2d]


@dataclass(slots=True)
class Log:
    """What a rank has measured. Times in monotonic seconds, durations in seconds."""

    exchanges: list[tuple[float, float, int]] = field(default_factory=list)
    """(begin, duration, bytes): from when both ranks have begun until the other's bytes are here."""
    fetch_waits: list[float] = field(default_factory=list)
    """Time a layer stood still because cached KV had not come."""
    computed: float = 0.0
    """Seconds of computing that were meant."""
    overslept: float = 0.0
    """Seconds by which the sleeps took longer: the machine's fault."""
    batches: list[tuple[float, float, list[int]]] = field(default_factory=list)
    """(begin, end, requests) of each iteration."""
    lane_of: dict[int, int] = field(default_factory=dict)
    """Request -> index of its P2D lane."""
    p2d_began: dict[int, float] = field(default_factory=dict)
    """Request -> when its first layer was handed over."""


class Rank:
    """One rank. ``start`` begins the replay at a given time; ``finished`` is set when both ranks have no more work."""

    def __init__(
        self, index: int, jobs: Sequence[Job], scaled: Scaled, lanes: Lanes, client: Client, max_batch: int
    ) -> None:
        self.index = index
        self.log = Log()
        self.finished = threading.Event()
        self._jobs, self._scaled, self._lanes, self._client, self._max_batch = jobs, scaled, lanes, client, max_batch
        self._layers = scaled.model.layers
        self._peer: Messages | None = None
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._open = len(jobs)
        """Own requests not computed yet."""
        self._peer_open = True
        self._iteration = 0
        self._begun: dict[int, int] = {}
        """Iteration -> tokens of the other rank."""
        self._fetched: dict[int, int] = {}
        """Request -> layers of cached KV that have come."""
        self._exchanged: dict[tuple[int, int], tuple[float, float]] = {}
        """(iteration, layer) -> when the other rank sent, when its last byte came."""

    # --- called by other threads --------------------------------------------------------------------------------------

    def on_frame(self, frame: Frame, at: float) -> None:
        """A frame has arrived."""
        with self._changed:
            if frame.stage is Stage.KV_REUSE:
                self._fetched[frame.key] = frame.layer + 1
            else:
                self._exchanged[frame.key, frame.layer] = frame.sent, at
            self._changed.notify_all()

    def on_message(self, message: dict[str, Any]) -> None:
        """The other rank has something to say."""
        if message["what"] == "fetch":
            self._serve(message)
            return
        with self._changed:
            if message["what"] == "begin":
                self._begun[message["iteration"]] = message["tokens"]
            else:
                self._peer_open = False
            self._changed.notify_all()

    def _serve(self, fetch: dict[str, Any]) -> None:
        """Send cached KV to the other rank."""
        key, size, client = int(fetch["id"]), self._scaled.kv(fetch["tokens"]), self._client
        request = f"f{key}"
        client.request(request, ttft_left_s=fetch["due"] - time.monotonic())
        lane = min(self._lanes.kv, key=lambda lane: lane.queued)
        for layer in range(self._layers):
            self._send(lane, Frame(Stage.KV_REUSE, key, layer, size, time.monotonic()), request)

    def _send(self, lane: Lane, frame: Frame, request: str) -> None:
        name, client, last = f"{request}/{frame.layer}", self._client, frame.layer == self._layers - 1

        def announce() -> None:
            client.transfer(name, lane.sock, frame.size, stage=frame.stage, request=request, layer=frame.layer)

        def written() -> None:
            # Bytes retire transfers by themselves; only the last one of a request is worth a message.
            if last:
                client.done(request=request)

        lane.put(frame, announce, written)

    # --- the replay ---------------------------------------------------------------------------------------------------

    def start(self, begin: float, peer: Messages) -> None:
        """Replay from ``begin`` (monotonic seconds) on."""
        self._peer = peer
        self._client.mark(self._lanes.exchange.sock, Stage.COLLECTIVE)
        for target in (lambda: self._arrive(begin), self._run):
            threading.Thread(target=target, daemon=True).start()

    def _arrive(self, begin: float) -> None:
        assert self._peer is not None  # noqa: S101 - for the type checker
        for job in self._jobs:
            time.sleep(max(begin + job.at - time.monotonic(), 0.0))
            due = begin + job.at + job.slo
            compute = self._scaled.compute(job.new) * self._layers
            self._client.request(f"r{job.id}", ttft_left_s=due - time.monotonic(), compute_left_s=compute)
            if job.remote:
                self._peer.send({"what": "fetch", "id": job.id, "tokens": job.remote, "due": due})
            with self._changed:
                self._waiting.append(job)
                self._changed.notify_all()

    def _run(self) -> None:
        assert self._peer is not None  # noqa: S101 - for the type checker
        if not self._open:
            self._peer.send({"what": "finished"})
        while True:
            with self._changed:
                self._changed.wait_for(self._due)
                if not self._waiting and not self._peer_began():
                    break
                batch = next_batch(self._waiting, self._max_batch)
            tokens = sum(j.new for j in batch)
            self._peer.send({"what": "begin", "iteration": self._iteration, "tokens": tokens})
            with self._changed:
                self._changed.wait_for(self._peer_began)
                tokens += self._begun.pop(self._iteration)
            self._iterate(self._iteration, batch, tokens)
            with self._changed:
                self._iteration += 1
                self._open -= len(batch)
                finished = batch and not self._open
            if finished:
                self._peer.send({"what": "finished"})
        self.finished.set()

    def _peer_began(self) -> bool:
        return self._iteration in self._begun

    def _due(self) -> bool:
        """There is something to compute, or never again."""
        return bool(self._waiting) or self._peer_began() or not (self._open or self._peer_open)

    def _iterate(self, iteration: int, batch: list[Job], tokens: int) -> None:
        """One forward pass of both ranks over ``tokens`` new tokens in all."""
        began, name, client = time.monotonic(), f"b{iteration}", self._client
        compute, size = self._scaled.compute(tokens), self._scaled.exchange(tokens)
        if batch:
            client.batch(name, [f"r{j.id}" for j in batch], layers=self._layers, layer_compute_s=compute)
        for job in batch:
            self.log.lane_of[job.id] = min(self._lanes.p2d, key=lambda lane: lane.queued).index
        for layer in range(self._layers):
            if batch:
                client.layer(name, layer)
            self._await_cached(batch, layer)
            self._compute(compute)
            self._exchange(iteration, layer, size)
            for job in batch:
                lane = next(lane for lane in self._lanes.p2d if lane.index == self.log.lane_of[job.id])
                now = time.monotonic()
                self.log.p2d_began.setdefault(job.id, now)
                self._send(lane, Frame(Stage.P2D, job.id, layer, self._scaled.kv(job.tokens), now), f"r{job.id}")
        if batch:
            client.layer(name, self._layers - 1, compute_done=True)
            client.done(batch=name)
            self.log.batches.append((began, time.monotonic(), [j.id for j in batch]))

    def _await_cached(self, batch: list[Job], layer: int) -> None:
        before = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: all(self._fetched.get(j.id, 0) > layer for j in batch if j.remote))
        if any(j.remote for j in batch):
            self.log.fetch_waits.append(time.monotonic() - before)

    def _compute(self, seconds: float) -> None:
        before = time.monotonic()
        time.sleep(seconds)
        self.log.computed += seconds
        self.log.overslept += time.monotonic() - before - seconds

    def _exchange(self, iteration: int, layer: int, size: int) -> None:
        began = time.monotonic()
        # Marked once as collective: no hint per message is needed.
        frame = Frame(Stage.COLLECTIVE, iteration, layer, size, began)
        self._lanes.exchange.put(frame, lambda: None, lambda: None)
        with self._changed:
            self._changed.wait_for(lambda: (iteration, layer) in self._exchanged)
            sent, arrived = self._exchanged.pop((iteration, layer))
        both = max(began, sent)
        self.log.exchanges.append((both, max(arrived - both, 0.0), size))
