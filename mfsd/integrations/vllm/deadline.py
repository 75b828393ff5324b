# SPDX-License-Identifier: Apache-2.0
"""When the first token of a vLLM request is due, and how that gets from one host to the next.

The first of these that there is, at the first host that knows mfsd:

    mfsd_deadline_unix_ms   in kv_transfer_params or vllm_xargs: absolute, unix time, milliseconds
    mfsd_ttft_slo_ms        in the same: from the request's arrival
    x-llm-d-slo-ttft-ms     the same by the name of llm-d's header (x-slo-ttft-ms, too), if a sidecar copies it there
    mfsd_ttft_slo_ms, mfsd_ttft_slo_ms_per_token
                            in kv_connector_extra_config: from arrival, and more for each token of the prompt

From there on the absolute one goes along in kv_transfer_params. Hosts' clocks must agree to within a few milliseconds
(NTP does); hints to daemons carry what is left.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

DEADLINE: Final = "mfsd_deadline_unix_ms"
SLOS: Final = ("mfsd_ttft_slo_ms", "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
PER_TOKEN: Final = "mfsd_ttft_slo_ms_per_token"  # noqa: S105 - of a prompt


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
