# SPDX-License-Identifier: Apache-2.0
"""From a trace to what each rank is asked, and when."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mfsd.lab.models import RANKS, Prefill, Scaled
from mfsd.lab.trace import BLOCK, Prompt

if TYPE_CHECKING:
    import collections
    from collections.abc import Sequence

P = TypeVar("P", bound=Prefill)


@dataclass(frozen=True, slots=True)
class Job:
    """One request, for one rank. JSON-able."""

    id: int
    at: float
    """Arrival, seconds from the start of the replay."""
    rank: int
    tokens: int
    """Of the prompt: all of its KV goes to the decode host."""
    new: int
    """Of them, to be computed."""
    remote: int
    """Of them, cached by the other rank and fetched from it."""
    unloaded: float = 0.0
    """Its TTFT when alone, seconds (computed, models.Scaled.unloaded_ttft)."""
    slo: float = 0.0
    """Its TTFT is to be at most this, seconds."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of a trace is replayed, and how fast."""

    start: float = 130.0
    """Seconds into the trace; what came before has filled the caches."""
    duration: float = 36.0
    """Seconds of replay."""
    speed: float = 1.6
    """The trace's time runs this much faster: the offered load."""
    min_tokens: int = 2048
    """Shorter prompts are computed where they are decoded: moving their KV would cost more."""
    max_tokens: int = 65_536
    max_new: int = 8192
    """More go to other instances: routing by length."""
    slo_scale: float = 3.0
    """SLO over unloaded TTFT."""


def jobs(prompts: Sequence[Prompt], selection: Selection, scaled: Scaled) -> list[Job]:
    """Requests in order of arrival, dealt to the ranks in turns; cached blocks lie striped over the ranks' memories."""
    out: list[Job] = []
    for prompt in prompts:
        at = (prompt.at - selection.start) / selection.speed
        new = prompt.tokens - prompt.reused
        fits = selection.min_tokens <= prompt.tokens <= selection.max_tokens and new <= selection.max_new
        if not fits or not 0 <= at < selection.duration:
            continue
        rank = len(out) % RANKS
        remote = min(sum(BLOCK for block in prompt.cached if block % RANKS != rank), prompt.reused)
        job = Job(len(out), at, rank, prompt.tokens, new, remote)
        unloaded = scaled.unloaded_ttft(job)
        out.append(dataclasses.replace(job, unloaded=unloaded, slo=unloaded * selection.slo_scale))
    return out


def next_batch(waiting: collections.deque[P], budget: int) -> list[P]:
    """Take what a forward pass computes: first come, first served, up to ``budget`` new tokens; one may exceed it."""
    batch: list[P] = []
    tokens = 0
    while waiting and (not batch or tokens + waiting[0].new <= budget):
        batch.append(waiting.popleft())
        tokens += batch[-1].new
    return batch


def link_load(work: Sequence[Job], selection: Selection, scaled: Scaled) -> float:
    """Share of the ranks' egress that the requests need over the time of the replay, all stages."""
    layers = scaled.model.layers
    size = sum(
        layers * (scaled.kv(j.tokens) + (scaled.kv(j.remote) if j.remote else 0) + RANKS * scaled.exchange(j.new))
        for j in work
    )
    return size / (RANKS * scaled.link.bytes_per_s * selection.duration)
