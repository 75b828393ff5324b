# SPDX-License-Identifier: Apache-2.0
"""What makes a KV connector of vLLM send hints: to be mixed in before the connector's own class.

    class Mine(MfsdConnector, LMCacheConnectorV1): ...

Everything here asks the connector first and returns what it returns; hints come after, and their failure is logged once
and is nobody's. What a version of vLLM does not call is not missed. Hooks that a connector lacks stay lacking.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

from mfsd.integrations import guard
from mfsd.integrations.vllm.express import DUE, Express, second
from mfsd.integrations.vllm.hold import GivenUp, Hold
from mfsd.integrations.vllm.state import Hints, bytes_per_token, extra_config, listeners


class MfsdConnector:
    """See the module. Only the scheduler's side sends hints: it alone knows deadlines, sizes and peers together.

    The workers' side has a part only where reads are given up (hold.py) or have a second way (express.py).
    """

    mfsd_push: ClassVar[bool] = False
    """KV is written to the decode host's listeners."""
    mfsd_mooncake: ClassVar[bool] = False
    """They are Mooncake's."""
    _mfsd_guard: ClassVar[guard.Guard] = guard.Guard()
    _mfsd_hints: Hints | None = None
    _mfsd_given_up: GivenUp | None = None
    _mfsd_express: Express | None = None

    def _mfsd(self) -> Hints:
        hints = self._mfsd_hints
        if hints is None:
            config = getattr(self, "_vllm_config", None)
            extra = extra_config(config)
            per_token = bytes_per_token(config, getattr(self, "_kv_cache_config", None), extra)
            hints = self._mfsd_hints = Hints(
                guard.client(extra.get("mfsd_target")),
                extra,
                per_token,
                self.mfsd_push,
                listeners(mooncake=self.mfsd_mooncake),
            )
            if extra.get("mfsd_hold") and not self.mfsd_push:
                policy = getattr(getattr(config, "kv_transfer_config", None), "kv_load_failure_policy", "fail")
                hints.hold = Hold(give_up=bool(extra.get("mfsd_recompute")) and policy == "recompute")
        return hints

    # --- the scheduler's side -----------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """A request has arrived."""
        parent = getattr(super(), "on_new_request", None)
        if parent is not None:
            parent(request)
        self._mfsd_guard("a request's hint", lambda: self._mfsd().arrived(request))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """How many tokens the connector can bring; none where they would be late and ``mfsd_recompute`` is set."""
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)  # type: ignore[misc]
        late: list[bool] = []
        self._mfsd_guard("the question whether to load", lambda: late.append(self._mfsd_late(request, found)))
        return (0, False) if late and late[0] else found

    def _mfsd_late(self, request: Any, found: Any) -> bool:
        hints, params = self._mfsd(), getattr(request, "kv_transfer_params", None)
        if not hints.extra.get("mfsd_recompute") or not params or not found[0]:
            return False
        return not hints.worth_loading(request, params, found[0])

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> Any:
        """The request has blocks, and KV of so many tokens is to come."""
        params = dict(getattr(request, "kv_transfer_params", None) or {})  # the connector ticks them off
        out = super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[misc]
        self._mfsd_guard("a transfer's hint", lambda: self._mfsd().loads(request, params, num_external_tokens))
        return out

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """A step is put together."""
        out = super().build_connector_meta(scheduler_output)  # type: ignore[misc]
        hold = self._mfsd_hints.hold if self._mfsd_hints is not None else None
        if hold is not None:
            self._mfsd_guard("holding reads back", lambda: hold.sift(out, time.monotonic()))
        self._mfsd_guard("when reads are due", lambda: self._mfsd_due(out))
        self._mfsd_guard("a batch's hint", lambda: self._mfsd().step(scheduler_output))
        return out

    def _mfsd_due(self, meta: Any) -> None:
        reads, hints = getattr(meta, "reqs_to_recv", None), self._mfsd()
        if reads and hints.extra.get("mfsd_express") and not self.mfsd_push:
            setattr(meta, DUE, hints.due(reads))

    def update_connector_output(self, connector_output: Any) -> None:
        """Workers have finished transfers, or failed to."""
        parent = getattr(super(), "update_connector_output", None)
        if parent is not None:
            parent(connector_output)
        self._mfsd_guard("a completion's hint", lambda: self._mfsd_over(connector_output))

    def _mfsd_over(self, output: Any) -> None:
        hints = self._mfsd()
        hints.failed(getattr(output, "failed_recving", None) or ())
        hints.loaded(getattr(output, "finished_recving", None) or ())

    def request_finished(self, request: Any, block_ids: Any) -> Any:
        """A request is over; on a prefill host its KV waits to be fetched."""
        out = super().request_finished(request, block_ids)  # type: ignore[misc]
        return self._mfsd_finished(request, out)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        """The same, of models with several groups of KV."""
        out = super().request_finished_all_groups(request, block_ids)  # type: ignore[misc]
        return self._mfsd_finished(request, out)

    def _mfsd_finished(self, request: Any, out: Any) -> Any:
        params = out[1] if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict) else None
        self._mfsd_guard("an end's hint", lambda: self._mfsd().finished(request, params))
        return out

    # --- the workers' side --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Any, **more: Any) -> Any:
        """Memory that reads go to: from now on an agent knows it."""
        self._mfsd_guard("a second way for reads", self._mfsd_second_way)
        return super().register_kv_caches(kv_caches, **more)  # type: ignore[misc]

    def _mfsd_second_way(self) -> None:
        config = getattr(self, "_vllm_config", None)
        worker = getattr(self, "connector_worker", None)
        agent = getattr(worker, "nixl_wrapper", None)
        role = getattr(getattr(config, "kv_transfer_config", None), "kv_role", None)
        if agent is None or self.mfsd_push or role == "kv_producer" or not extra_config(config).get("mfsd_express"):
            return
        self._mfsd_express = worker.nixl_wrapper = Express(agent, second(agent))  # type: ignore[union-attr]

    def start_load_kv(self, forward_context: Any, **more: Any) -> Any:
        """Reads begin."""
        self._mfsd_guard("what is given up", self._mfsd_hear_given_up)
        if self._mfsd_express is not None:
            express, meta = self._mfsd_express, getattr(self, "_connector_metadata", None)
            self._mfsd_guard("when reads are due", lambda: express.hear(meta, time.monotonic()))
        return super().start_load_kv(forward_context, **more)  # type: ignore[misc]

    def _mfsd_hear_given_up(self) -> None:
        if self._mfsd_given_up is None:
            self._mfsd_given_up = GivenUp()
        self._mfsd_given_up.hear(getattr(self, "_connector_metadata", None))

    def get_transfer_results(self, finished_req_ids: Any) -> Any:
        """Transfers that are over: those that were given up, too."""
        out = super().get_transfer_results(finished_req_ids)  # type: ignore[misc]
        for name in self._mfsd_given_up.take_requests() if self._mfsd_given_up is not None else ():
            out.finished_recving.add(name)
            out.failed_recving.add(name)
        return out

    def get_finished(self, finished_req_ids: Any) -> Any:
        """The same, of versions that have nothing else."""
        sent, received = super().get_finished(finished_req_ids)  # type: ignore[misc]
        more = self._mfsd_given_up.take_requests() if self._mfsd_given_up is not None else set()
        return sent, (received or set()) | more if more else received

    def get_block_ids_with_load_errors(self) -> Any:
        """Blocks to compute, since they were not loaded."""
        found = super().get_block_ids_with_load_errors()  # type: ignore[misc]
        more = self._mfsd_given_up.take_blocks() if self._mfsd_given_up is not None else set()
        return found | more if more else found

    def shutdown(self) -> Any:
        """The engine ends."""
        hints, self._mfsd_hints = self._mfsd_hints, None
        if hints is not None:
            self._mfsd_guard("the last hints", hints.client.close)
        parent = getattr(super(), "shutdown", None)
        return parent() if parent is not None else None
