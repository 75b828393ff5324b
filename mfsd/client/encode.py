# SPDX-License-Identifier: Apache-2.0
"""From mfsd.ground.model hints to protobuf, with monotonic times turned into durations at the moment of sending.

The reverse of mfsd/api/decode.py. A hint may wait for a connection to the daemon, hence times are absolute until here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, assert_never, cast

from mfsd.ground.model import (
    INF,
    BatchHint,
    CookieSelector,
    EndHint,
    Hint,
    MarkHint,
    PortRange,
    ProgressHint,
    RequestHint,
    RuleSelector,
    Selector,
    Stage,
    TransferHint,
    TupleSelector,
    What,
)
from mfsd.ground.wire import INTERLEAVED
from mfsd.v1 import hints_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.internal.containers import RepeatedScalarFieldContainer

    from mfsd.v1 import hints_pb2 as pb

COLUMNS: Final = 8
"""Transfers in a row for which columns pay."""
_END_FIELD = {What.TRANSFER: "transfer_id", What.REQUEST: "request_id", What.BATCH: "batch_id"}
_ANY_PORT = PortRange()
AGES: Final = 1e12
"""Seconds; microseconds of it still fit the wire."""
_PLAIN: Final = {
    "str": ("", "a string"),
    "int": (0, "a whole number, not below 0"),
    "float": (0.0, "a finite number of seconds"),
    "Stage": (Stage.NONE, "a Stage, such as Stage.P2D"),
    "list[str]": ([], "a list of strings"),
}
"""By type of a field: what can be written, and what is meant."""
_CALLED: Final = {
    "request_id": "request", "batch_id": "batch", "target_layer": "layer", "ttl": "ttl_s", "deadline": "deadline_s",
    "hold_until": "max_defer_s", "compute_left": "compute_left_s", "layer_compute": "layer_compute_s",
    "request_ids": "requests",
}  # fmt: skip
"""Fields by what the parameters of Client's calls are called, where that differs."""


@dataclass(slots=True)
class Batch:
    """Hints of one message; those from ``columns`` on are transfers, and go by columns."""

    hints: list[Hint]
    columns: int

    def meant(self, rejection: pb.Rejection) -> list[Hint]:
        """What was rejected."""
        first = rejection.index + (self.columns if rejection.part == hints_pb2.Rejection.TRANSFERS else 0)
        return self.hints[first : first + max(rejection.rows, 1)]


def fault(hint: Hint) -> str:
    """Why a hint can't be written, as a sentence that names the field; empty: it can. Cheap for transfers and ends."""
    try:
        if isinstance(hint, TransferHint):
            plain = hint.id + hint.request_id + hint.batch_id
            fine = not (hint.size >> 62 or hint.target_layer >> 32) and 0 <= hint.ttl < AGES
            fine = fine and all(-AGES < at < AGES or at == INF for at in (hint.deadline, hint.hold_until))
            fine = fine and type(hint.stage) is Stage
            fine = fine and type(hint.size) is not bool and type(hint.target_layer) is not bool
        else:
            plain, fine = hint.id if isinstance(hint, EndHint) else "", isinstance(hint, EndHint)
        if fine and type(plain) is str and plain.isascii():
            return ""
    except TypeError:
        pass
    return _trial(hint)


def _trial(hint: Hint) -> str:
    """The same by writing it; the field is the one without which it can be written."""
    error = _error(hint)
    if error is None:
        return ""
    for one in fields(hint):
        plain, meant = _PLAIN.get(str(one.type), (None, ""))
        changed: dict[str, Any] = {one.name: plain}
        if meant and _error(replace(hint, **changed)) is None:
            said = _shown(getattr(hint, one.name))
            return f"{_parameter(hint, one.name)}: {said} can't be sent ({error}); give {meant}"
    return f"{type(hint).__name__} can't be sent: {error}"


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python prints (sys.set_int_max_str_digits)
        return "a huge number"


def _parameter(hint: Hint, field: str) -> str:
    if field == "deadline" and isinstance(hint, RequestHint):
        return "ttft_left_s"
    return _CALLED.get(field, field)


def _error(hint: Hint) -> Exception | None:
    try:
        encode(hint, 0.0, hints_pb2.Hint())
    except Exception as e:  # noqa: BLE001 - whatever a number or a name is mistaken for
        return e
    return None


def writable(hints: list[Hint]) -> list[Hint]:
    """Those that can be written: one that can't must not take others with it."""
    return [hint for hint in hints if _error(hint) is None]


def split(hints: list[Hint]) -> Batch:
    """As many of the hints as one message can hold in their order: the daemon applies columns after the others."""
    kinds = [isinstance(hint, TransferHint) for hint in hints]
    first = kinds.index(True) if True in kinds else len(hints)
    end = kinds.index(False, first) if False in kinds[first:] else len(hints)
    return Batch(hints[:end], first) if end - first >= COLUMNS else Batch(hints, len(hints))


def encode_batch(batch: Batch, now: float, out: pb.HintBatch) -> None:
    """Write all hints of a batch."""
    for hint in batch.hints[: batch.columns]:
        encode(hint, now, out.hints.add())
    if len(batch.hints) > batch.columns:
        encode_columns(cast("list[TransferHint]", batch.hints[batch.columns :]), now, out.transfers)


def encode(hint: Hint, now: float, out: pb.Hint) -> None:
    """Write a hint into an empty protobuf one. ``ttl`` 0 leaves the choice to the daemon."""
    if isinstance(hint, TransferHint):
        m = out.transfer
        m.id, m.request_id, m.batch_id = hint.id, hint.request_id, hint.batch_id
        m.stage, m.target_layer, m.bytes = int(hint.stage), hint.target_layer, hint.size  # type: ignore[assignment]
        if hint.deadline != INF:
            m.deadline_us = _left_us(hint.deadline, now)
        m.ttl_us = int(hint.ttl * 1e6)
        m.interleaved, m.position = not hint.ordered, hint.position
        m.max_defer_us = _held_us(hint.hold_until, now)
        _selector(hint.selector, m.selector)
    elif isinstance(hint, ProgressHint):
        p = out.progress
        p.batch_id, p.current_layer, p.compute_done = hint.batch_id, hint.current_layer, hint.compute_done
    elif isinstance(hint, EndHint):
        end = out.cancellation if hint.cancelled else out.completion
        setattr(end, _END_FIELD[hint.what], hint.id)
        for cookie, position in hint.written:
            out.cancellation.written.add(cookie=cookie, position=position)
    elif isinstance(hint, RequestHint):
        r = out.request
        r.id, r.batch_id = hint.id, hint.batch_id
        if hint.deadline == INF:
            r.no_deadline = True
        else:
            r.ttft_left_us = _left_us(hint.deadline, now)
        r.compute_left_us, r.ttl_us = int(hint.compute_left * 1e6), int(hint.ttl * 1e6)
    elif isinstance(hint, BatchHint):
        b = out.batch
        b.id, b.layers, b.current_layer = hint.id, hint.layers, hint.current_layer
        b.request_ids.extend(hint.request_ids)
        b.layer_compute_us = int(hint.layer_compute * 1e6)
    elif isinstance(hint, MarkHint):
        out.connection.stage = int(hint.stage)  # type: ignore[assignment]  # an open enum on the wire
        out.connection.interleaved = not hint.ordered
        _selector(hint.selector, out.connection.selector)
    else:
        assert_never(hint)


def encode_columns(hints: Sequence[TransferHint], now: float, out: pb.TransferColumns) -> None:
    """Write transfers into empty columns, in their order."""
    owners: dict[str, int] = {"": 0}
    selectors: dict[Selector, int] = {}
    out.ids.extend([h.id for h in hints])
    _fill(out.request, [owners.setdefault(h.request_id, len(owners)) for h in hints])
    _fill(out.batch, [owners.setdefault(h.batch_id, len(owners)) for h in hints])
    out.owners.extend(list(owners)[1:])
    _fill(out.stage, [int(h.stage) for h in hints])
    _fill(out.target_layer, [h.target_layer for h in hints])
    _fill(out.bytes, [h.size for h in hints])
    _fill(out.selector, [selectors.setdefault(h.selector, len(selectors)) for h in hints])
    for selector in selectors:
        _selector(selector, out.selectors.add())
    _fill(out.deadline_us, [0 if h.deadline == INF else _left_us(h.deadline, now) for h in hints])
    _fill(out.position, [h.position for h in hints])
    _fill(out.flags, [0 if h.ordered else INTERLEAVED for h in hints])
    _fill(out.ttl_us, [int(h.ttl * 1e6) for h in hints])
    _fill(out.max_defer_us, [_held_us(h.hold_until, now) for h in hints])


def _fill(column: RepeatedScalarFieldContainer[int], values: list[int]) -> None:
    """A value that holds for all rows is written once, and the default not at all."""
    first = values[0]
    if values.count(first) < len(values):
        column.extend(values)
    elif first:
        column.append(first)


def _left_us(deadline: float, now: float) -> int:
    """Microseconds left; never 0, which means "not given" on the wire."""
    return int((deadline - now) * 1e6) or -1


def _held_us(hold_until: float, now: float) -> int:
    """Microseconds left; 0 means "not given" on the wire."""
    return 0 if hold_until == INF else max(round((hold_until - now) * 1e6), 1)


def _selector(selector: Selector, out: pb.Selector) -> None:
    if isinstance(selector, CookieSelector):
        out.cookie = selector.cookie
    elif isinstance(selector, TupleSelector):
        out.tuple.src_addr = str(selector.src) if selector.src is not None else ""
        out.tuple.dst_addr = str(selector.dst)
        out.tuple.protocol = selector.protocol
        _ports(selector.sport, out.tuple.src_port)
        _ports(selector.dport, out.tuple.dst_port)
    elif isinstance(selector, RuleSelector):
        raise TypeError("a rule's selector is for the daemon's configuration, not for hints")
    else:
        out.process.pid = selector.pid
        out.process.remote = str(selector.remote) if selector.remote is not None else ""
        _ports(selector.dport, out.process.remote_port)


def _ports(ports: PortRange, out: pb.PortRange) -> None:
    if ports != _ANY_PORT:
        out.first, out.last = ports.first, ports.last
