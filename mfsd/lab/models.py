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
    from mfsd.lab.workload import Job
    from mfsd.model import Rate

RANKS: Final = 2
"""Of an instance: hosts that share the experts and run their layers in lock step."""


@dataclass(frozen=True, slots=True)
class Model:
    """A mixture-of-experts model on GPUs behind one NIC each. Bytes are real ones; see ``Scaled``."""

    name: str
    layers: int
    kv_bytes: int
    """Per token and layer."""
    dispatch_bytes: int
    """Per token and layer, one way: hidden states to the chosen experts; as much comes back."""
    compute_s: float
    """Per token through all layers, on one GPU."""
    link_bits: float
    """Rate of the real NIC, bit/s."""


MIXTRAL: Final = Model(
    name="Mixtral 8x7B, BF16, expert-parallel over 2 ranks",
    layers=32,
    kv_bytes=2 * 8 * 128 * 2,
    dispatch_bytes=2 * 4096 * 2,
    # 12.9e9 active parameters x 2 FLOP, at 40 % of an H100's 990 TFLOP/s
    compute_s=2 * 12.9e9 / 396e12,
    link_bits=50e9,
)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A model whose bytes fit a link of the lab."""

    model: Model
    link: Rate

    @property
    def scale(self) -> float:
        """Lab bytes per real byte."""
        return self.link.bits_per_s / self.model.link_bits

    def kv(self, tokens: int) -> int:
        """KV bytes of one layer."""
        return max(int(tokens * self.model.kv_bytes * self.scale), 1)

    def exchange(self, tokens: int) -> int:
        """Bytes that each rank sends to the other in one layer in which both together compute ``tokens``.

        Half of the experts are remote, so half of a rank's tokens are dispatched, and of those that it got from the
        other rank the results go back: together half of everybody's tokens once.
        """
        return max(int(tokens * self.model.dispatch_bytes * self.scale / RANKS), 1)

    def compute(self, tokens: int) -> float:
        """Seconds of one layer in which both ranks together compute ``tokens``: the experts share them evenly."""
        return tokens * self.model.compute_s / self.model.layers / RANKS

    def unloaded_ttft(self, job: Job) -> float:
        """Seconds to the first token of a request that is alone in the cluster, bytes at link rate.

        Layer by layer: its cached KV must have come, then it computes, then exchanges; its KV goes to the decode host
        whenever the link is not needed for that.
        """
        rate = self.link.bytes_per_s
        kv, moved = self.kv(job.tokens) / rate, self.exchange(job.new) / rate
        fetch = self.kv(job.remote) / rate if job.remote else 0.0
        now = backlog = 0.0
        for layer in range(self.model.layers):
            started = max(now, (layer + 1) * fetch)
            backlog = max(backlog - (started - now) - self.compute(job.new), 0.0)
            now = started + self.compute(job.new) + moved
            backlog += kv
        return now + backlog
