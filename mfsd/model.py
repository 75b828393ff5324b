# SPDX-License-Identifier: Apache-2.0
"""Typed values that every room of the house shares: stages, selectors, hints. No I/O, no clock.

Times are seconds (float) on CLOCK_MONOTONIC unless a name ends in ``_ns``; sizes are bytes; rates are bytes/s.
"""

from __future__ import annotations

import enum
import ipaddress
import math
from dataclasses import dataclass, field
from typing import Final

INF: Final = math.inf


class Stage(enum.IntEnum):
    """Network stage of disaggregated serving (MFS paper, section 2; numbers as in proto ``mfsd.v1.Stage``)."""

    NONE = 0
    KV_REUSE = 1
    COLLECTIVE = 2
    P2D = 3
    BACKGROUND = 4
    """Stores, offload, prefetch, weights: nobody waits for them."""

    @property
    def early(self) -> bool:
        """Stages 1 and 2 feed the prefill computation: their deadlines are implicit."""
        return self in (Stage.KV_REUSE, Stage.COLLECTIVE)


class Mode(enum.StrEnum):
    """``observe`` classifies, counts and predicts; ``enforce`` also steers."""

    OBSERVE = "observe"
    ENFORCE = "enforce"


class HintError(ValueError):
    """A hint that can't be applied. ``field`` is the path inside the hint, ``fix`` says what is allowed."""

    def __init__(self, field_path: str, problem: str, fix: str = "", *, exhausted: bool = False) -> None:
        super().__init__(f"{field_path}: {problem}" + (f"; {fix}" if fix else ""))
        self.field = field_path
        self.problem = problem
        self.fix = fix
        self.exhausted = exhausted
        """True: a limit of the daemon was reached (RESOURCE_EXHAUSTED), the hint itself is well formed."""


# --- selectors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PortRange:
    """``first``..``last`` inclusive. ``PortRange(0, 65535)`` is any port."""

    first: int = 0
    last: int = 65535

    @property
    def exact(self) -> bool:
        """True for one single port."""
        return self.first == self.last

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class CookieSelector:
    """One local socket, by SO_COOKIE."""

    cookie: int


@dataclass(frozen=True, slots=True)
class TupleSelector:
    """Endpoints of a connection; ranges and a missing source address may match several sockets."""

    src: Address | None
    dst: Address
    sport: PortRange
    dport: PortRange
    protocol: int = 6

    @property
    def exact(self) -> bool:
        """True when it names one connection, so that the classifier can match it without a local socket."""
        return self.src is not None and self.sport.exact and self.dport.exact


@dataclass(frozen=True, slots=True)
class ProcessSelector:
    """TCP sockets of a process towards a remote network."""

    pid: int
    remote: Network | None
    dport: PortRange


Selector = CookieSelector | TupleSelector | ProcessSelector


@dataclass(frozen=True, slots=True)
class Endpoints:
    """One connection as the shaped device sees it."""

    src: Address
    sport: int
    dst: Address
    dport: int
    protocol: int = 6

    def __str__(self) -> str:
        def host(a: Address) -> str:
            return f"[{a}]" if a.version == 6 else str(a)

        return f"{host(self.src)}:{self.sport} -> {host(self.dst)}:{self.dport}"


# --- hints ------------------------------------------------------------------------------------------------------------
# What proto/mfsd/v1/hints.proto says, decoded and clamped, durations already turned into monotonic times.


@dataclass(slots=True)
class RequestHint:
    """A request and its TTFT deadline."""

    id: str
    deadline: float
    batch_id: str = ""
    compute_left: float = 0.0
    """Seconds of compute still to be done for the first token, at the time of the hint; 0: unknown."""
    ttl: float = 30.0


@dataclass(slots=True)
class BatchHint:
    """Requests that execute together."""

    id: str
    request_ids: list[str] = field(default_factory=list)
    layers: int = 0
    current_layer: int = 0
    layer_compute: float = 0.0


@dataclass(slots=True)
class ProgressHint:
    """A batch started a layer, or has ended its forward pass."""

    batch_id: str
    current_layer: int
    compute_done: bool = False


@dataclass(slots=True)
class TransferHint:
    """Bytes about to be written to a connection."""

    id: str
    request_id: str
    batch_id: str
    stage: Stage
    target_layer: int
    size: int
    selector: Selector
    deadline: float = INF
    """Own deadline; INF: its request's."""
    ttl: float = 30.0


class What(enum.IntEnum):
    """What a completion or cancellation names."""

    TRANSFER = 0
    REQUEST = 1
    BATCH = 2


@dataclass(slots=True)
class EndHint:
    """Completion (``cancelled`` False) or cancellation."""

    what: What
    id: str
    cancelled: bool = False


@dataclass(slots=True)
class MarkHint:
    """Static stage of a connection; ``Stage.NONE`` takes the mark back."""

    selector: Selector
    stage: Stage


Hint = RequestHint | BatchHint | ProgressHint | TransferHint | EndHint | MarkHint


class EventKind(enum.IntEnum):
    """What the daemon tells a worker (numbers as in proto ``mfsd.v1.Event.Kind``)."""

    INFEASIBLE = 1
    PRUNED = 2
    RESTORED = 3
    EXPIRED = 4
    CONNECTION_GONE = 5


@dataclass(frozen=True, slots=True)
class Event:
    """One message on the way back."""

    kind: EventKind
    request_id: str
    transfer_id: str
    reason: str
