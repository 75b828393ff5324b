# SPDX-License-Identifier: Apache-2.0
"""What stands in for vLLM below the mixin of its connectors, and what a daemon has heard of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mfsd.integrations.vllm import MfsdConnector
from mfsd.v1 import hints_pb2 as pb
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from support.daemons import Running


BLOCK = 32


PER_TOKEN = 1000


PORTS = [20000, 20099]


@dataclass
class Request:
    """As vllm.v1.request.Request."""

    request_id: str
    kv_transfer_params: dict[str, Any] | None = None
    sampling_params: Any = None
    arrival_time: float = field(default_factory=time.time)
    num_prompt_tokens: int = 1000


class Connector:
    """As KVConnectorBase_V1."""

    def __init__(self, extra: dict[str, Any]) -> None:
        self._vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
            cache_config=SimpleNamespace(block_size=BLOCK),
            parallel_config=SimpleNamespace(tensor_parallel_size=2),
        )
        tensors = [SimpleNamespace(size=100 * BLOCK * PER_TOKEN // 4)] * 2
        self._kv_cache_config = SimpleNamespace(num_blocks=100, kv_cache_tensors=tensors)
        self.calls: list[str] = []

    def on_new_request(self, request: Any) -> None:
        del request
        self.calls.append("new")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        del request
        return 1000 - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        del blocks, num_external_tokens
        if request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False

    def build_connector_meta(self, scheduler_output: Any) -> str:
        del scheduler_output
        return "meta"

    def update_connector_output(self, connector_output: Any) -> None:
        del connector_output
        self.calls.append("output")

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        del block_ids
        if request.kv_transfer_params and request.kv_transfer_params.get("do_remote_decode"):
            return True, {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 5600}
        return False, None

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class PullConnector(Connector):
    """As NIXL's pull connector: what is to be read is in the metadata of a step, once."""

    def __init__(self, extra: dict[str, Any]) -> None:
        super().__init__(extra)
        self.to_recv: dict[str, Any] = {}
        self._connector_metadata: Any = None

    def loads(self, name: str, left_s: float, entry: Any) -> Request:
        """A request has come whose KV is to be read; ``entry``: of the metadata."""
        request = Request(name, {"remote_host": "127.0.0.1", "mfsd_ttft_slo_ms": left_s * 1000})
        self.on_new_request(request)
        self.update_state_after_alloc(request, None, 100)
        self.to_recv[name] = entry
        return request

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        del scheduler_output
        out, self.to_recv = SimpleNamespace(reqs_to_recv=self.to_recv), {}
        return out


class Mine(MfsdConnector, Connector):
    pass


def flush(connector: Mine) -> None:
    assert connector._mfsd().client.flush(WAIT_S)


def deadlines(running: Running) -> dict[str, float]:
    return running.ask(
        lambda e: {
            r.id: float(e.books.requests.get(r, "deadline")) - time.monotonic()
            for s in e.books.sessions.values()
            for r in s.requests.values()
        }
    )


def transfers(running: Running) -> list[Any]:
    return running.ask(lambda e: [t for s in e.books.sessions.values() for t in s.transfers.values()])


def advice_of(rate: float) -> Any:
    return pb.Advice(known=True, rate_bytes_per_s=rate)
