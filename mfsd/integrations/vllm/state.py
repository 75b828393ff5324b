# SPDX-License-Identifier: Apache-2.0
"""What the hints of one vLLM engine need to know of each other. Everything here runs in the scheduler's process."""

from __future__ import annotations

import functools
import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.client import Stage, tuple_of
from mfsd.integrations import guard
from mfsd.integrations.vllm.deadline import DEADLINE, LEFT, Clocks, Computing, deadline_of, number
from mfsd.integrations.vllm.hold import Read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mfsd.client import Client
    from mfsd.ground.model import TupleSelector
    from mfsd.integrations.vllm.hold import Hold

PORTS: Final = "mfsd_ports"
"""In kv_transfer_params: first and last port of the prefill host's listeners."""
HOST: Final = "mfsd_host"
"""In kv_transfer_params: the prefill host's address for KV."""
KNOWN_MAX: Final = 65_536
"""Requests that are remembered; the oldest go first."""


def extra_config(config: Any) -> dict[str, Any]:
    """kv_connector_extra_config of a VllmConfig."""
    found = getattr(getattr(config, "kv_transfer_config", None), "kv_connector_extra_config", None)
    return dict(found) if found else {}


def bytes_per_token(config: Any, cache: Any, extra: Mapping[str, Any]) -> float:
    """KV of one token in all layers and ranks; 0: unknown."""
    said = number(extra.get("mfsd_bytes_per_token"))
    if said:
        return said
    blocks = getattr(cache, "num_blocks", 0)
    block = getattr(getattr(config, "cache_config", None), "block_size", 0)
    tensors = getattr(cache, "kv_cache_tensors", ())
    if not blocks or not block:
        return 0.0
    ranks = getattr(getattr(config, "parallel_config", None), "tensor_parallel_size", 1)
    return float(sum(t.size for t in tensors) / blocks / block * ranks)


@dataclass(slots=True)
class _Known:
    deadline: float
    """Monotonic seconds; inf: nobody has said any."""
    loading: bool = False
    """A transfer of it is announced."""


@dataclass(slots=True)
class Hints:
    """Turns what the scheduler shows into hints."""

    client: Client
    extra: dict[str, Any]
    per_token: float
    """Bytes."""
    push: bool = False
    """KV goes to listeners of the decode host; else decode reads from listeners of the prefill host."""
    ports: tuple[int, int] = (0, 0)
    """Of our own listeners."""
    hold: Hold | None = None
    """Reads wait for tighter ones."""
    resolver: guard.Resolver = field(default_factory=guard.Resolver)
    clocks: Clocks = field(default_factory=Clocks)
    computing: Computing = field(default_factory=Computing)
    _known: dict[str, _Known] = field(default_factory=dict)
    _step: int = 0
    _batch: str = ""

    # --- requests -----------------------------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """A request is new here."""
        left = self._left(request)
        if left == math.inf:
            return
        self._remember(request.request_id, left)
        self.client.request(request.request_id, ttft_left_s=left)

    def _left(self, request: Any) -> float:
        """Seconds until its token is due; inf: nobody said."""
        known = self._known.get(request.request_id)
        if known is not None:
            return known.deadline - time.monotonic()
        params, sampling = getattr(request, "kv_transfer_params", None), getattr(request, "sampling_params", None)
        now = time.time()
        deadline = deadline_of(
            params,
            getattr(sampling, "extra_args", None),
            self.extra,
            getattr(request, "arrival_time", None) or now,
            getattr(request, "num_prompt_tokens", 0),
        )
        if deadline is None:
            return math.inf
        return deadline - now + self.clocks.ahead(params, self.prefill_host(params or {}), now)

    def _remember(self, request_id: str, left: float) -> _Known:
        known = self._known.setdefault(request_id, _Known(time.monotonic() + left))
        if len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]
        return known

    def finished(self, request: Any, params: dict[str, Any] | None) -> None:
        """A request is over here. ``params``: what goes back to the router, which is added to."""
        known = self._known.pop(request.request_id, None)
        self.computing.over(request.request_id, time.monotonic())
        if self.hold is not None:
            self.hold.over(request.request_id)
        if params is not None and params.get("do_remote_prefill", True):
            left = self._left(request) if known is None else known.deadline - time.monotonic()
            if left < math.inf:
                params[DEADLINE], params[LEFT] = round((time.time() + left) * 1000, 3), round(left * 1000, 3)
            if self.ports[0]:
                params[PORTS] = list(self.ports)
            if self.extra.get("mfsd_data_host"):
                params[HOST] = self.extra["mfsd_data_host"]
        if known is None:
            return
        if known.loading:
            self.client.cancel(request=request.request_id)  # aborted before its KV was here
        else:
            self.client.done(request=request.request_id)

    # --- transfers ----------------------------------------------------------------------------------------------------

    def loads(self, request: Any, params: Mapping[str, Any] | None, tokens: int) -> None:
        """KV of so many tokens is about to come: from a prefill host if ``params`` name one, else from the store."""
        size = int(tokens * self.per_token)
        if tokens <= 0 or size <= 0:
            return
        stage, where = self._where(params or {})
        if where is None:
            return
        rid = request.request_id
        known = self._remember(rid, self._left(request))
        if known.loading:
            return
        known.loading = True
        host = self.prefill_host(params or {})
        if self.hold is not None and host:
            now = time.monotonic()
            start = functools.partial(self._announce, rid, stage, where, size)
            self.hold.expected[rid] = Read(host, known.deadline, self._alone_s(host, size), now, start)
        else:
            self._announce(rid, stage, where, size)

    def _announce(self, rid: str, stage: Stage, where: TupleSelector, size: int) -> None:
        known = self._known.get(rid)
        if known is None:
            return
        # Again, because a daemon elsewhere may not have heard of the request; a renewal costs the same.
        left, due = known.deadline - time.monotonic(), None
        if left < math.inf:
            due = self.computing.before(left)
            self.client.request(rid, ttft_left_s=left)
        else:
            self.client.request(rid, no_deadline=True)
        self.client.transfer(f"{rid}/kv", where, size, stage=stage, request=rid, deadline_s=due, interleaved=True)

    def _alone_s(self, host: str, size: int) -> float:
        """Seconds that so many bytes take from a host with nothing before them, as far as the daemons know."""
        there = self.resolver.address(host)
        advice = self.client.advice(self.resolver.ours_towards(there), source=there) if there else None
        return math.inf if advice is None else advice.least_s(size)

    def due(self, request_ids: Iterable[str]) -> dict[str, float]:
        """Seconds until KV of these must be here, of those that are known."""
        now, some = time.monotonic(), [(rid, self._known.get(rid)) for rid in request_ids]
        return {rid: self.computing.before(known.deadline - now) for rid, known in some if known is not None}

    def _where(self, params: Mapping[str, Any]) -> tuple[Stage, TupleSelector | None]:
        """What the bytes are, and the connections that they come by; None: nobody knows."""
        host = self.prefill_host(params)
        if host:
            theirs = params.get(PORTS)
            listeners = (
                (int(theirs[0]), int(theirs[1])) if isinstance(theirs, list | tuple) and len(theirs) == 2 else (0, 0)
            )
            return Stage.P2D, self._selector(host, (0, 0) if self.push else listeners)
        store = str(self.extra.get("mfsd_store", ""))
        name, colon, port = store.rpartition(":")
        if not colon:
            return Stage.KV_REUSE, None
        return Stage.KV_REUSE, self._selector(name.strip("[]"), guard.ports(port))

    def prefill_host(self, params: Mapping[str, Any]) -> str:
        """Where a request's KV comes from; empty: it names no host."""
        host = params.get(HOST) or params.get("remote_host")
        if not host and params.get("remote_bootstrap_addr"):
            host = str(params["remote_bootstrap_addr"]).rpartition("//")[2].rpartition(":")[0].strip("[]")
        return str(host or "")

    def _selector(self, host: str, sport: tuple[int, int]) -> TupleSelector | None:
        there = self.resolver.address(host)
        here = str(self.extra.get("mfsd_data_host") or "") or self.resolver.ours_towards(there)
        if not there or not here:
            return None
        return tuple_of(here, self.ports if self.push else 0, there, sport)

    def loaded(self, request_ids: Iterable[str]) -> None:
        """KV has come."""
        for rid in self._no_longer_loading(request_ids):
            self.computing.loaded(rid, time.monotonic())
            self.client.done(transfer=f"{rid}/kv")

    def failed(self, request_ids: Iterable[str]) -> None:
        """KV will not come."""
        for rid in self._no_longer_loading(request_ids):
            self.client.cancel(transfer=f"{rid}/kv")

    def _no_longer_loading(self, request_ids: Iterable[str]) -> Iterator[str]:
        for rid in request_ids:
            known = self._known.get(rid)
            if self.hold is not None:
                self.hold.over(rid)
            if known is not None and known.loading:
                known.loading = False
                yield rid

    # --- batches ------------------------------------------------------------------------------------------------------

    def step(self, output: Any) -> None:
        """The scheduler has put a step together: prompts that are in it run in one forward pass."""
        self.computing.step(time.monotonic())
        new = [r.req_id for r in getattr(output, "scheduled_new_reqs", ()) if r.req_id in self._known]
        if self._batch:
            self.client.done(batch=self._batch)
            self._batch = ""
        if new:
            self._step += 1
            self._batch = f"step-{self._step}"
            self.client.batch(self._batch, new)

    # --- whether to load ----------------------------------------------------------------------------------------------

    def worth_loading(self, request: Any, params: Mapping[str, Any], tokens: int) -> bool:
        """False: the network can't bring the KV in time, as far as the daemons know, even if nothing goes before."""
        left = self._left(request)
        if left == math.inf:
            return True
        needed = self._alone_s(self.prefill_host(params), int(tokens * self.per_token))
        return not math.isfinite(needed) or needed <= left


def listeners(*, mooncake: bool) -> tuple[int, int]:
    """Ports of our own listeners, from the environment; (0, 0): any."""
    if mooncake:
        return guard.mooncake_ports()
    return guard.ports(os.environ.get("UCX_TCP_PORT_RANGE", ""))
