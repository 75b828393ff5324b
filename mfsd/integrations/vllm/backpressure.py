# SPDX-License-Identifier: Apache-2.0
"""Back pressure for the stores of vLLM's tiered offloading, that asks mfsd: a store waits for nobody's first token.

    "backpressure": {"backpressure_cls": "mfsd.integrations.vllm.backpressure.MfsdBackpressure", "peer": "10.2.0.9"}

in a secondary tier's configuration. While what is announced on the way to ``peer`` needs the link, stores are dropped;
without a daemon they never are. vLLM's ThrottledDropPolicy goes by latencies and can't be combined with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from mfsd.integrations import guard

if TYPE_CHECKING:
    from mfsd.client import Client

PLACES: Final = ("vllm.v1.kv_offload.tiering.backpressure", "vllm.v1.kv_offload.backpressure")
"""Where vLLM's base class is, the newest first."""


class Pressure:
    """Whether a store would be in the way of somebody. ``peer``: the store's host, an address or a name."""

    def __init__(self, client: Client, peer: str, spare: float, busy_s: float) -> None:
        """``spare``: least share of the link that nobody takes. ``busy_s``: of KV announced, at the link's rate."""
        self._client, self._peer = client, peer
        self._spare, self._busy_s = spare, busy_s
        self._resolver = guard.Resolver()

    def there(self) -> bool:
        """Never waits; False while nobody knows."""
        peer = self._resolver.address(self._peer)
        advice = self._client.advice(peer) if peer else None
        if advice is None or advice.rate <= 0:
            return False
        return advice.device_queued > self._busy_s * advice.rate and advice.spare < self._spare * advice.rate


def __getattr__(name: str) -> Any:
    """Make the class when vLLM asks for it."""
    if name != "MfsdBackpressure":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = _base()

    class MfsdBackpressure(base):  # type: ignore[misc, valid-type]
        """See the module."""

        def __init__(
            self, peer: str, target: str | None = None, spare: float = 0.2, busy_s: float = 0.01, policy: Any = None
        ) -> None:
            # vLLM's default policy works with its own detector only.
            drop = getattr(importlib.import_module(base.__module__), "DropStorePolicy", None)
            super().__init__(policy=policy or (drop() if drop is not None else None))
            self._mfsd = Pressure(guard.client(target), peer, spare, busy_s)

        def on_store_completed(self, elapsed_s: float, num_bytes: int) -> None:
            """What stores took says nothing of whom they were in the way of."""

        def is_under_pressure(self) -> bool:
            """Somebody's first token waits for the link."""
            return self._mfsd.there()

        def reset(self) -> None:
            """Nothing is remembered but what the policy has dropped."""
            self._policy.reset()

    globals()[name] = MfsdBackpressure
    return MfsdBackpressure


def _base() -> type:
    for place in PLACES:
        try:
            return importlib.import_module(place).BackpressureDetector  # type: ignore[no-any-return]
        except ModuleNotFoundError as e:
            if not (e.name or "").startswith("vllm.v1"):
                raise  # vLLM itself is missing
        except AttributeError:
            continue
    raise ImportError(f"this vLLM has no BackpressureDetector in {' or '.join(PLACES)}; see docs/integrations/vllm.md")
