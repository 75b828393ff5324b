# SPDX-License-Identifier: Apache-2.0
"""The bands, their marks and the policy that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.daemon.bands_section import CLASSES
from mfsd.ground.bands import Bands, Ladder
from mfsd.policy.registry import make_policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.daemon.config import Config
    from mfsd.daemon.network_section import NetworkConfig
    from mfsd.ground.bands import BandSpec
    from mfsd.ground.units import Rate
    from mfsd.policy.base import Policy


def bands_of(config: Config, policy: Policy) -> Bands:
    """The bands that a configuration asks for, with the default band where the policy wants it. Raises ValueError."""
    bands = _bands(config, default_after=0)
    # A policy with more levels than there are bands counts in its own levels; the ladder says where those end.
    steps = Ladder(bands, policy.levels).band_of.tolist()
    return _bands(config, default_after=len(set(steps[: policy.default_after])))


def _bands(config: Config, default_after: int) -> Bands:
    b = config.bands
    return Bands.build(
        b.levels,
        default_after=default_after,
        lanes=b.lanes,
        control_floor=b.control_floor,
        default_floor=b.default_floor,
        level_floors=b.floors,
        background_floor=b.background_floor,
        scavenger_floor=b.scavenger_floor,
    )


def policy_of(config: Config) -> Policy:
    """The configured policy. Raises ValueError naming the parameter."""
    return make_policy(config.policy.name, config.bands.levels, config.policy.params)


def dscp_of(config: Config) -> dict[str, int]:
    """Code points to write, by name of the band; what is given by class, the policy's classes put onto the bands."""
    given = config.bands.dscp
    if given.keys().isdisjoint(CLASSES):
        return dict(given)
    policy = policy_of(config)
    bands = bands_of(config, policy)
    classes = Ladder(bands, policy.levels).classes(policy.classes)
    return {b.name: given[urgency] for b, urgency in zip(bands.bands, classes, strict=True) if urgency in given}


def marks_in_words(dscp: Mapping[str, int], bands: Bands) -> list[str]:
    """What is written into packets, a sentence per code point, in the order of the bands."""
    names: dict[int, list[str]] = {}
    for band in bands.bands:
        if band.name in dscp:
            names.setdefault(dscp[band.name], []).append(band.name)
    return [f"DSCP {code} into packets of {', '.join(marked)}" for code, marked in names.items()]


def yielding(bands: Bands) -> tuple[list[BandSpec], list[BandSpec]]:
    """Bands whose connections yield in the network, and those that yield to these, too."""
    return [b for b in bands.level_bands if b.index > bands.default.index], [bands.background, bands.scavenger]


def yielding_in_words(config: NetworkConfig, bands: Bands, rate: Rate | None) -> str:
    """A sentence for plans; empty where nothing is to yield. ``rate``: of the fastest device; None: unknown."""
    if config.mode == "off":
        return ""
    target = config.target_s(rate) * 1000
    words = [
        f"those of {', '.join(b.name for b in found)} below {most:g} ms"
        for found, most in zip(yielding(bands), (target, target / 2), strict=True)
        if found
    ]
    return f"TCP connections keep queues elsewhere short (network.yield): {', '.join(words)}"
