# SPDX-License-Identifier: Apache-2.0
"""From a trace to what the cluster is asked: the same for every arm."""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfsd.lab.hosts.net import LabError
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.traces import BLOCK, TRACES, Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.lab.settings import Settings


@dataclass(frozen=True)
class Request:
    """One request. JSON-able."""

    id: int
    at: float
    """Arrival, seconds from the start of the replay."""
    instance: int
    rank: int
    """The prefill host that has its KV (expert-parallel models); all have a share of it in dense ones."""
    decode: int
    tokens: int
    """Of the prompt: all of its KV goes to the decode host."""
    new: int
    """Of them, to be computed."""
    held: dict[str, int]
    """Of them, to be fetched: by the host that has them."""
    unloaded: float
    """Its TTFT when alone in the cluster, seconds (computed, models.Scaled.unloaded_ttft)."""
    slo: float
    """Its TTFT is to be at most this, seconds."""

    @property
    def remote(self) -> int:
        """Tokens to be fetched."""
        return sum(self.held.values())

    def ranks(self, settings: Settings) -> list[str]:
        """Prefill hosts that have its KV."""
        return settings.ranks if settings.scaled.model.dense else [f"p{self.rank}"]

    def senders(self, settings: Settings) -> list[str]:
        """Hosts that bytes of it will leave."""
        return list(dict.fromkeys([*self.ranks(settings), *self.held]))


def requests(settings: Settings) -> list[Request]:
    """Requests in order of arrival. Raises LabError when there are none."""
    s = settings
    prompts = [
        p
        for p in TRACES[s.trace](s.seed)
        if p.at >= s.start and s.min_tokens <= p.tokens <= s.max_tokens and p.tokens - p.reused <= s.max_new
    ]
    rng = random.Random(f"{s.regime} {s.seed}")  # noqa: S311 - a reproducible experiment, not a secret
    if s.arrivals == "recorded":
        chosen = [dataclasses.replace(p, at=(p.at - s.start) / s.speed) for p in prompts]
    else:
        chosen = _shuffled(s, prompts, rng)
    chosen = [p for p in chosen if p.at < s.duration]
    if not chosen:
        raise LabError(f"no request of the trace falls into {s.duration:g} s")
    return _deal(s, chosen, rng)


def _shuffled(s: Settings, prompts: Sequence[Prompt], rng: random.Random) -> list[Prompt]:
    """At least as many as come in ``duration``.

    Times and prompts are the trace's, but which prompt comes when is shuffled by the seed, and the trace starts over
    when it ends: the cluster serves its minutes in seconds, so seeds could not have parts of their own.
    """
    if len(prompts) < 2:
        return []
    speed = _speed(s, prompts)
    out: list[Prompt] = []
    at = 0.0
    while at < s.duration:
        lap = list(prompts)
        rng.shuffle(lap)
        for prompt, wait in zip(lap, _waits(s, prompts, rng), strict=True):
            at += wait / speed
            out.append(dataclasses.replace(prompt, at=at))
    return out


def _waits(s: Settings, prompts: Sequence[Prompt], rng: random.Random) -> list[float]:
    """Seconds between arrivals: those of the trace from a random place on, or of a Poisson process as busy."""
    times = [p.at for p in prompts]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = (times[-1] - times[0]) / len(gaps)
    if s.arrivals == "poisson":
        return [rng.expovariate(1 / mean) for _ in times]
    start = rng.randrange(len(gaps))
    return [*gaps[start:], mean, *gaps[:start]]


def _speed(s: Settings, prompts: Sequence[Prompt]) -> float:
    """How much faster than the trace time must run for the busiest link to be offered ``load``.

    On average over the trace: some seconds are busier than others, that is what traces are like.
    """
    probe = _deal(s, prompts, random.Random(0))  # noqa: S311 - a seed, as above
    return s.load / max(link_loads(s, probe, prompts[-1].at - prompts[0].at).values())


def _deal(s: Settings, prompts: Sequence[Prompt], rng: random.Random) -> list[Request]:
    """Assign instance, rank and decode host: by what each has been given so far, so that no arm influences it.

    Recorded requests are dealt to the ranks in turns.
    """
    given = [[0] * s.prefill for _ in range(s.instances)]
    sent = [0] * s.decode
    out: list[Request] = []
    for i, prompt in enumerate(prompts):
        instance = min(range(s.instances), key=lambda k: sum(given[k]))
        rank = i % s.prefill if s.arrivals == "recorded" else given[instance].index(min(given[instance]))
        given[instance][rank] += prompt.tokens
        held, new = _cached(s, prompt, rank)
        even = sent.index(min(sent))
        decode = 0
        if rng.random() >= s.hot:
            decode = even
            sent[even] += prompt.tokens
        scale = s.slo_scale
        if s.tight:
            scale *= 0.5 if rng.random() < s.tight else 2.0
        unloaded = s.scaled.unloaded_ttft(prompt.tokens, new, sum(held.values()), s.rate_of("d0"), s.payload)
        out.append(Request(i, prompt.at, instance, rank, decode, prompt.tokens, new, held, unloaded, unloaded * scale))
    return out


def _cached(s: Settings, prompt: Prompt, rank: int) -> tuple[dict[str, int], int]:
    """Tokens to be fetched, by host, and tokens to be computed."""
    blocks = [*prompt.cached, *range(len(prompt.cached), int(prompt.tokens * s.reuse) // BLOCK)]
    held: dict[str, int] = {}
    left = prompt.tokens - 1  # the last token is never cached
    for block in blocks:
        size = min(BLOCK, left)
        left -= size
        if s.cache == "ranks" and block % s.prefill == rank:
            continue  # in its own memory
        holder = f"s{block % s.stores}" if s.stores else f"p{block % s.prefill}"
        if size:
            held[holder] = held.get(holder, 0) + size
    return held, left + 1


def link_loads(s: Settings, work: Sequence[Request], seconds: float) -> dict[str, float]:
    """Payload offered to each link over ``seconds``, as a share of what it carries: "p0 out", "d0 in", ..."""
    scaled, loads = s.scaled, dict.fromkeys((f"{h} {way}" for h in s.hosts for way in ("in", "out")), 0.0)
    for request in work:
        ranks, rounds = request.ranks(s), scaled.rounds
        for host in s.ranks:
            for way in ("in", "out"):
                loads[f"{host} {way}"] += rounds * (s.prefill - 1) * scaled.exchange(request.new)
        for host in ranks:
            loads[f"{host} out"] += rounds * scaled.kv(request.tokens) / len(ranks)
        loads[f"d{request.decode} in"] += rounds * scaled.kv(request.tokens)
        for holder, tokens in request.held.items():
            loads[f"{holder} out"] += rounds * scaled.kv(tokens)
            for host in ranks:
                loads[f"{host} in"] += rounds * scaled.kv(tokens) / len(ranks)
    return {name: size / (s.rate_of(name).bytes_per_s * EFFICIENCY * seconds) for name, size in loads.items()}
