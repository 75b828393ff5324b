# SPDX-License-Identifier: Apache-2.0
"""From mfsd.model hints to protobuf, with monotonic times turned into durations at the moment of sending.

The reverse of mfsd/api/decode.py. A hint may wait for a connection to the daemon, hence times are absolute until here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from mfsd.model import (
    INF,
    BatchHint,
    CookieSelector,
    EndHint,
    Hint,
    MarkHint,
    PortRange,
    ProgressHint,
    RequestHint,
    Selector,
    TransferHint,
    TupleSelector,
    What,
)

if TYPE_CHECKING:
    from mfsd.v1 import hints_pb2 as pb

_END_FIELD = {What.TRANSFER: "transfer_id", What.REQUEST: "request_id", What.BATCH: "batch_id"}
_ANY_PORT = PortRange()


def encode(hint: Hint, now: float, out: pb.Hint) -> None:
    """Write a hint into an empty protobuf one. ``ttl`` 0 leaves the choice to the daemon."""
    if isinstance(hint, TransferHint):
        m = out.transfer
        m.id, m.request_id, m.batch_id = hint.id, hint.request_id, hint.batch_id
        m.stage, m.target_layer, m.bytes = int(hint.stage), hint.target_layer, hint.size  # type: ignore[assignment]
        if hint.deadline != INF:
            m.deadline_us = _left_us(hint.deadline, now)
        m.ttl_us = int(hint.ttl * 1e6)
        _selector(hint.selector, m.selector)
    elif isinstance(hint, ProgressHint):
        p = out.progress
        p.batch_id, p.current_layer, p.compute_done = hint.batch_id, hint.current_layer, hint.compute_done
    elif isinstance(hint, EndHint):
        end = out.cancellation if hint.cancelled else out.completion
        setattr(end, _END_FIELD[hint.what], hint.id)
    elif isinstance(hint, RequestHint):
        r = out.request
        r.id, r.batch_id = hint.id, hint.batch_id
        r.ttft_left_us = _left_us(hint.deadline, now)
        r.compute_left_us, r.ttl_us = int(hint.compute_left * 1e6), int(hint.ttl * 1e6)
    elif isinstance(hint, BatchHint):
        b = out.batch
        b.id, b.layers, b.current_layer = hint.id, hint.layers, hint.current_layer
        b.request_ids.extend(hint.request_ids)
        b.layer_compute_us = int(hint.layer_compute * 1e6)
    elif isinstance(hint, MarkHint):
        out.connection.stage = int(hint.stage)  # type: ignore[assignment]  # an open enum on the wire
        _selector(hint.selector, out.connection.selector)
    else:
        assert_never(hint)


def _left_us(deadline: float, now: float) -> int:
    """Microseconds left; never 0, which means "not given" on the wire."""
    return int((deadline - now) * 1e6) or -1


def _selector(selector: Selector, out: pb.Selector) -> None:
    if isinstance(selector, CookieSelector):
        out.cookie = selector.cookie
    elif isinstance(selector, TupleSelector):
        out.tuple.src_addr = str(selector.src) if selector.src is not None else ""
        out.tuple.dst_addr = str(selector.dst)
        out.tuple.protocol = selector.protocol
        _ports(selector.sport, out.tuple.src_port)
        _ports(selector.dport, out.tuple.dst_port)
    else:
        out.process.pid = selector.pid
        out.process.remote = str(selector.remote) if selector.remote is not None else ""
        _ports(selector.dport, out.process.remote_port)


def _ports(ports: PortRange, out: pb.PortRange) -> None:
    if ports != _ANY_PORT:
        out.first, out.last = ports.first, ports.last
