# SPDX-License-Identifier: Apache-2.0
"""What a model makes of a prompt: bytes on the wire and time on the GPU, scaled to the lab's links.

Times stay as they are and bytes shrink by (lab link / real link), so that every transfer takes as long as it would on
the real link. Sizes: 2 x KV heads x head dimension x 2 B per token and layer of KV; top-k x hidden x 2 B per token and
layer each for dispatch and combine of expert parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mfsd.ground.units import Rate

EFFECTIVE_FLOPS: Final = 0.4 * 990e12
"""Of one GPU: an H100's dense BF16 peak, at 40 %."""


@dataclass(frozen=True, slots=True)
class Model:
    """A mixture-of-experts model on GPUs behind one NIC each. Bytes are real ones; see ``Scaled``."""

    name: str
    layers: int
    kv_bytes: int
    """Per token and layer."""
    dispatch_bytes: int
    """Per token and layer, one way: hidden states to the chosen experts; as much comes back. Of a dense model: hidden
    states that an all-reduce adds up, of which a layer has two (after attention, after the feed-forward part)."""
    compute_s: float
    """Per token through all layers, on one GPU."""
    dense: bool = False
    """Tensor-parallel: every rank has its share of each request's KV heads. Otherwise expert-parallel with
    data-parallel attention: a request's KV is on one rank."""


def _compute(active_parameters: float) -> float:
    return 2 * active_parameters / EFFECTIVE_FLOPS


MODELS: Final[dict[str, Model]] = {
    "mixtral-8x7b": Model("Mixtral 8x7B, BF16", 32, 2 * 8 * 128 * 2, 2 * 4096 * 2, _compute(12.9e9)),
    "dbrx": Model("DBRX, BF16", 40, 2 * 8 * 128 * 2, 4 * 6144 * 2, _compute(36e9)),
    "qwen3-30b-a3b": Model("Qwen3-30B-A3B, BF16", 48, 2 * 4 * 128 * 2, 8 * 2048 * 2, _compute(3.3e9)),
    "llama-3-8b": Model("Llama-3-8B, BF16", 32, 2 * 8 * 128 * 2, 4096 * 2, _compute(8e9), dense=True),
}
"""Published configurations (layers, KV heads x head dimension, experts per token x hidden size, active parameters)."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A model whose bytes fit a link of the lab."""

    model: Model
    link: Rate
    nic: Rate
    """The real link that ``link`` stands for."""
    ranks: int
    """Hosts of an instance; they share the experts and run their layers in lock step."""
    steps: int = 0
    """The layers are emulated in so many equal groups; 0: each by itself."""

    @property
    def rounds(self) -> int:
        """Steps of a forward pass."""
        return self.steps or self.model.layers

    @property
    def depth(self) -> float:
        """Layers per step."""
        return self.model.layers / self.rounds

    @property
    def scale(self) -> float:
        """Lab bytes per real byte."""
        return self.link.bytes_per_s / self.nic.bytes_per_s

    def kv(self, tokens: int) -> int:
        """KV bytes of one step."""
        return max(int(tokens * self.model.kv_bytes * self.depth * self.scale), 1)

    def exchange(self, tokens: int) -> int:
        """Bytes that each rank sends to each other one in a step in which all together compute ``tokens``.

        Expert-parallel with n ranks: of a rank's 1/n of the tokens, 1/n of the expert inputs go to each other rank, and
        as many results come back. Dense: two all-reduces, each a reduce-scatter and an all-gather of 1/n each.
        """
        share = 4 / self.ranks if self.model.dense else 2 / self.ranks**2
        return max(int(tokens * self.model.dispatch_bytes * self.depth * self.scale * share), 1)

    def compute(self, tokens: int) -> float:
        """Seconds of one step in which all ranks together compute ``tokens``: they share them evenly."""
        return tokens * self.model.compute_s / self.rounds / self.ranks

    def unloaded_ttft(self, tokens: int, new: int, remote: int, decode: Rate, efficiency: float) -> float:
        """Seconds to the first token of a request that is alone in the cluster, bytes at link rate.

        Of its ``tokens`` ``new`` ones are to be computed, and ``remote`` ones to be fetched.
        Step by step: its cached KV must have come, then it computes, then exchanges; its KV goes to the decode host
        (whose link has the rate ``decode``) whenever the link is not needed for that. ``efficiency`` is the share of
        the rate that payload gets.
        """
        rate = self.link.bytes_per_s * efficiency
        senders = self.ranks if self.model.dense else 1
        into = min(rate * senders, decode.bytes_per_s * efficiency)
        kv, moved = self.kv(tokens) / into, (self.ranks - 1) * self.exchange(new) / rate
        fetch = self.kv(remote) / rate / senders if remote else 0.0
        now = backlog = 0.0
        for step in range(self.rounds):
            started = max(now, (step + 1) * fetch)
            backlog = max(backlog - (started - now) - self.compute(new), 0.0)
            now = started + self.compute(new) + moved
            if into < rate * senders:
                backlog = max(backlog - moved, 0.0)  # the decode host's slower link goes on while the ranks exchange
            backlog += kv
        return now + backlog
