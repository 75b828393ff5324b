# SPDX-License-Identifier: Apache-2.0
"""When the first token of a vLLM request is due, and how that gets from one host to the next.

The first of these that there is, at the first host that knows mfsd:

    mfsd_deadline_unix_ms   in kv_transfer_params or vllm_xargs: absolute, unix time, milliseconds
    mfsd_ttft_slo_ms        in the same: from the request's arrival
    x-llm-d-slo-ttft-ms     the same by the name of llm-d's header (x-slo-ttft-ms, too), if a sidecar copies it there
    mfsd_ttft_slo_ms, mfsd_ttft_slo_ms_per_token
                            in kv_connector_extra_config: from arrival, and more for each token of the prompt

From there on the absolute one goes along in kv_transfer_params, with what was left of it when it went (LEFT). Within a
host and in hints to daemons, what is left is what counts: a clock that is set changes nothing. Between hosts, clocks
that disagree are found out by what requests seem to take (Clocks).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

DEADLINE: Final = "mfsd_deadline_unix_ms"
LEFT: Final = "mfsd_ttft_left_ms"
"""What was left until DEADLINE when it was passed on."""
SLOS: Final = ("mfsd_ttft_slo_ms", "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
PER_TOKEN: Final = "mfsd_ttft_slo_ms_per_token"  # noqa: S105 - of a prompt

HOSTS_MAX: Final = 4_096
"""Prefill hosts that are remembered; the oldest go first."""
KEPT: Final = 32
"""Requests of each."""
SURE: Final = 8
"""So many requests must have seemed to take long before their host's clock is taken to be behind ours."""
AGREE_S: Final = 0.05
"""And so long at least: a request may take that from a prefill host to a decode host."""

STEPS: Final = 16
"""First tokens whose computing is remembered."""
STEP_MOST: Final = 0.25
"""Share of what is left that may be kept for computing, at most."""


def number(value: object) -> float | None:
    """What a client wrote as a number; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        out = float(value)
    except ValueError:
        return None
    return out if math.isfinite(out) else None


def deadline_of(
    params: Mapping[str, Any] | None,
    xargs: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    arrival: float,
    prompt: int,
) -> float | None:
    """Unix time in seconds; None: nobody said.

    ``params``, ``xargs``: the request's kv_transfer_params and vllm_xargs. ``arrival``: unix time. ``prompt``: tokens.
    """
    said = [m for m in (params, xargs) if m]
    for one in said:
        absolute = number(one.get(DEADLINE))
        if absolute is not None:
            return absolute / 1000
    for one in said:
        for name in SLOS:
            slo = number(one.get(name))
            if slo is not None:
                return arrival + slo / 1000
    base, each = number(config.get(SLOS[0])), number(config.get(PER_TOKEN))
    if base is None and each is None:
        return None
    return arrival + ((base or 0.0) + (each or 0.0) * prompt) / 1000


@dataclass(slots=True)
class Clocks:
    """How far the clocks of prefill hosts are from ours, from what requests seem to take on the way from there."""

    _took: dict[str, deque[float]] = field(default_factory=dict)

    def ahead(self, params: Mapping[str, Any] | None, host: str, now: float) -> float:
        """Seconds by which ours is ahead of that of ``host``, which passed ``params`` on; they came ``now``, unix time.

        No request comes before it was sent, so one that seems to have shows a clock ahead of ours at once. That one is
        behind is seen when several requests in a row seem to have taken long; 0 until then.
        """
        absolute, left = (number((params or {}).get(key)) for key in (DEADLINE, LEFT))
        if absolute is None or left is None:
            return 0.0
        took = self._took.setdefault(host, deque(maxlen=KEPT))
        if len(self._took) > HOSTS_MAX:
            del self._took[next(iter(self._took))]
        took.append(now - (absolute - left) / 1000)
        least = min(took)
        return least if least < 0.0 or (len(took) >= SURE and least > AGREE_S) else 0.0


@dataclass(slots=True)
class Computing:
    """How long a token takes from when its KV is here. By then KV must be, and not when the token is due."""

    _since: dict[str, tuple[float, bool]] = field(default_factory=dict)
    """When a request's KV came, and whether it is in the step that runs."""
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))

    def loaded(self, request_id: str, now: float) -> None:
        """Its KV has come."""
        self._since[request_id] = now, False

    def step(self, now: float) -> None:
        """Another step is put together, with all whose KV has come: the one before is over."""
        for request_id, (_, running) in list(self._since.items()):
            if running:
                self.over(request_id, now)
            else:
                self._since[request_id] = self._since[request_id][0], True

    def over(self, request_id: str, now: float) -> None:
        """It has its token, or has ended."""
        since, running = self._since.pop(request_id, (now, False))
        if running:
            self._took.append(now - since)

    def before(self, left: float) -> float:
        """Seconds until KV must be here for a token that is due in ``left``."""
        usual = statistics.median(self._took) if self._took else 0.0
        return left - min(usual, STEP_MOST * max(left, 0.0))
