# SPDX-License-Identifier: Apache-2.0
"""What the API asks of the daemon that serves it (mfsd.daemon.daemon.Daemon)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mfsd.engine.device import Device as EngineDevice
    from mfsd.engine.engine import Engine
    from mfsd.engine.sockets import Socket
    from mfsd.ground.model import Mode, RuleSelector, Stage
    from mfsd.v1 import control_pb2 as pb

    class Device(EngineDevice, Protocol):
        """A configured device, as operators see it."""

        dscp: Mapping[str, int]
        ifindex: int
        loader: str
        notice: str
        failure: str

        @property
        def backend(self) -> str:
            """Of the qdiscs in force; empty when only observed."""
            ...

        @property
        def hook(self) -> str:
            """Where the classifier hangs; empty when it does not."""
            ...


@dataclass(frozen=True, slots=True)
class BandRow:
    """One band of one device, as operators see it; bytes and packets are those sent, backlog those queued now."""

    index: int
    classid: str
    lanes: int
    bytes: int
    packets: int
    drops: int
    backlog: int


@dataclass(frozen=True, slots=True)
class RuleState:
    """A rule in force."""

    name: str
    source: str
    """Where it comes from."""
    selector: RuleSelector
    stage: Stage
    ordered: bool
    due_in: float
    """INF: none."""
    problem: str = ""
    """Why it names nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a rule names a connection."""

    socket: Socket
    rule: RuleState
    failing: tuple[str, ...]
    """Conditions that don't hold, in words; none: it does."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What has been read of one device."""

    bands: Sequence[BandRow]
    stats: Mapping[str, int]
    """The classifier's counters by name (enum mfsd_stat in bpf/mfsd.h)."""


@dataclass(frozen=True, slots=True)
class Way:
    """What deferred connections of a band know of the way to a peer; see bpf/yield.h."""

    peer: str
    band: str
    connections: int
    queue_s: float
    """Queue that was seen last."""
    target_s: float
    """Queue that they aim at."""
    window: float
    """What each of them may have in flight, packets."""
    queue_seconds_sum: float
    """Of ``samples``, since the way is known."""
    samples: int
    steered_s: float
    """Time that it was looked at..."""
    yielded_s: float
    """...and of that, spent getting out of somebody's way."""


class Operations(Protocol):
    """What operators ask."""

    engine: Engine
    started: float

    @property
    def rules(self) -> Sequence[RuleState]:
        """Rules in force."""
        ...

    async def verdicts(self, cookie: int, port: int) -> Sequence[Verdict]:
        """What each rule says of the connections with a cookie, or with a port at either end."""
        ...

    @property
    def all_devices(self) -> Sequence[Device]:
        """The configured devices."""
        ...

    async def figures(self) -> list[Figures]:
        """Of all devices, in their order; read elsewhere than on the event loop, since the kernel may make one wait."""
        ...

    @property
    def yields(self) -> bool:
        """Deferred connections yield in the network."""
        ...

    async def ways(self) -> Sequence[Way]:
        """What is known of the ways to peers where they do."""
        ...

    def notices(self) -> list[str]:
        """Things an operator should know."""
        ...

    def tick_durations(self) -> tuple[float, float]:
        """Median and 99th percentile, seconds."""
        ...

    async def metrics(self) -> str:
        """All metrics in OpenMetrics' text format."""
        ...

    def set_log_level(self, level: str | None) -> str:
        """Change the least severe level that is logged (None: don't); the one in force then."""
        ...

    def steering_changed(self) -> None:
        """Mode or pause have changed: tell the kernel."""
        ...

    async def set_mode(self, mode: Mode) -> None:
        """Observe or enforce; the latter installs the qdiscs where they are not yet."""
        ...

    async def plans(self, names: Sequence[str]) -> list[pb.DevicePlan]:
        """What enforcing changes, or has changed, on these devices."""
        ...

    async def restore(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Put the qdiscs of these devices back; names of the restored ones, and problems."""
        ...
