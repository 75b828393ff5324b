# SPDX-License-Identifier: Apache-2.0
"""What every policy sees and decides. Pure: no I/O, no clock of its own; time is an argument.

The same policy serves the daemon, the tests and the simulator, so all comparisons differ in the policy alone. A view
is a structure of numpy arrays (one element per row), so that a decision over 10,000 transfers is a handful of array
operations. Rows are in the order of the engine's store; a policy must not depend on that order except to break ties
(permuting rows permutes levels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mfsd.bands import LEVEL_NEW, LEVEL_NONE, LEVEL_SCAVENGER

F8 = npt.NDArray[np.float64]
I4 = npt.NDArray[np.int32]
I2 = npt.NDArray[np.int16]
U1 = npt.NDArray[np.uint8]
B1 = npt.NDArray[np.bool_]

__all__ = [
    "B1",
    "F8",
    "I2",
    "I4",
    "LEVEL_NEW",
    "LEVEL_NONE",
    "LEVEL_SCAVENGER",
    "U1",
    "Arrangement",
    "BatchView",
    "Explanation",
    "LinkView",
    "Policy",
    "PolicyParameters",
    "RequestView",
    "TransferView",
]


@dataclass(slots=True)
class TransferView:
    """Unfinished transfers; every array has shape (n,)."""

    stage: U1
    """model.Stage."""
    size: F8
    """Payload bytes in all."""
    left: F8
    """Payload bytes not yet delivered, > 0. Bytes stuck in a starved queue count as left."""
    ahead: F8
    """Payload bytes of other transfers that leave before it on the same connection (FIFO)."""
    request: I4
    """Row of its request in RequestView; -1 if it belongs to a batch only."""
    batch: I4
    """Row of its batch in BatchView; -1 if unknown."""
    conn: I4
    """Connection (slot); -1 while the selector has matched no socket."""
    target_layer: I4
    current_layer: I4
    """Layer that its batch computes now; 0 if unknown."""
    computing: B1
    """False once the forward pass of its batch has ended (or is unknown): then time, not layers, drives promotion."""
    layer_started: B1
    """True when the current layer changed since the last evaluation (a layer boundary), or the row is new."""
    deadline: F8
    """Monotonic seconds; the transfer's own or its request's; inf if none."""
    compute_left: F8
    """Seconds of compute left before the request's first token, extrapolated to now; 0 if unknown or done."""
    created: F8
    """Monotonic seconds."""
    level: I2
    """Level decided last time; LEVEL_NEW for a new row."""
    port: I4
    """Egress port (device) of this host; 0 when there is one."""
    peer: I4
    """Dense index of the remote address: its ingress port; -1 unknown."""

    def __len__(self) -> int:
        return len(self.stage)


@dataclass(slots=True)
class RequestView:
    """Requests that are alive; every array has shape (r,)."""

    deadline: F8
    """TTFT deadline, monotonic seconds."""
    arrival: F8
    """When the first hint about it came."""
    batch: I4
    """-1 if none."""
    compute_left: F8
    """Seconds, extrapolated to now."""
    pruned: B1
    """What Arrangement.pruned said last."""

    def __len__(self) -> int:
        return len(self.deadline)


@dataclass(slots=True)
class BatchView:
    """Batches that are alive; every array has shape (b,)."""

    layers: I4
    current_layer: I4
    layer_compute: F8
    """Seconds per layer; 0 if unknown."""
    compute_done: B1
    arrival: F8
    rank: I4
    """What Arrangement.rank said last: 0 is the most urgent."""

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(slots=True)
class LinkView:
    """What the one link estimator knows. Arrays have shape (ports,)."""

    rate: F8
    """Bytes/s that the port gives when busy (measured, else configured)."""
    load: F8
    """rho: share of the rate taken lately by all traffic, 0..1."""
    load_above: F8
    """Shape (ports, levels + 1): share taken lately by levels more urgent than this one, control included."""
    peer_rate: F8 = field(default_factory=lambda: np.zeros(0))
    """Bytes/s of the link into each peer, shape (peers,), inf where nobody said; empty if no rate of any is known."""


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


class Policy(Protocol):
    """One scheduling policy. Instances hold parameters only; all state is in the views."""

    @property
    def name(self) -> str:
        """As in the config."""
        ...

    @property
    def levels(self) -> int:
        """Number of levels it uses, 0 .. levels-1, besides NONE and SCAVENGER."""
        ...

    @property
    def default_after(self) -> int:
        """How many of its levels stand above the default band (unhinted traffic)."""
        ...

    def evaluate(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> I2:
        """Level of every transfer, shape (n,). Vectorised; called at layer boundaries and on the timer."""
        ...

    def arrange(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> Arrangement | None:
        """Inter-request decision; called when a batch arrives or departs. None: the policy has none."""
        ...

    def explain(
        self, row: int, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> Explanation:
        """Why row ``row`` is where it is, and what would promote it and when."""
        ...

    def infeasible(
        self, transfers: TransferView, requests: RequestView, batches: BatchView, link: LinkView, now: float
    ) -> B1:
        """Rows that can't be in time even with the port to themselves, shape (n,)."""
        ...


PolicyParameters = Mapping[str, float | int | bool | str]
