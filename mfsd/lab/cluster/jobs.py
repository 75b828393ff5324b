# SPDX-License-Identifier: Apache-2.0
"""From a trace to what the cluster is asked: the same for every arm."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mfsd.lab import trace
from mfsd.lab.hosts.net import LabError
from mfsd.lab.hosts.tcp import EFFICIENCY
from mfsd.lab.trace import BLOCK, Prompt, TraceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.lab.cluster.regimes import Cluster, Regime
    from mfsd.lab.models import Scaled

AZURE: Final = Path(trace.__file__).with_name("data") / "azure_conversation_first6min.csv"
"""AzurePublicDataset, CC-BY 4.0; see data/README.md."""
MIN_TOKENS: Final = 512
MAX_TOKENS: Final = 8192
"""Shorter prompts are computed where they are decoded, longer ones by instances of their own: routing by length."""
SLO_SCALE: Final = 3.0
WARM_S: Final = 60.0
"""Into a trace; what came before has filled the caches."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request. JSON-able."""

    id: int
    at: float
    """Arrival, seconds from the start of the replay."""
    instance: int
    rank: int
    """The prefill host that has its KV (expert-parallel models); all have a share of it in dense ones."""
    decode: int
    tokens: int
    new: int
    cached: tuple[int, ...]
    """Tokens to be fetched, per store."""
    unloaded: float
    """Its TTFT when alone, seconds (computed, models.Scaled.unloaded_ttft)."""
    slo: float
    """Its TTFT is to be at most this, seconds."""

    @property
    def remote(self) -> int:
        """Tokens to be fetched."""
        return sum(self.cached)


@dataclass(frozen=True, slots=True)
class Work:
    """How a regime's work is drawn."""

    duration: float = 15.0
    """Seconds of arrivals."""
    seed: int = 0
    load: float = 1.0
    """Offered to the busiest link, as a share of its rate."""
    slo_scale: float = SLO_SCALE
    """SLO over unloaded TTFT."""
    tight: float = 0.0
    """Share of requests of a tight class, whose scale is half of ``slo_scale``; the others' is twice that."""
    poisson: bool = False
    """Arrivals are a Poisson process; only prompts come from the trace."""


def azure(path: Path = AZURE) -> list[Prompt]:
    """Read a trace in Azure's format (2023): no reuse is known. Raises TraceError."""
    out: list[Prompt] = []
    begin: datetime | None = None
    with path.open(encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                tokens = int(row["ContextTokens"])
            except (KeyError, ValueError, TypeError) as e:
                raise TraceError(f"{path.name}, line {number}: {type(e).__name__} {e}") from e
            begin = begin or at
            out.append(Prompt((at - begin).total_seconds(), max(tokens, 1), ()))
    return out


def _mooncake(seed: int) -> list[Prompt]:
    return trace.load(seed=seed)


TRACES: Final[dict[str, Callable[[int], list[Prompt]]]] = {"mooncake": _mooncake, "azure": lambda _seed: azure()}


def jobs(regime: Regime, work: Work) -> list[Job]:
    """Requests in order of arrival. Raises LabError when there are none.

    Times and prompts are the trace's, but which prompt comes when is shuffled by the seed, and the trace starts over
    when it ends: the cluster serves its minutes in seconds, so seeds could not have parts of their own.
    """
    prompts = [p for p in TRACES[regime.trace](work.seed) if MIN_TOKENS <= p.tokens <= MAX_TOKENS and p.at >= WARM_S]
    rng = random.Random(f"{regime.name} {work.seed}")  # noqa: S311 - a reproducible experiment, not a secret
    speed = _speed(regime, work, prompts)
    chosen: list[Prompt] = []
    at = 0.0
    while at < work.duration:
        lap = prompts.copy()
        rng.shuffle(lap)
        for prompt, wait in zip(lap, _waits(prompts, rng, poisson=work.poisson), strict=True):
            at += wait / speed
            chosen.append(dataclasses.replace(prompt, at=at))
    chosen = [p for p in chosen if p.at < work.duration]
    if not chosen:
        raise LabError(f"no request of the trace falls into {work.duration:g} s")
    return _deal(regime, work, chosen, rng)


def _waits(prompts: Sequence[Prompt], rng: random.Random, *, poisson: bool) -> list[float]:
    """Seconds between arrivals: those of the trace from a random place on, or of a Poisson process as busy."""
    times = [p.at for p in prompts]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = (times[-1] - times[0]) / len(gaps)
    if poisson:
        return [rng.expovariate(1 / mean) for _ in times]
    start = rng.randrange(len(gaps))
    return [*gaps[start:], mean, *gaps[:start]]


def _speed(regime: Regime, work: Work, prompts: Sequence[Prompt]) -> float:
    """How much faster than the trace time must run for the busiest link to be offered ``work.load``.

    On average over the trace: some seconds are busier than others, that is what traces are like.
    """
    probe = _deal(regime, work, prompts, random.Random(0))  # noqa: S311
    seconds = prompts[-1].at - prompts[0].at
    busiest = max(link_loads(regime.cluster, probe, seconds).values())
    return work.load / busiest


def _deal(regime: Regime, work: Work, prompts: Sequence[Prompt], rng: random.Random) -> list[Job]:
    """Assign instance, rank and decode host: by what each has been given so far, so that no arm influences it."""
    cluster = regime.cluster
    given = [[0] * cluster.prefill for _ in range(cluster.instances)]
    sent = [0] * cluster.decode
    out: list[Job] = []
    for i, prompt in enumerate(prompts):
        cached = _cached(regime, prompt)
        new = prompt.tokens - sum(cached)
        instance = min(range(cluster.instances), key=lambda k: sum(given[k]))
        rank = min(range(cluster.prefill), key=lambda k: given[instance][k])
        given[instance][rank] += prompt.tokens
        even = min(range(cluster.decode), key=lambda k: sent[k])
        decode = 0
        if rng.random() >= regime.hot:
            decode = even
            sent[even] += prompt.tokens
        scale = work.slo_scale
        if work.tight:
            scale *= 0.5 if rng.random() < work.tight else 2.0
        job = Job(i, prompt.at, instance, rank, decode, prompt.tokens, new, cached, 0.0, 0.0)
        unloaded = unloaded_ttft(cluster, cluster.scaled, job)
        out.append(dataclasses.replace(job, unloaded=unloaded, slo=unloaded * scale))
    return out


def _cached(regime: Regime, prompt: Prompt) -> tuple[int, ...]:
    """Tokens to be fetched per store: blocks lie striped over the stores by their id."""
    stores = regime.cluster.stores
    blocks = list(prompt.cached)
    wanted = int(prompt.tokens * regime.reuse) // BLOCK
    blocks += range(len(blocks), wanted)  # assumed to be there, too
    out = [0] * stores
    left = prompt.tokens - 1  # the last token is never cached
    for block in blocks:
        size = min(BLOCK, left)
        out[block % stores] += size
        left -= size
    return tuple(out)


def unloaded_ttft(cluster: Cluster, scaled: Scaled, job: Job) -> float:
    """Seconds, alone in the cluster."""
    return scaled.unloaded_ttft(job, decode=cluster.rate_of("d0"), efficiency=EFFICIENCY)


def link_loads(cluster: Cluster, work: Sequence[Job], seconds: float) -> dict[str, float]:
    """Payload offered to each link over ``seconds``, as a share of what it carries: "p0 out", "d0 in", ..."""
    scaled, loads = cluster.scaled, dict.fromkeys((f"{h} {way}" for h in cluster.hosts for way in ("in", "out")), 0.0)
    for job in work:
        moved = scaled.rounds * (cluster.prefill - 1) * scaled.exchange(job.new)
        ranks = range(cluster.prefill) if scaled.model.dense else [job.rank]
        for host in range(cluster.prefill):
            for way in ("in", "out"):
                loads[f"p{host} {way}"] += moved
        for rank in ranks:
            loads[f"p{rank} out"] += scaled.rounds * scaled.kv(job.tokens) / len(ranks)
            if job.remote:
                loads[f"p{rank} in"] += scaled.rounds * scaled.kv(job.remote) / len(ranks)
        loads[f"d{job.decode} in"] += scaled.rounds * scaled.kv(job.tokens)
        for store, tokens in enumerate(job.cached):
            loads[f"s{store} out"] += scaled.rounds * scaled.kv(tokens) if tokens else 0
    return {name: size / (cluster.rate_of(name).bytes_per_s * EFFICIENCY * seconds) for name, size in loads.items()}
