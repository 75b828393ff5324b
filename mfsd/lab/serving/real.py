# SPDX-License-Identifier: Apache-2.0
"""Transports that serving systems use, unmodified: gloo for collectives, Mooncake's transfer engine for KV, on TCP.

mfsd does not see their sockets before they send: hints name them by addresses and ports, as an adapter of a serving
system would, and say when a transfer is done, since one selector names several connections. Both block, so they are
called in threads. Needs the extra ``transports``.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from mfsd.client import tuple_of
from mfsd.ground.model import Stage
from mfsd.lab.hosts.net import DEVICE, LabError
from mfsd.lab.serving.mooncake import PORTS, SLICE, Memory, Mooncake, Watch
from mfsd.lab.settings import KV_CONDUITS, P2D_CONDUITS, Conduit

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.ground.model import Selector
    from mfsd.lab.requests import Request
    from mfsd.lab.serving.driver import Part
    from mfsd.lab.serving.forward import Inbox, Log, Transport
    from mfsd.lab.serving.hinter import Hinter

RENDEZVOUS: Final = 29_500
LOOK_S: Final = 0.002
IDLE_S: Final = 0.002
"""Between two questions whether any rank has work."""
ENVIRONMENT: Final = {
    "MC_MIN_RPC_PORT": str(PORTS[0]),
    "MC_MAX_RPC_PORT": str(PORTS[1]),
    "MC_TCP_SLICE_SIZE": str(SLICE),
    "MC_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": DEVICE,
}
"""Of the processes."""


def check_extra() -> None:
    """Raise LabError when a transport is not installed."""
    missing = [name for name in ("torch", "mooncake") if importlib.util.find_spec(name) is None]
    if missing:
        raise LabError(
            f"{' and '.join(missing)} not installed: in a clone, pip install -e '.[transports]' (--extra-index-url "
            "https://download.pytorch.org/whl/cpu spares torch's 5 GB of CUDA; Debian also needs libibverbs1 libnuma1)"
        )


class RealSide:
    """One host's side; see worker.TcpSide."""

    def __init__(self, part: Part, log: Log) -> None:
        self.part, self.log = part, log
        s = part.settings
        self._work = [r for r in part.work if f"d{r.decode}" == part.host]
        self.conduits = {(c.src, c.dst, c.stage): c for c in reversed(s.conduits())}
        """The first of each kind: which one a slice takes is not known."""
        self.arrivals: list[tuple[float, int, int, int]] = []
        self.speaks_for = [part.host, *(h for h in s.hosts if h.startswith("s"))]
        self.cookies: dict[int, int] = {}
        self._peers: dict[str, dict[str, Any]] = {}

    async def open(self) -> dict[str, Any]:
        """As there."""
        part, scaled = self.part, self.part.settings.scaled
        mooncake = self._mooncake = Mooncake(part.hosts[part.host].address)
        if part.host.startswith("d"):
            self._memory = Memory.of(self._work, scaled)
            self._data, address = mooncake.memory(self._memory.total)
        else:
            largest = max(scaled.kv(max(r.tokens, r.remote)) for r in part.work)
            data, address = mooncake.memory(largest)
            data[:] = 1
        if part.host in part.settings.ranks:
            self._source = address
            _, self._sink = mooncake.memory(largest)
            self.group = _Group(part)
        return {"session": mooncake.session, "address": address}

    async def connect(self, peers: dict[str, dict[str, Any]]) -> None:
        """As there."""
        self._peers = peers

    def read(self, holder: str, size: int) -> None:
        """Read from another host's memory, which is nothing but ones."""
        self._mooncake.read(self._peers[holder]["session"], self._sink, self._peers[holder]["address"], size)

    def write(self, decode: str, offset: int, size: int) -> None:
        """Write ones into a decode host's memory."""
        remote = self._peers[decode]["address"] + offset
        self._mooncake.write(self._peers[decode]["session"], self._source, remote, size)

    def transports(self, hinter: Hinter) -> list[Transport]:
        """As there."""
        return [Real(self, hinter)] if self.part.host in self.part.settings.ranks else []

    async def look(self) -> None:
        """Look for what has arrived at a decode host."""
        if not self.part.host.startswith("d"):
            return
        coming, watch = collections.deque(self._work), Watch(self._memory, self._data)
        senders = {r.id: self.conduits[f"p{r.rank}", self.part.host, Stage.P2D].number for r in self._work}
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            while coming and self.part.begin + coming[0].at <= now:
                watch.expect(coming.popleft().id)
            for request, size, complete in watch.look():
                self.arrivals.append((now, senders[request], request, size))
                if complete:
                    self.log.done[request] = now


class _Group:
    """The collective group of the ranks: gloo. Its calls block, one at a time, in a thread of their own."""

    def __init__(self, part: Part) -> None:
        import torch  # noqa: PLC0415 - an extra
        import torch.distributed as dist  # noqa: PLC0415 - as above

        self._torch: Any = torch
        self._dist: Any = dist
        torch.set_num_threads(1)
        self._ranks = part.settings.prefill
        master = f"tcp://{part.hosts['p0'].address}:{RENDEZVOUS}"
        dist.init_process_group("gloo", init_method=master, rank=int(part.host[1:]), world_size=self._ranks)
        self._thread = ThreadPoolExecutor(1)
        self._buffers = self._pair(1)
        dist.all_to_all_single(*self._buffers)  # connects, so that a mark finds the connection

    def _pair(self, size: int) -> tuple[Any, Any]:
        into, out = (self._torch.zeros(self._ranks * size, dtype=self._torch.uint8) for _ in range(2))
        return into, out

    async def _do(self, call: Callable[..., Any], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(call, *args))

    async def total(self, number: int) -> int:
        """Sum over the ranks."""
        tensor = self._torch.tensor([number], dtype=self._torch.int64)
        await self._do(self._dist.all_reduce, tensor)
        return int(tensor[0])

    async def exchange(self, size: int) -> None:
        """``size`` bytes from each rank to each other."""
        if len(self._buffers[0]) != self._ranks * size:
            self._buffers = self._pair(size)
        await self._do(self._dist.all_to_all_single, *self._buffers)


class Real:
    """One rank; see Transport."""

    def __init__(self, side: RealSide, hinter: Hinter) -> None:
        self._side, self._hinter = side, hinter
        self._settings = side.part.settings
        self._scaled = self._settings.scaled
        self._loop = asyncio.get_running_loop()
        self._here = side.part.host
        self._addresses = {name: host.address for name, host in side.part.hosts.items()}
        self._memories = {
            f"d{d}": Memory.of([r for r in side.part.work if r.decode == d], self._scaled)
            for d in range(self._settings.decode)
        }
        self._reading, self._writing = ThreadPoolExecutor(KV_CONDUITS), ThreadPoolExecutor(P2D_CONDUITS)
        self._reads: dict[tuple[int, int], list[asyncio.Future[None]]] = collections.defaultdict(list)
        """By request and step; several are read at once, so they end in any order."""
        self._left: dict[tuple[str, int], int] = {}
        """(sending host, request) -> steps that have not come."""
        for other in self._settings.ranks:
            if other != self._here:
                hinter.collective(self._here, tuple_of(self._addresses[other], 0))

    async def agree(self, inbox: Inbox) -> tuple[list[Request], int]:
        """See Transport. Ranks ask each other again and again: gloo has nothing else."""
        while True:
            batch = inbox.take()
            tokens = await self._side.group.total(sum(r.new for r in batch))
            if tokens:
                return batch, tokens
            await asyncio.sleep(IDLE_S)

    def fetch(self, request: Request) -> None:
        """See Transport. Mooncake reads; the store sends, so its daemon is told."""
        for holder, tokens in request.held.items():
            selector = tuple_of(self._addresses[self._here], 0, self._addresses[holder], PORTS)
            for step in range(self._scaled.rounds):
                read = functools.partial(self._side.read, holder, self._scaled.kv(tokens))
                done = self._move(self._reading, (holder, self._here, Stage.KV_REUSE), selector, request, step,
                                  self._scaled.kv(tokens), read)  # fmt: skip
                self._reads[request.id, step].append(done)

    async def fetched(self, request: Request, step: int) -> None:
        """See Transport."""
        for done in self._reads.pop((request.id, step)):
            await done

    async def exchange(self, size: int) -> float:
        """See Transport."""
        await self._side.group.exchange(size)
        return time.monotonic()

    def hand_over(self, request: Request, step: int) -> None:
        """See Transport."""
        decode, size = f"d{request.decode}", self._scaled.kv(request.tokens)
        write = functools.partial(self._side.write, decode, self._memories[decode].offset(request.id, step), size)
        selector = tuple_of(self._addresses[decode], PORTS)
        self._move(self._writing, (self._here, decode, Stage.P2D), selector, request, step, size, write)

    def _move(
        self,
        threads: ThreadPoolExecutor,
        kind: tuple[str, str, Stage],
        selector: Selector,
        request: Request,
        step: int,
        size: int,
        work: Callable[[], None],
    ) -> asyncio.Future[None]:
        """Announce a step's KV, and move it as soon as a thread is free."""
        conduit = self._side.conduits[kind]
        if conduit.stage is Stage.P2D:
            self._side.log.conduit[request.id] = conduit.number
        self._left.setdefault((conduit.src, request.id), self._scaled.rounds)
        self._hinter.send(conduit, selector, request, step, size)
        done = self._loop.run_in_executor(threads, work)
        done.add_done_callback(functools.partial(self._moved, conduit, request, step))
        return done

    def _moved(self, conduit: Conduit, request: Request, step: int, done: asyncio.Future[None]) -> None:
        done.result()  # raises TransferError
        self._hinter.moved(conduit, request, step)
        self._left[conduit.src, request.id] -= 1
        if not self._left[conduit.src, request.id]:
            self._hinter.sent(conduit.src, request)
