# SPDX-License-Identifier: Apache-2.0
"""Everything that can be chosen in the lab, on one page.

One ``Settings`` is one cell: one run of one cluster, with one kind of work, under one arm. Every command begins with a
preset below and changes some of its fields: each field is an option of the command line under its name (app.py), and
the reports print all of them with their meaning (results/report.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from mfsd.ground.model import Stage
from mfsd.ground.units import Rate
from mfsd.lab.arms import arm_of
from mfsd.lab.hosts.net import LabError
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.models import MODELS, Scaled

if TYPE_CHECKING:
    from collections.abc import Sequence

KV_CONDUITS: Final = 2
P2D_CONDUITS: Final = 4
"""Connections per pair of hosts and instance, as Mooncake's transfer engine keeps; a collective group has one, as
gloo's."""


def _f(default: Any, doc: str, *, at_least: float | None = None, at_most: float | None = None, **more: Any) -> Any:
    """A field, what it means, and the range of a number."""
    return field(default=default, metadata={"doc": doc, "at_least": at_least, "at_most": at_most, **more})


@dataclass(frozen=True)
class Settings:
    """One cell."""

    regime: str = _f("one", "The preset that was begun with.")
    arm: str = _f("none", "How the cluster is governed: an arm of the lab, or the name of a policy.")
    transport: Literal["conduits", "sockets", "real"] = _f(
        "conduits",
        "conduits: one process plays all hosts, on plain TCP. sockets: a process per host, on plain TCP. real: a "
        "process per host, on gloo and Mooncake's transfer engine.",
    )
    # --- the cluster
    prefill: int = _f(4, "Prefill hosts; every instance has a rank on each.", at_least=2, at_most=16)
    decode: int = _f(2, "Decode hosts.", at_least=1, at_most=16)
    stores: int = _f(2, "KV stores.", at_least=0, at_most=16)
    instances: int = _f(1, "Prefill instances; they share the hosts' links.", at_least=1, at_most=8)
    rate: str = _f("200mbit", "Of prefill hosts' and stores' links, each way.", rate=True)
    decode_rate: str = _f("100mbit", "Of decode hosts' links.", rate=True)
    nic: str = _f("100gbit", "The real link that `rate` stands for: bytes shrink by as much, times stay.", rate=True)
    switch: Literal["none", "fifo", "classes", "levels"] = _f(
        "classes",
        "none: forwards at the speed of memory. Else an output queue per port at the host's rate, with: one FIFO; "
        "three strict classes by DSCP; a strict class per band.",
    )
    control_unhinted: bool = _f(True, "ACKs of unhinted connections go to the control band, as in mfsd.toml.")
    # --- the model
    model: str = _f("mixtral-8x7b", "Model; its GPUs are sleeps.", choices=tuple(MODELS))
    steps: int = _f(8, "A forward pass is emulated in so many groups of layers; 0: layer by layer.", at_least=0)
    max_batch: int = _f(
        8192,
        "New tokens that a scheduler takes into a forward pass, unless one request alone has more: that of an "
        "instance, or of a rank where ranks are processes.",
        at_least=1,
    )
    cache: Literal["stores", "ranks"] = _f(
        "stores",
        "Where cached blocks lie: striped over the stores, or over the ranks' memories, whence other ranks fetch them "
        "(from the stores, if there are any).",
    )
    # --- the work
    trace: str = _f(
        "mooncake",
        "Prompts and reuse: Mooncake's conversation trace (FAST'25, Apache-2.0; arrivals spread inside its 3 s ticks) "
        "or Azure's (2023, CC-BY 4.0; no reuse known).",
        choices=("mooncake", "azure"),
    )
    arrivals: Literal["shuffled", "poisson", "recorded"] = _f(
        "shuffled",
        "shuffled: the trace's gaps, its prompts in an order that the seed decides, sped up to `load`. poisson: the "
        "same with Poisson gaps. recorded: the trace's own order, `speed` times as fast.",
    )
    start: float = _f(60.0, "Seconds into the trace; what came before has filled the caches.", at_least=0)
    duration: float = _f(12.0, "Seconds of arrivals.", at_least=3, at_most=3600)
    seed: int = _f(0, "Decides what chance decides.")
    load: float = _f(1.0, "Offered to the busiest link, as a share of its rate.", at_least=0.01, at_most=10)
    speed: float = _f(1.0, "Recorded arrivals come so many times as fast.", at_least=0.01, at_most=100)
    min_tokens: int = _f(512, "Shorter prompts are computed where they are decoded.", at_least=1)
    max_tokens: int = _f(8192, "Longer ones go to instances of their own.", at_least=1)
    max_new: int = _f(8192, "So do those with more tokens to compute.", at_least=1)
    hot: float = _f(0.0, "Share of requests for the first decode host, on top of an even split.", at_least=0, at_most=1)
    reuse: float = _f(0.0, "At least this share of each prompt is cached.", at_least=0, at_most=1)
    slo_scale: float = _f(3.0, "A request's TTFT is to be so many times its unloaded TTFT (computed).", at_least=1)
    tight: float = _f(
        0.0, "Share of requests with half that scale; the others then have twice of it.", at_least=0, at_most=1
    )
    payload: float = _f(
        EFFICIENCY, "Share of a link's rate that the unloaded TTFT reckons with.", at_least=0.5, at_most=1
    )
    # --- the run
    warm_up: float = _f(2.0, "Requests that arrive in the first seconds are served but not counted.", at_least=0)
    patience: float = _f(
        6.0, "Seconds after the last arrival; what is unfinished then counts as never done.", at_least=1
    )

    def check(self) -> Settings:
        """Itself. Raises LabError when it can't be run."""
        try:
            arm = arm_of(self.arm)
        except ValueError as e:
            raise LabError(str(e)) from e
        if self.cache == "stores" and not self.stores:
            raise LabError("stores = 0: the cache needs at least one, or must be in the ranks (cache = ranks)")
        if self.transport != "conduits" and self.scaled.model.dense:
            raise LabError(
                f"model = {self.model}: dense ones, whose ranks share every request, need transport = conduits"
            )
        if self.transport == "real" and (self.instances != 1 or not self.stores or arm.background):
            raise LabError("transport = real: one instance, at least one store, no cross traffic")
        return self

    @property
    def name(self) -> str:
        """Unique among cells of the same presets: what differs from the preset. Also the name of its file."""
        preset = PRESETS[self.regime].settings
        given = {"load": self.load, "seed": self.seed} if self.arrivals != "recorded" else {"seed": self.seed}
        given |= {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in {"regime", "arm", "seed", "load"} and getattr(self, f.name) != getattr(preset, f.name)
        }
        return "_".join([self.regime, self.arm, *(f"{k}-{_word(v)}" for k, v in given.items())])

    # --- what follows from it -----------------------------------------------------------------------------------------

    @cached_property
    def scaled(self) -> Scaled:
        """Sizes and times."""
        return Scaled(MODELS[self.model], Rate.parse(self.rate), Rate.parse(self.nic), self.prefill, self.steps)

    @property
    def ranks(self) -> list[str]:
        """Prefill hosts."""
        return [f"p{i}" for i in range(self.prefill)]

    @property
    def hosts(self) -> list[str]:
        """All, prefill first."""
        return [*self.ranks, *(f"d{i}" for i in range(self.decode)), *(f"s{i}" for i in range(self.stores))]

    @property
    def shaped(self) -> list[str]:
        """Hosts whose egress has a rate, and a daemon where mfsd governs.

        Decode hosts only acknowledge; where the switch has no queues either, nobody shapes that.
        """
        return [h for h in self.hosts if self.switch != "none" or not h.startswith("d")]

    @property
    def links(self) -> tuple[str, ...]:
        """Clusters with the same value can be run on the same hosts."""
        return self.rate, self.decode_rate, *self.hosts, *self.shaped

    def rate_of(self, host: str) -> Rate:
        """Of its link, either way."""
        return Rate.parse(self.decode_rate if host.startswith("d") else self.rate)

    def conduits(self) -> list[Conduit]:
        """All connections of the cluster; every process numbers them alike."""
        ends: list[tuple[str, str, Stage, int]] = []
        for i in range(self.instances):
            ends += [(a, b, Stage.COLLECTIVE, i) for a in self.ranks for b in self.ranks if a != b]
            ends += [(rank, f"d{d}", Stage.P2D, i) for rank in self.ranks for d in range(self.decode)
                     for _ in range(P2D_CONDUITS)]  # fmt: skip
            holders = [f"s{s}" for s in range(self.stores)] or self.ranks
            ends += [(holder, rank, Stage.KV_REUSE, i) for holder in holders for rank in self.ranks if holder != rank
                     for _ in range(KV_CONDUITS)]  # fmt: skip
        if arm_of(self.arm).background:
            ends += [(rank, f"d{d}", Stage.NONE, 0) for rank in self.ranks for d in range(self.decode)]
        return [Conduit(number, *each) for number, each in enumerate(ends)]


@dataclass(frozen=True, slots=True)
class Conduit:
    """One long-lived connection that carries bytes of one stage from one host to another."""

    number: int
    src: str
    dst: str
    stage: Stage
    instance: int


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def told(cells: Sequence[Settings]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of every setting of these cells; where they differ, all values."""
    out = []
    for f in dataclasses.fields(Settings):
        values = dict.fromkeys(_word(getattr(c, f.name)) for c in cells)
        out.append((f.name, ", ".join(values), str(f.metadata["doc"])))
    return out


def varying(cells: Sequence[Settings]) -> list[str]:
    """Names of the settings, other than the arm, in which these cells differ."""
    return [
        f.name for f in dataclasses.fields(Settings) if f.name != "arm" and len({getattr(c, f.name) for c in cells}) > 1
    ]


# --- presets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings to begin with. ``loads``: those of the whole matrix, offered to the busiest link."""

    title: str
    settings: Settings
    loads: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0)


MEAN_OF: Final = ("one", "several", "hot", "reuse")
"""Regimes over which means are taken. In "even" the prefill links carry mostly collectives, which no order shortens."""
_DEMO: Final = Settings(
    regime="demo", transport="sockets", prefill=2, decode=1, stores=0, rate="1gbit", decode_rate="1gbit", nic="50gbit",
    switch="none", control_unhinted=False, steps=0, max_batch=4096, cache="ranks", arrivals="recorded", start=130.0,
    duration=28.0, speed=2.0, min_tokens=2048, max_tokens=65_536, payload=1.0, warm_up=0.0, patience=20.0,
)  # fmt: skip
_REAL: Final = dataclasses.replace(
    _DEMO, regime="real", transport="real", stores=1, rate="200mbit", decode_rate="200mbit", steps=8
)
PRESETS: Final[dict[str, Preset]] = {
    p.settings.regime: p
    for p in (
        Preset("one instance", Settings("one", load=0.4), (0.3, 0.4, 0.5, 0.6)),
        Preset(
            "four instances, slow decode NICs",
            Settings("several", instances=4, decode_rate="50mbit"),
            (0.85, 1.0, 1.15, 1.25),
        ),
        Preset(
            "two instances, a hot decode host", Settings("hot", instances=2, hot=0.6, load=0.9), (0.8, 0.9, 1.0, 1.1)
        ),
        Preset(
            "two instances, much reuse", Settings("reuse", instances=2, reuse=0.7, load=0.75), (0.65, 0.75, 0.85, 0.95)
        ),
        Preset("four instances, links bound by collectives", Settings("even", instances=4, load=0.8)),
        Preset("two ranks that fetch cached KV from each other, one decode host", _DEMO),
        Preset("two ranks, a store and a decode host on gloo and Mooncake's transfer engine", _REAL),
    )
}
REGIMES: Final = (*MEAN_OF, "even")
"""Presets of the cluster lab's matrix."""
