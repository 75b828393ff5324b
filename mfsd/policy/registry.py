# SPDX-License-Identifier: Apache-2.0
"""Policies by name, as a config selects them: ``policy = "deadline-ladder"``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.policy.deadline import DeadlineLadder
from mfsd.policy.mfs.mfs import Mfs
from mfsd.policy.parts import params as parameters
from mfsd.policy.rivals.edf import Edf, Karuna
from mfsd.policy.rivals.llf import Llf
from mfsd.policy.rivals.sincronia import Sincronia
from mfsd.policy.rivals.size import BySize
from mfsd.policy.rivals.static import Fair, TwoClass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.policy.base import PolicyBase
    from mfsd.policy.views import Policy

DEFAULT: Final = "deadline-ladder"
"""What measures best (docs/policies.md)."""
MAX_LEVELS: Final = 0x4000
"""More could be confused with LEVEL_NEW and LEVEL_SCAVENGER; no qdisc comes near."""


@dataclass(frozen=True)
class Entry:
    """A policy class under a name, with parameters that differ from the class's defaults."""

    cls: type[PolicyBase]
    preset: Mapping[str, parameters.Value] = field(default_factory=dict)


_ENTRIES: Final[dict[str, Entry]] = {
    "deadline-ladder": Entry(DeadlineLadder),
    "mfs": Entry(Mfs),
    "mfs-nop1": Entry(Mfs, {"p1": False}),
    "mfs-giveup": Entry(Mfs, {"late_infeasible": "scavenger"}),
    "fair": Entry(Fair),
    "two-class": Entry(TwoClass),
    "sjf": Entry(BySize),
    "srpt": Entry(BySize),
    "pias": Entry(BySize),
    "edf": Entry(Edf),
    "edf-all": Entry(Edf, {"everything": True}),
    "karuna": Entry(Karuna),
    "sincronia": Entry(Sincronia),
    "llf": Entry(Llf),
}


def names() -> tuple[str, ...]:
    """All policy names, the default first."""
    return tuple(_ENTRIES)


def make_policy(name: str, levels: int | None = None, params: Mapping[str, parameters.Value] | None = None) -> Policy:
    """Make the policy ``name`` with ``levels`` levels (None: its own default) and ``params`` by name.

    ``levels`` should be what the devices' qdiscs can tell apart (len(Bands.level_bands)), so that the policy itself
    decides what to merge. Raises ValueError naming the key, the value and what is allowed.
    """
    entry = _ENTRIES.get(name)
    if entry is None:
        raise ValueError(f"policy = {name!r}: must be one of {', '.join(names())}")
    kwargs: dict[str, Any] = {**entry.preset, **parameters.check(name, entry.cls, params or {})}
    if levels is not None:
        if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"levels = {levels!r}: must be an integer from 1 to {MAX_LEVELS}")
        kwargs["levels"] = levels
    return entry.cls(name=name, **kwargs)


def describe(name: str) -> dict[str, str]:
    """Each parameter of a policy: its default, what is allowed and what it means, in words."""
    entry = _ENTRIES[name]
    return {
        key: f"default {entry.preset.get(key, f.default)!r}, {parameters.allowed(f)}: {f.metadata['doc']}"
        for key, f in parameters.options(entry.cls).items()
    }
