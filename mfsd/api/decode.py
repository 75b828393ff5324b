# SPDX-License-Identifier: Apache-2.0
"""From protobuf hints to mfsd.ground.model: checked, clamped, and with durations turned into monotonic times.

This is on the path of every hint (some microseconds each at 50,000 a second), hence one function per kind, fields read
once, and selectors decoded once and then found by their serialized bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mfsd.ground.model import (
    INF,
    BatchHint,
    CookieSelector,
    EndHint,
    Hint,
    HintError,
    MarkHint,
    ProgressHint,
    RequestHint,
    Selector,
    Stage,
    TransferHint,
    What,
    cookie_selector,
    process_selector,
    tuple_selector,
)
from mfsd.ground.wire import SOCKETS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.engine.settings import LimitsConfig
    from mfsd.v1 import hints_pb2

US: Final = 1e-6
SELECTOR_BYTES: Final = 256
"""Of the longest one that says nothing but what we know."""
SELECTORS_CACHED: Final = 16_384
"""Distinct selectors to remember; the cache starts over when it is full, which costs a few microseconds each."""
STAGES: Final = {int(s): s for s in Stage if s is not Stage.NONE}
STAGES_TEXT: Final = "use STAGE_KV_REUSE (1), STAGE_COLLECTIVE (2), STAGE_P2D (3) or STAGE_BACKGROUND (4)"
_TRANSFER: Final = What.TRANSFER  # looked up in its class, a member costs as much as reading a field
OWNER_TEXT: Final = "is empty, and so is batch_id", "name the request or the batch"


class Decoder:
    """Decodes hints within limits. Stateless but for its cache of selectors."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._selectors: dict[bytes, Selector] = {}
        self._cookies: dict[int, Selector] = {}
        """The same of those that are a cookie."""
        self._kinds: dict[str | None, Callable[[hints_pb2.Hint, float], Hint]] = {
            "transfer": self._transfer,
            "progress": self._progress,
            "completion": self._completion,
            "request": self._request,
            "batch": self._batch,
            "cancellation": self._cancellation,
            "connection": self._mark,
        }
        self.set_limits(limits)

    def check(self, size: int) -> None:
        """Raise HintError for a batch of more hints than there may be in one."""
        limit = self.limits.max_hints_per_batch
        if size > limit:
            raise HintError(
                "hints",
                f"{size} hints in one batch",
                f"send at most {limit} at a time (limits.max_hints_per_batch)",
                exhausted=True,
            )

    def set_limits(self, limits: LimitsConfig) -> None:
        """Take new limits; they hold from the next hint on."""
        self.limits = limits
        self._id_bytes = limits.max_id_bytes
        self._max_us = int(limits.max_deadline_s * 1e6)
        self._min_s = limits.min_deadline_ms / 1e3
        self._max_defer_us = int(limits.max_defer_s * 1e6)
        self._min_defer = limits.min_defer_ms / 1e3
        self._max_ttl = limits.max_ttl_s
        self._default_ttl = limits.default_ttl_s
        self._max_bytes = limits.max_transfer_bytes
        self._max_layers = limits.max_layers

    def decode(self, hint: hints_pb2.Hint, now: float) -> Hint:
        """Decode one hint that arrived at ``now`` (CLOCK_MONOTONIC seconds). Raises HintError."""
        kind = self._kinds.get(hint.WhichOneof("body"))
        if kind is None:
            raise HintError("body", "is not set", f"set one of {', '.join(str(k) for k in self._kinds)}")
        return kind(hint, now)

    # --- kinds --------------------------------------------------------------------------------------------------------

    def _request(self, hint: hints_pb2.Hint, now: float) -> RequestHint:
        m = hint.request
        left, none = m.ttft_left_us, m.no_deadline
        if not left and not none:
            raise HintError(
                "request.ttft_left_us",
                "is missing or 0",
                "give the microseconds left until the first token is due, negative when it is late already; or set "
                "no_deadline where nobody has said when it is due",
            )
        if left and none:
            raise HintError("request.no_deadline", "is set together with ttft_left_us", "set one of them")
        return RequestHint(
            self._required("request.id", m.id),
            INF if none else self._deadline("request.ttft_left_us", left, now),
            self._id("request.batch_id", m.batch_id),
            self._duration("request.compute_left_us", m.compute_left_us),
            self._ttl(m.ttl_us),
        )

    def _batch(self, hint: hints_pb2.Hint, _now: float) -> BatchHint:
        m = hint.batch
        members = list(m.request_ids)
        if len(members) > self.limits.max_requests_per_batch:
            raise HintError(
                "batch.request_ids",
                f"{len(members)} members",
                f"at most {self.limits.max_requests_per_batch} (limits.max_requests_per_batch)",
                exhausted=True,
            )
        for i, member in enumerate(members):
            self._required(f"batch.request_ids[{i}]", member)
        layers = self._layer("batch.layers", m.layers)
        current = self._layer("batch.current_layer", m.current_layer)
        if layers and current > layers:
            raise HintError("batch.current_layer", f"{current} is beyond the last layer", f"at most layers ({layers})")
        return BatchHint(
            self._required("batch.id", m.id),
            members,
            layers,
            current,
            self._duration("batch.layer_compute_us", m.layer_compute_us),
        )

    def _progress(self, hint: hints_pb2.Hint, _now: float) -> ProgressHint:
        m = hint.progress
        return ProgressHint(
            self._required("progress.batch_id", m.batch_id),
            self._layer("progress.current_layer", m.current_layer),
            m.compute_done,
        )

    def _transfer(self, hint: hints_pb2.Hint, now: float) -> TransferHint:
        m = hint.transfer
        request_id, batch_id, size, own, held = m.request_id, m.batch_id, m.bytes, m.deadline_us, m.max_defer_us
        name, layer, ttl, cookie = m.id, m.target_layer, m.ttl_us, m.selector.cookie
        stage = STAGES.get(m.stage)
        if stage is None:
            raise HintError("transfer.stage", f"unknown stage {m.stage}", STAGES_TEXT)
        if not request_id and not batch_id and not stage.ownerless:
            raise HintError("transfer.request_id", *OWNER_TEXT)
        if not 0 < size <= self._max_bytes:
            raise HintError(
                "transfer.bytes", f"{size} bytes", f"1 to {self._max_bytes} (limits.max_transfer_bytes) are allowed"
            )
        return TransferHint(
            name if name and 4 * len(name) <= self._id_bytes else self._required("transfer.id", name),
            request_id if 4 * len(request_id) <= self._id_bytes else self._id("transfer.request_id", request_id),
            batch_id if 4 * len(batch_id) <= self._id_bytes else self._id("transfer.batch_id", batch_id),
            stage,
            layer if layer <= self._max_layers else self._layer("transfer.target_layer", layer),
            size,
            self._cookies.get(cookie) or self._selector("transfer.selector", m.selector),
            self._deadline("transfer.deadline_us", own, now) if own else INF,
            self._ttl(ttl) if ttl else self._default_ttl,
            not m.interleaved,
            m.position,
            now + self._defer("transfer.max_defer_us", held) if held else INF,
        )

    def _completion(self, hint: hints_pb2.Hint, _now: float) -> EndHint:
        return self._end("completion", hint.completion, cancelled=False)

    def _cancellation(self, hint: hints_pb2.Hint, _now: float) -> EndHint:
        end = self._end("cancellation", hint.cancellation, cancelled=True)
        written = hint.cancellation.written
        if len(written) > SOCKETS_MAX:
            raise HintError("cancellation.written", f"names {len(written)} sockets", f"at most {SOCKETS_MAX}")
        end.written = tuple((w.cookie, w.position) for w in written)
        return end

    def _end(self, name: str, m: hints_pb2.Completion | hints_pb2.Cancellation, *, cancelled: bool) -> EndHint:
        transfer, request, batch = m.transfer_id, m.request_id, m.batch_id
        if transfer and not request and not batch:
            short = 4 * len(transfer) <= self._id_bytes
            return EndHint(_TRANSFER, transfer if short else self._id(f"{name}.transfer_id", transfer), cancelled)
        if transfer or bool(request) == bool(batch):
            problem = "is set together with another id" if transfer or request or batch else "is empty, and no other id"
            raise HintError(f"{name}.transfer_id", problem, "set exactly one of transfer_id, request_id, batch_id")
        if request:
            return EndHint(What.REQUEST, self._id(f"{name}.request_id", request), cancelled)
        return EndHint(What.BATCH, self._id(f"{name}.batch_id", batch), cancelled)

    def _mark(self, hint: hints_pb2.Hint, _now: float) -> MarkHint:
        m = hint.connection
        stage = STAGES.get(m.stage, Stage.NONE)
        if stage is Stage.NONE and m.stage:
            raise HintError("connection.stage", f"unknown stage {m.stage}", f"{STAGES_TEXT}, or 0 to take a mark back")
        return MarkHint(self._selector("connection.selector", m.selector), stage, not m.interleaved)

    # --- values -------------------------------------------------------------------------------------------------------

    def _id(self, field: str, value: str) -> str:
        # A character takes at most 4 bytes, so most identifiers need not be encoded to know that they fit.
        if 4 * len(value) > self._id_bytes and len(value.encode()) > self._id_bytes:
            raise HintError(field, f"{len(value.encode())} bytes", f"at most {self._id_bytes} (limits.max_id_bytes)")
        return value

    def _required(self, field: str, value: str) -> str:
        if not value:
            raise HintError(field, "is empty", "give an identifier, unique within the session")
        return self._id(field, value)

    def _deadline(self, field: str, left_us: int, now: float) -> float:
        if not -self._max_us <= left_us <= self._max_us:
            raise HintError(
                field,
                f"{left_us} us is {abs(left_us) / 1e6:.0f} s {'from now' if left_us > 0 else 'ago'}",
                f"deadlines are durations from now, within +-{self._max_us} us (limits.max_deadline_s)",
            )
        # What is late stays so: in time is what arrived before that.
        return now + (max(left_us * US, self._min_s) if left_us > 0 else left_us * US)

    def _duration(self, field: str, us: int) -> float:
        if us > self._max_us:
            raise HintError(field, f"{us} us", f"at most {self._max_us} (limits.max_deadline_s)")
        return us * US

    def _defer(self, field: str, us: int) -> float:
        if us > self._max_defer_us:
            raise HintError(
                field,
                f"{us} us is {us / 1e6:.0f} s",
                f"at most {self._max_defer_us} us (limits.max_defer_s); 0: the policy's default for its stage",
            )
        return max(us * US, self._min_defer)

    def _ttl(self, us: int) -> float:
        return min(us * US, self._max_ttl) if us else self._default_ttl

    def _layer(self, field: str, layer: int) -> int:
        if layer > self._max_layers:
            raise HintError(field, f"layer {layer}", f"at most {self._max_layers} (limits.max_layers)")
        return layer

    def selector(self, field: str, m: hints_pb2.Selector) -> Selector:
        """Decode a selector found at ``field`` of its hint. Raises HintError."""
        return self._cookies.get(m.cookie) or self._selector(field, m)

    def _selector(self, field: str, m: hints_pb2.Selector) -> Selector:
        raw = m.SerializeToString()
        found = self._selectors.get(raw)
        if found is None:
            found = decode_selector(field, m)
            if len(raw) > SELECTOR_BYTES:
                return found  # with fields that nobody knows; not to be kept
            if len(self._selectors) >= SELECTORS_CACHED:
                self._selectors.clear()
                self._cookies.clear()
            self._selectors[raw] = found
            if isinstance(found, CookieSelector):
                self._cookies[found.cookie] = found
        return found


# --- selectors --------------------------------------------------------------------------------------------------------


def decode_selector(field: str, m: hints_pb2.Selector) -> Selector:
    """Decode a selector found at ``field`` of its hint. Raises HintError."""
    kind = m.WhichOneof("kind")
    try:
        if kind == "cookie":
            return cookie_selector(m.cookie)
        if kind == "tuple":
            t = m.tuple
            return tuple_selector(t.dst_addr, _ports(t.dst_port), t.src_addr, _ports(t.src_port), t.protocol or 6)
        if kind == "process":
            return process_selector(m.process.pid, m.process.remote, _ports(m.process.remote_port))
    except HintError as e:
        raise e.below(field if kind == "cookie" else f"{field}.{kind}") from None
    raise HintError(field, "is not set", "name the connection by cookie, tuple or process")


def _ports(m: hints_pb2.PortRange) -> tuple[int, int]:
    return m.first, m.last
