# SPDX-License-Identifier: Apache-2.0
"""What every policy sees and decides.

The same policy serves the daemon, the tests and the simulator, so all comparisons differ in the policy alone. A view
is a structure of numpy arrays (one element per row), so that a decision over 10,000 transfers is a handful of array
operations. Rows are in the order of the engine's store; a policy must not depend on that order except to break ties
(permuting rows permutes levels).

The engine gives every column; ``of`` makes views of which only some columns matter.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import Stage

F8 = npt.NDArray[np.float64]
I4 = npt.NDArray[np.int32]
I2 = npt.NDArray[np.int16]
U1 = npt.NDArray[np.uint8]
B1 = npt.NDArray[np.bool_]

UNSTAGED: Final = int(Stage.NONE)
KV_REUSE: Final = int(Stage.KV_REUSE)
COLLECTIVE: Final = int(Stage.COLLECTIVE)
P2D: Final = int(Stage.P2D)
BACKGROUND: Final = int(Stage.BACKGROUND)
"""model.Stage as the plain integers that numpy compares fastest."""


def _column(dtype: npt.DTypeLike, neutral: float = 0) -> dict[str, Any]:
    """Metadata of a column: its type, and what stands in it where ``of`` is told nothing."""
    return {"dtype": dtype, "neutral": neutral}


@functools.cache
def _fields(of: type) -> tuple[dataclasses.Field[Any], ...]:
    """Of a view."""
    return dataclasses.fields(of)


class _Rows:
    """A view with one element per row in every column."""

    __slots__ = ()

    @classmethod
    def of(cls, n: int, **columns: npt.ArrayLike) -> Self:
        """``n`` rows with these columns, each one value for all rows or one per row, copied; the others are neutral."""
        out: dict[str, Any] = {}
        for f in _fields(cls):  # type: ignore[arg-type] # the class is hashable, though its rows are not
            out[f.name] = column = np.empty(n, f.metadata["dtype"])
            if f.name in columns:
                column[:] = columns.pop(f.name)
            else:
                column.fill(f.metadata["neutral"])
        return cls(**out, **columns)

    def take(self, rows: npt.NDArray[np.signedinteger]) -> Self:
        """These rows, copied."""
        return type(self)(*(getattr(self, f.name).take(rows) for f in _fields(type(self))))  # type: ignore[arg-type]


@dataclass(slots=True)
class TransferView(_Rows):
    """Unfinished transfers; every array has shape (n,)."""

    stage: U1 = field(metadata=_column(np.uint8))
    """model.Stage."""
    size: F8 = field(metadata=_column(np.float64, 1))
    """Payload bytes in all."""
    left: F8 = field(metadata=_column(np.float64, 1))
    """Payload bytes not yet delivered, > 0. Bytes stuck in a starved queue count as left."""
    ahead: F8 = field(metadata=_column(np.float64))
    """Payload bytes of other transfers that leave before it on the same connection (FIFO)."""
    request: I4 = field(metadata=_column(np.int32, -1))
    """Row of its request in RequestView; -1 if it belongs to a batch only."""
    batch: I4 = field(metadata=_column(np.int32, -1))
    """Row of its batch in BatchView; -1 if unknown."""
    conn: I4 = field(metadata=_column(np.int32, -1))
    """Connection (slot); -1 while the selector has matched no socket."""
    target_layer: I4 = field(metadata=_column(np.int32))
    current_layer: I4 = field(metadata=_column(np.int32))
    """Layer that its batch computes now; 0 if unknown."""
    computing: B1 = field(metadata=_column(np.bool_))
    """False once the forward pass of its batch has ended (or is unknown): then time, not layers, drives promotion."""
    layer_started: B1 = field(metadata=_column(np.bool_, 1))
    """True when the current layer changed since the last evaluation (a layer boundary), or the row is new."""
    deadline: F8 = field(metadata=_column(np.float64, np.inf))
    """Monotonic seconds; the transfer's own or its request's; inf if none."""
    compute_left: F8 = field(metadata=_column(np.float64))
    """Seconds of compute left before the request's first token, extrapolated to now; 0 if unknown or done."""
    created: F8 = field(metadata=_column(np.float64))
    """Monotonic seconds."""
    level: I2 = field(metadata=_column(np.int16, LEVEL_NEW))
    """Level decided last time; LEVEL_NEW for a new row."""
    device: I4 = field(metadata=_column(np.int32))
    """Device of this host that it leaves by, a row of LinkView; 0 when there is one."""
    peer: I4 = field(metadata=_column(np.int32, -1))
    """Dense index of the remote address: the link into it; -1 unknown."""
    max_defer: F8 = field(metadata=_column(np.float64, np.inf))
    """Seconds after its creation past which it must not be held back any longer; inf: nobody said."""
    infeasible: B1 = field(metadata=_column(np.bool_))
    """What Decision.infeasible said last; False for a new row, and with policies that don't say."""

    def __len__(self) -> int:
        return len(self.stage)


@dataclass(slots=True)
class RequestView(_Rows):
    """Requests that are alive; every array has shape (r,)."""

    deadline: F8 = field(metadata=_column(np.float64, np.inf))
    """TTFT deadline, monotonic seconds."""
    arrival: F8 = field(metadata=_column(np.float64))
    """When the first hint about it came."""
    batch: I4 = field(metadata=_column(np.int32, -1))
    """-1 if none."""
    compute_left: F8 = field(metadata=_column(np.float64))
    """Seconds, extrapolated to now."""
    pruned: B1 = field(metadata=_column(np.bool_))
    """What Arrangement.pruned said last."""

    def __len__(self) -> int:
        return len(self.deadline)


@dataclass(slots=True)
class BatchView(_Rows):
    """Batches that are alive; every array has shape (b,)."""

    layers: I4 = field(metadata=_column(np.int32, 1))
    current_layer: I4 = field(metadata=_column(np.int32))
    layer_compute: F8 = field(metadata=_column(np.float64))
    """Seconds per layer; 0 if unknown."""
    compute_done: B1 = field(metadata=_column(np.bool_))
    arrival: F8 = field(metadata=_column(np.float64))
    rank: I4 = field(metadata=_column(np.int32))
    """What Arrangement.rank said last: 0 is the most urgent."""

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(slots=True)
class LinkView:
    """What the one link estimator knows. Arrays have shape (devices,)."""

    rate: F8
    """Bytes/s that the device gives when busy (measured, else configured); 0 if unknown."""
    load: F8
    """rho: share of the rate taken lately by all traffic, unhinted traffic included, 0..1."""
    load_above: F8
    """Shape (devices, levels + 1): share taken lately by levels more urgent than this one, control included."""
    floor: F8
    """Share of the rate that the floors of all bands keep together, 0..1: guarantees get the rest at most. 0 where the
    device has no floors."""
    taken: F8
    """Share of the rate that control, default, background and scavenger took lately, each at most its floor: what even
    the highest level can't have, 0..1."""
    collectives: F8
    """Share of the time that collectives would take if they had all of the link, 0..1: each waits for its end before
    the next one begins, and they pause for the rest of the time. 0: there are none."""
    unhinted: F8
    """Share of the rate that unhinted traffic offered lately, 0..1."""
    beyond: I4
    """Connections that go on sending when all that was announced has arrived and is not due yet, shape (devices,)."""
    unannounced: B1
    """Levels on which connections moved lately of which nothing but the stage is known (rules, marks), shape (devices,
    levels)."""
    packet: F8
    """Seconds that the largest packet takes on the device, shape (devices,): whoever is on the wire is not stopped, and
    what can't be sent in parts comes late by that much. 0 if the rate is unknown."""
    peer_rate: F8 = field(default_factory=lambda: np.zeros(0))
    """Bytes/s of the link into each peer, shape (peers,), inf where nobody said; empty if no rate of any is known."""

    @classmethod
    def of(
        cls,
        rate: npt.ArrayLike,
        levels: int,
        *,
        load: npt.ArrayLike = 0.0,
        load_above: npt.ArrayLike = 0.0,
        floor: npt.ArrayLike = 0.0,
        taken: npt.ArrayLike = 0.0,
        collectives: npt.ArrayLike = 0.0,
        unhinted: npt.ArrayLike = 0.0,
        beyond: npt.ArrayLike = 0,
        unannounced: npt.ArrayLike = False,
        packet: npt.ArrayLike = 0.0,
        peer_rate: npt.ArrayLike = (),
    ) -> Self:
        """As many devices as ``rate`` has elements; shares are broadcast to their shapes. Everything is copied."""
        rates = np.array(rate, dtype=np.float64, ndmin=1)
        n = len(rates)
        return cls(
            rate=rates,
            load=np.full(n, load, dtype=np.float64),
            load_above=np.full((n, levels + 1), load_above, dtype=np.float64),
            floor=np.full(n, floor, dtype=np.float64),
            taken=np.full(n, taken, dtype=np.float64),
            collectives=np.full(n, collectives, dtype=np.float64),
            unhinted=np.full(n, unhinted, dtype=np.float64),
            beyond=np.full(n, beyond, dtype=np.int32),
            unannounced=np.full((n, levels), unannounced, dtype=np.bool_),
            packet=np.full(n, packet, dtype=np.float64),
            peer_rate=np.array(peer_rate, dtype=np.float64),
        )


@dataclass(slots=True)
class Views:
    """All that a policy is shown."""

    transfers: TransferView
    requests: RequestView
    batches: BatchView
    link: LinkView
    now: float
    """Monotonic seconds."""
    sizes: F8 = field(default_factory=lambda: np.zeros(0))
    """Sizes of transfers seen lately, in any order; empty: those of ``transfers`` stand for them."""
    cluster_requests: int = 0
    """Live requests of all hosts, on a coordinator's word; 0: nobody says."""

    @classmethod
    def of(
        cls,
        transfers: TransferView,
        link: LinkView,
        *,
        requests: RequestView | None = None,
        batches: BatchView | None = None,
        now: float = 0.0,
    ) -> Self:
        """A state without requests or without batches, unless they are given."""
        none, nothing = RequestView.of(0), BatchView.of(0)
        return cls(
            transfers, none if requests is None else requests, nothing if batches is None else batches, link, now
        )


@dataclass(slots=True)
class Decision:
    """What a policy decides at every evaluation."""

    level: I2
    """Shape (n,): 0 .. levels-1, LEVEL_NONE, LEVEL_BACKGROUND or LEVEL_SCAVENGER."""
    guarantee: F8 | None = None
    """Bytes/s that each level of each device must get on top of its band's floor even when levels above it are busy,
    shape (devices, levels); each device's add up to at most what ``LinkView.floor`` leaves of its rate. None: none."""
    given_up: F8 | None = None
    """The same for what is given up (LEVEL_SCAVENGER), shape (devices,); None: nothing."""
    infeasible: B1 | None = None
    """Transfers of requests that can't be in time, shape (n,), where the policy finds that out on its way to levels;
    None: ask ``Policy.infeasible``."""
    lasts: float = 0.0
    """Seconds for which it may stand while nothing comes in, nothing ends and the link stays about as it is; 0: until
    the next tick."""


@dataclass(slots=True)
class Arrangement:
    """Outcome of the inter-request algorithm, for all rows of the views it was given."""

    rank: I4
    """Shape (b,): position of each batch, 0 first."""
    pruned: B1
    """Shape (r,)."""


@dataclass(slots=True)
class Explanation:
    """Why a transfer is at its level."""

    reasons: list[str] = field(default_factory=list)
    """Sentences, most important first."""
    figures: dict[str, float] = field(default_factory=dict)
    """By name: mlu, threshold, rli, red_rank, rho, next_promotion_s ..."""
