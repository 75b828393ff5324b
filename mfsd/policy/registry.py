# SPDX-License-Identifier: Apache-2.0
"""Policies by name, as a config selects them: ``policy.name = "demand-bound"``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.policy.deadline import DeadlineLadder
from mfsd.policy.demand_bound.policy import DemandBound
from mfsd.policy.mfs.mfs import Mfs
from mfsd.policy.parts import params as parameters
from mfsd.policy.parts.params import Problem
from mfsd.policy.rivals.edf import Edf, Karuna
from mfsd.policy.rivals.llf import Llf
from mfsd.policy.rivals.sincronia import Sincronia
from mfsd.policy.rivals.size import BySize
from mfsd.policy.rivals.static import Fair, TwoClass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.policy.base import Policy

DEFAULT: Final = "demand-bound"
"""What keeps its promise (docs/policies.md)."""
MAX_LEVELS: Final = 0x4000
"""More could be confused with LEVEL_NEW and LEVEL_SCAVENGER; no qdisc comes near."""


@dataclass(frozen=True)
class Entry:
    """A policy class under a name, with parameters that differ from the class's defaults."""

    cls: type[Policy]
    preset: Mapping[str, parameters.Value] = field(default_factory=dict)


_ENTRIES: Final[dict[str, Entry]] = {
    "demand-bound": Entry(DemandBound),
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
    decides what to merge. Raises ValueError with one line per problem, which names key, value and what is allowed.
    """
    policy, found = _make(name, levels, params or {})
    if policy is None or found:
        raise ValueError("\n".join(map(str, found)))
    return policy


def problems(
    name: str, levels: int | None = None, params: Mapping[str, parameters.Value] | None = None
) -> list[Problem]:
    """Everything for which ``make_policy`` would refuse these arguments, also what is wrong only together."""
    return _make(name, levels, params or {})[1]


def _make(name: str, levels: int | None, params: Mapping[str, parameters.Value]) -> tuple[Policy | None, list[Problem]]:
    """The policy, with defaults in place of faulty parameters, and every problem."""
    entry = _ENTRIES.get(name)
    if entry is None:
        return None, [Problem("policy", name, f"must be one of {', '.join(names())}", parameter=False)]
    good, found = parameters.check(name, entry.cls, {**entry.preset, **params})
    if levels is not None:
        if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= MAX_LEVELS:
            return None, [
                *found,
                Problem("levels", levels, f"must be an integer from 1 to {MAX_LEVELS}", parameter=False),
            ]
        good["levels"] = levels
    policy = entry.cls(name=name, **good)
    if policy.levels < policy.least_levels and not {p.field for p in found} & set(policy.takes_levels):
        with_these = " with these parameters" if policy.takes_levels else ""
        need = f"policy {name!r} needs at least {policy.least_levels}{with_these}"
        found.append(Problem("levels", policy.levels, need, parameter=False))
    return policy, found


def describe(name: str) -> dict[str, str]:
    """Each parameter of a policy: its default, what is allowed and what it means, in words."""
    entry = _ENTRIES[name]
    return {
        key: f"default {entry.preset.get(key, f.default)!r}, {parameters.allowed(f)}: {f.metadata['doc']}"
        for key, f in parameters.options(entry.cls).items()
    }
