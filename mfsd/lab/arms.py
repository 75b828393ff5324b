# SPDX-License-Identifier: Apache-2.0
"""How a cluster is governed: not at all, or by mfsd with some policy, and what its hints are worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.ground.bands import MAX_HTB_LEVELS
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Faults:
    """How hints deviate from the truth."""

    size: float = 1.0
    """Announced sizes are wrong by up to this factor, either way, log-uniformly; 1: exact."""
    lost: float = 0.0
    """Share of transfers that are not announced."""
    marks_lost: float = 0.0
    """Share of collective connections that are not marked."""
    deadline: float = 1.0
    """Announced time to the deadline over the true one."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of governing. ``policy`` "" is none: plain TCP over plain queues, no daemon, no hints."""

    name: str
    title: str
    policy: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    levels: int = MAX_HTB_LEVELS
    tick_ms: float = 10.0
    faults: Faults = field(default_factory=Faults)
    floors: tuple[float, ...] = ()
    """bands.floors of the hosts."""
    classes: tuple[int, int] | None = None
    """Levels in the switch's first class, and in the first two together; None: the policy's own (Policy.classes)."""
    peers: bool = False
    """The daemons know the rate of the decode hosts' links ([[peer]])."""
    yields: bool = False
    """Deferred connections yield in the network (network.yield)."""
    background: float = 0.0
    """Unhinted bytes from every prefill host to every decode host, together this share of a decode host's link."""

    @property
    def daemon(self) -> tuple[Any, ...]:
        """Arms with the same value can share running daemons."""
        return (self.policy, tuple(sorted(self.params.items())), self.levels, self.tick_ms, self.floors, self.classes,
                self.peers, self.yields)  # fmt: skip


def _arm(name: str, title: str, policy: str, **more: Any) -> Arm:
    own = ("levels", "tick_ms", "faults", "floors", "classes", "peers", "yields", "background")
    known = {k: more.pop(k) for k in own if k in more}
    return Arm(name, title, policy, more, **known)


_FLOORS: Final = (0.0, 0.1, 0.1, 0.1, 0.1)
_NET: Final[Mapping[str, Any]] = {"peers": True, "classes": (3, 4), "floors": _FLOORS}
"""The ladder fitted to a network whose decode links are its bottleneck.

The daemons know those links' rate. The switch's first class has KV with less than 0.1 s left beside the collectives,
the last one KV with more than 0.8 s left beside the doomed. KV keeps a tenth of a host's link per level meanwhile.
"""


def _own(name: str, title: str, **more: Any) -> Arm:
    return _arm(f"{registry.DEFAULT}-{name}", f"demand bound, {title}", registry.DEFAULT, **more)


def _net(name: str, title: str, **more: Any) -> Arm:
    return _arm(name, f"fitted ladder, {title}", "deadline-ladder", **_NET, **more)


_MAIN: Final = (
    Arm("none", "fair sharing (no mfsd)"),
    _arm(registry.DEFAULT, "demand bound (the default)", registry.DEFAULT),
    _arm("two-class", "static two-class", "two-class"),
    _arm("sjf", "SJF", "sjf"),
    _arm("edf", "EDF (stage 3 only, as in the paper)", "edf"),
    _arm("edf-all", "EDF over all flows", "edf-all"),
    _arm("karuna", "Karuna", "karuna"),
    _arm("pias", "PIAS", "pias"),
    _arm("mfs", "MFS as published", "mfs"),
    _arm("mfs-nop1", "MFS without P1", "mfs-nop1"),
    _arm("mfs-giveup", "MFS with give-up", "mfs-giveup"),
    _arm("ladder", "deadline ladder", "deadline-ladder"),
    _arm("ladder-net", "deadline ladder, fitted to the network", "deadline-ladder", **_NET),
    _arm("ladder-rli", "deadline ladder, stage 1 by RLI", "deadline-ladder", kv="rli"),
    _arm("ladder-keep", "deadline ladder without give-up", "deadline-ladder", give_up=False),
)
_ABLATION: Final = tuple(
    _arm(f"mfs-no-{switch}", f"MFS without {switch.upper() if len(switch) == 3 else switch}", "mfs", **{switch: False})
    for switch in ("rli", "mlu", "red", "pruning", "promotion")
)
_FIT: Final = (
    _arm("ladder-peers", "ladder with peer rates", "deadline-ladder", peers=True),
    _arm("ladder-classes", "ladder with peer rates and classes", "deadline-ladder", peers=True, classes=(3, 4)),
    _arm("ladder-floors", "ladder with peer rates and floors", "deadline-ladder", peers=True, floors=_FLOORS),
    _arm("two-class-floors", "two-class with a floor for KV", "two-class", floors=(0.0, 0.1)),
)
_YIELD: Final = (
    _own("yield", "yielding in the network", yields=True),
    _arm("two-class-yield", "two-class, yielding in the network", "two-class", yields=True),
)
_SENSITIVITY: Final = (
    _arm("mfs-k3", "MFS, K = 3 levels", "mfs", levels=3),
    _arm("mfs-e2", "MFS, E = 2", "mfs", ratio=2.0),
    _arm("mfs-u1", "MFS, U = 1", "mfs", upper=1.0),
    _net("ladder-tick2", "tick 2 ms", tick_ms=2.0),
    _net("ladder-tick100", "tick 100 ms", tick_ms=100.0),
    _net("ladder-sizes", "sizes off by up to 2x", faults=Faults(size=2.0)),
    _net("ladder-lost", "20 % of transfer hints lost", faults=Faults(lost=0.2)),
    _net("ladder-marks", "20 % of collective marks lost", faults=Faults(marks_lost=0.2)),
    _net("ladder-late", "deadlines told 1.5x too late", faults=Faults(deadline=1.5)),
    _net("ladder-cross", "20 % unhinted cross traffic", background=0.2),
    _own("sizes", "sizes off by up to 2x", faults=Faults(size=2.0)),
    _own("lost", "20 % of transfer hints lost", faults=Faults(lost=0.2)),
    _own("marks", "20 % of collective marks lost", faults=Faults(marks_lost=0.2)),
    _own("late", "deadlines told 1.5x too late", faults=Faults(deadline=1.5)),
    _own("cross", "20 % unhinted cross traffic", background=0.2),
    Arm("none-cross", "fair sharing, 20 % unhinted cross traffic", background=0.2),
    _arm("mfs-sizes", "MFS, sizes off by up to 2x", "mfs", faults=Faults(size=2.0)),
    _arm("mfs-lost", "MFS, 20 % of transfer hints lost", "mfs", faults=Faults(lost=0.2)),
)
ARMS: Final[dict[str, Arm]] = {a.name: a for a in (*_MAIN, *_ABLATION, *_FIT, *_YIELD, *_SENSITIVITY)}
MAIN: Final = tuple(a.name for a in _MAIN)
ABLATION: Final = tuple(a.name for a in _ABLATION)
FIT: Final = tuple(a.name for a in _FIT)
YIELD: Final = tuple(a.name for a in _YIELD)
SENSITIVITY: Final = tuple(a.name for a in _SENSITIVITY)


def arm_of(name: str) -> Arm:
    """An arm by its name, or a policy of mfsd with its own defaults. Raises ValueError for what is neither."""
    if name in ARMS:
        return ARMS[name]
    if name in registry.names():
        return Arm(name, f"policy {name}", name)
    raise ValueError(f"arm = {name}: must be one of {', '.join(sorted({*ARMS, *registry.names()}))}")
