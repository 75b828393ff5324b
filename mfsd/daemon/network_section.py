# SPDX-License-Identifier: Apache-2.0
"""``[network]`` of the configuration file: what deferred connections do at bottlenecks that no qdisc here governs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import create_model

from mfsd.engine.settings import Section, setting

if TYPE_CHECKING:
    from mfsd.ground.units import Rate

LEAST_TARGET_MS: Final = 0.5
TARGET_BITS: Final = 400_000
"""A queue of 33 full frames: 2 ms at 200 Mbit/s. Lower targets cost throughput, since less than a packet per connection
can't be in flight for long."""

Yield = Literal["off", "auto", "on"]

_YIELD: Final[dict[str, Any]] = {
    "yield": (
        Yield,
        setting(
            "off",
            "Deferred TCP connections yield wherever the queue is, by a congestion control of ours; needs CAP_PERFMON "
            "and Linux 6.4. auto: where it can. on: else mfsd does not start.",
        ),
    )
}
"""A keyword of Python's can't be written as a field."""
_Keyword: Any = create_model("_Keyword", __base__=Section, **_YIELD)


class NetworkConfig(_Keyword):  # type: ignore[misc]
    """``[network]``: levels beyond this host, where switches have no priorities."""

    target_ms: float | None = setting(
        None,
        "Queue that deferred connections leave at a bottleneck, at most. Unset: of 33 full frames at the fastest "
        f"device's rate, or the peer's where [[peer]] says that it is slower; at least {LEAST_TARGET_MS:g} ms.",
        allowed="a number from 0.1 to 100",
        ge=0.1,
        le=100.0,
    )
    replace: bool = setting(
        False, "Also connections that have chosen another congestion control than the default (TCP_CONGESTION)."
    )

    @property
    def mode(self) -> Yield:
        """``network.yield``."""
        value: Yield = getattr(self, "yield")
        return value

    def target_s(self, rate: Rate | None) -> float:
        """The target with a device of this rate (None: unknown), seconds."""
        if self.target_ms is not None:
            return self.target_ms / 1000
        least = LEAST_TARGET_MS / 1000
        return least if rate is None else max(least, TARGET_BITS / rate.bits_per_s)
