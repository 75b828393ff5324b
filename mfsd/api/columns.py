# SPDX-License-Identifier: Apache-2.0
"""From columns of hints to mfsd.engine.bulk, with the same checks that single hints get.

A few array operations find the rows that might be wrong. Those are taken out and made single hints, so that one place
(decode.py) says what is wrong with them, and whether it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mfsd.api.decode import STAGES, STAGES_TEXT, US
from mfsd.engine.bulk import Bad, TransferColumns
from mfsd.ground.model import INF, HintError, ProgressHint
from mfsd.ground.wire import INTERLEAVED
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mfsd.api.decode import Decoder
    from mfsd.ground.model import Selector

_TO_COLUMN: Final = {"id": "ids", "request_id": "request", "batch_id": "batch"}
"""Fields of a single transfer that are columns of another name."""
_STAGES: Final = range(max(STAGES) + 2)
"""Numbers of stages, from none (0) to one that nobody knows, to look the others up by."""
_KNOWN: Final = np.array([number in STAGES for number in _STAGES])
_OWNERLESS: Final = np.array([number in STAGES and STAGES[number].ownerless for number in _STAGES])

STAGE_MAX: Final = (1 << 31) - 1
"""Of a single transfer's field; that of columns takes more."""
DEFER_MAX: Final = (1 << 64) - 1
"""The same of a duration, which is a floating-point number here, and may have been rounded up."""

Ints = npt.NDArray[Any]


def transfers(decoder: Decoder, m: pb.TransferColumns, now: float) -> tuple[TransferColumns, Bad]:
    """Decode transfers that arrived at ``now``; rows that can't be taken are named, and left out.

    Raises HintError when the columns don't fit together.
    """
    n, limits = len(m.ids), decoder.limits
    stage = _column("transfers.stage", m.stage, n, np.int64)
    size = _column("transfers.bytes", m.bytes, n, np.int64)
    layer = _column("transfers.target_layer", m.target_layer, n, np.int64)
    own = _column("transfers.deadline_us", m.deadline_us, n, np.int64)
    request = _column("transfers.request", m.request, n, np.int64)
    batch = _column("transfers.batch", m.batch, n, np.int64)
    selector = _column("transfers.selector", m.selector, n, np.int64)
    flags = _column("transfers.flags", m.flags, n, np.int64)
    position = _column("transfers.position", m.position, n, np.float64)
    held = _column("transfers.max_defer_us", m.max_defer_us, n, np.float64)
    ttl = _column("transfers.ttl_us", m.ttl_us, n, np.float64)
    names, owners = list(m.ids), list(m.owners)
    selectors = [_selector(decoder, one) for one in m.selectors]

    reach = int(limits.max_deadline_s * 1e6)
    suspect = (size <= 0) | (size > limits.max_transfer_bytes) | (layer > limits.max_layers)
    suspect |= ~_KNOWN.take(stage, mode="clip")
    suspect |= (own < -reach) | (own > reach) | (held > limits.max_defer_s * 1e6)
    suspect |= (request > len(owners)) | (batch > len(owners)) | (selector >= len(selectors))
    suspect |= (request == 0) & (batch == 0) & ~_OWNERLESS.take(stage, mode="clip")
    suspect |= _named_wrongly(names, limits.max_id_bytes)
    wrong_owners = np.concatenate([[False], _named_wrongly(owners, limits.max_id_bytes)])
    suspect |= wrong_owners.take(request, mode="clip") | wrong_owners.take(batch, mode="clip")
    if any(s is None for s in selectors):
        suspect |= np.array([s is None for s in selectors]).take(selector, mode="clip")

    bad: Bad = []
    for i in np.flatnonzero(suspect).tolist():
        try:
            decoder.decode(_single(m, i, stage, size, layer, own, held, request, batch, selector), now)
        except HintError as e:
            bad.append((i, of_transfer_row(e, i, int(selector[i]))))
        else:
            suspect[i] = False
    least = limits.min_deadline_ms / 1e3  # what is late stays so
    columns = TransferColumns(
        row=np.arange(n, dtype=np.int32),
        ids=names,
        owners=owners,
        request=request.astype(np.int32),
        batch=batch.astype(np.int32),
        stage=stage.astype(np.uint8),
        target_layer=layer.astype(np.int32),
        size=size.astype(np.float64),
        selectors=selectors,
        selector=selector.astype(np.int32),
        deadline=np.where(own == 0, INF, now + np.where(own > 0, np.maximum(own * US, least), own * US)),
        ordered=(flags & INTERLEAVED) == 0,
        position=position,
        hold_until=np.where(held == 0, INF, now + np.maximum(held * US, limits.min_defer_ms / 1e3)),
        ttl=np.where(ttl == 0, limits.default_ttl_s, np.minimum(ttl * US, limits.max_ttl_s)),
    )
    return (columns.keep(~suspect) if bad else columns), bad


def progress(decoder: Decoder, m: pb.ProgressColumns, now: float) -> Iterator[ProgressHint | HintError]:
    """Decode progress, row by row: what a row says, or what is wrong with it.

    Raises HintError when the columns don't fit together.
    """
    n = len(m.batch_ids)
    layers = _column("progress.current_layer", m.current_layer, n, np.int64).tolist()
    ends = _column("progress.compute_done", m.compute_done, n, np.bool_).tolist()
    for i, (name, layer, end) in enumerate(zip(m.batch_ids, layers, ends, strict=True)):
        one = pb.Hint(progress=pb.LayerProgress(batch_id=name, current_layer=layer, compute_done=end))
        try:
            hint = decoder.decode(one, now)
        except HintError as e:
            yield of_progress_row(e, i)
        else:
            assert isinstance(hint, ProgressHint)  # noqa: S101 - so it was encoded
            yield hint


def of_progress_row(e: HintError, row: int) -> HintError:
    """The error of a single LayerProgress as that of a row."""
    name = e.field.removeprefix("progress.")
    column = "batch_ids" if name == "batch_id" else name
    return HintError(f"progress.{column}[{row}]", e.problem, e.fix, exhausted=e.exhausted)


def of_transfer_row(e: HintError, row: int, selector: int = 0) -> HintError:
    """The error of a single Transfer as that of a row. ``selector``: index of its selector; the engine names none."""
    name = e.field.removeprefix("transfer.")
    if name.startswith("selector."):
        field = f"transfers.selectors[{selector}].{name.removeprefix('selector.')}"
    else:
        field = f"transfers.{_TO_COLUMN.get(name, name)}[{row}]"
    return HintError(field, e.problem, e.fix, exhausted=e.exhausted)


def _column(name: str, values: Sequence[Any], n: int, dtype: Any) -> Ints:
    if len(values) == n:
        return np.array(values, dtype)
    if len(values) == 1:
        return np.full(n, values[0], dtype)
    if not values:
        return np.zeros(n, dtype)
    raise HintError(name, f"{len(values)} values for {n} rows", "give one for each row, one for all, or none")


def _named_wrongly(names: list[str], limit: int) -> npt.NDArray[np.bool_]:
    """Which names might be empty or too long: a character takes at most four bytes."""
    length = np.fromiter(map(len, names), np.int64, len(names))
    return np.asarray((length == 0) | (4 * length > limit))


def _selector(decoder: Decoder, m: pb.Selector) -> Selector | None:
    """None: decoding it as part of a row says what is wrong."""
    try:
        return decoder.selector("selector", m)
    except HintError:
        return None


def _single(
    m: pb.TransferColumns,
    i: int,
    stage: Ints,
    size: Ints,
    layer: Ints,
    own: Ints,
    held: Ints,
    request: Ints,
    batch: Ints,
    selector: Ints,
) -> pb.Hint:
    """One row as a single hint. Raises HintError where it names what isn't there."""
    owners = ["", *m.owners]
    for name, index, last, table in (
        ("request_id", int(request[i]), len(m.owners), "owners, which count from 1"),
        ("batch_id", int(batch[i]), len(m.owners), "owners, which count from 1"),
        ("selector", int(selector[i]), len(m.selectors) - 1, "selectors, which count from 0"),
    ):
        if index > last:
            raise HintError(f"transfer.{name}", f"{index} is beyond the last of the {table}", f"at most {last}")
    if stage[i] > STAGE_MAX:
        raise HintError("transfer.stage", f"unknown stage {stage[i]}", STAGES_TEXT)
    out = pb.Hint()
    t = out.transfer
    t.id, t.request_id, t.batch_id = m.ids[i], owners[int(request[i])], owners[int(batch[i])]
    t.stage, t.bytes, t.target_layer, t.deadline_us = (  # type: ignore[assignment]  # an open enum
        int(c[i]) for c in (stage, size, layer, own)
    )
    t.max_defer_us = min(int(held[i]), DEFER_MAX)
    t.selector.CopyFrom(m.selectors[int(selector[i])])
    return out
