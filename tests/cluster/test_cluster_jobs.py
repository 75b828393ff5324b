# SPDX-License-Identifier: Apache-2.0
"""What the cluster is asked: the same for every arm, as much as was asked for, and from where it is said to come."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from mfsd.lab.cluster.jobs import MAX_TOKENS, MIN_TOKENS, Work, azure, jobs, link_loads, unloaded_ttft
from mfsd.lab.cluster.regimes import REGIMES, Cluster
from mfsd.lab.models import MODELS, Scaled
from mfsd.lab.trace import TraceError
from mfsd.units import Rate

if TYPE_CHECKING:
    from pathlib import Path


def test_a_seed_always_gives_the_same_requests_and_another_one_others() -> None:
    regime = REGIMES["hot"]
    first, again = (jobs(regime, Work(5.0, seed=3)) for _ in range(2))
    assert first == again
    assert first != jobs(regime, Work(5.0, seed=4))


@pytest.mark.parametrize("name", sorted(REGIMES))
@pytest.mark.parametrize("load", [0.5, 1.0])
def test_the_busiest_link_is_offered_what_was_asked_for(name: str, load: float) -> None:
    regime, work = REGIMES[name], Work(200.0, load=load)
    offered = link_loads(regime.cluster, jobs(regime, work), work.duration)
    assert max(offered.values()) == pytest.approx(load, rel=0.08)


@pytest.mark.parametrize("name", sorted(REGIMES))
def test_requests_are_what_the_regime_says(name: str) -> None:
    regime = REGIMES[name]
    found = jobs(regime, Work(30.0, load=0.8))
    assert [j.at for j in found] == sorted(j.at for j in found)
    for job in found:
        assert MIN_TOKENS <= job.tokens <= MAX_TOKENS
        assert job.new + job.remote == job.tokens
        assert job.new >= 1, "the last token is never cached"
        assert len(job.cached) == regime.cluster.stores
        assert job.slo == pytest.approx(3 * job.unloaded)
        assert job.unloaded == unloaded_ttft(regime.cluster, regime.cluster.scaled, job)
    assert {j.instance for j in found} == set(range(regime.cluster.instances))
    assert {j.rank for j in found} == set(range(regime.cluster.prefill))
    assert {j.decode for j in found} == set(range(regime.cluster.decode))


def test_hot_and_reuse_change_what_they_are_named_for() -> None:
    hot = jobs(REGIMES["hot"], Work(60.0))
    assert 0.7 < sum(j.decode == 0 for j in hot) / len(hot) < 0.9
    reuse = [j for j in jobs(REGIMES["reuse"], Work(60.0)) if j.tokens > 4096]
    assert all(j.remote / j.tokens > 0.55 for j in reuse)


def test_a_mixed_class_has_tight_and_loose_deadlines() -> None:
    found = jobs(REGIMES["one"], Work(100.0, tight=0.2))
    scales = [round(j.slo / j.unloaded, 6) for j in found]
    assert set(scales) == {1.5, 6.0}
    assert 0.1 < scales.count(1.5) / len(scales) < 0.3


def test_poisson_arrivals_come_as_often_as_those_of_the_trace() -> None:
    plain, poisson = (jobs(REGIMES["one"], Work(200.0, poisson=p)) for p in (False, True))
    assert len(poisson) == pytest.approx(len(plain), rel=0.15)


def test_azure_prompts_can_be_replayed() -> None:
    regime = dataclasses.replace(REGIMES["one"], trace="azure")
    assert all(j.remote == 0 for j in jobs(regime, Work(10.0, load=0.5)))


def test_a_broken_azure_trace_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\nsoon,1,1\n")
    with pytest.raises(TraceError, match=r"t\.csv, line 3"):
        azure(path)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_grouping_layers_changes_no_totals(model: str) -> None:
    link = Rate.parse("200mbit")
    coarse, fine = (Scaled(MODELS[model], link, 4, steps) for steps in (4, 0))
    for size in ("kv", "exchange"):
        a, b = (s.rounds * getattr(s, size)(4000) for s in (coarse, fine))
        assert a == pytest.approx(b, rel=0.02)
    assert coarse.rounds * coarse.compute(4000) == pytest.approx(fine.rounds * fine.compute(4000))


def test_collectives_of_four_ranks_carry_what_the_papers_formulas_say() -> None:
    # 4 ranks, real rate: of 1000 tokens each, 1/4 of the expert inputs go to each other rank, and back.
    moe = Scaled(MODELS["mixtral-8x7b"], Rate.parse("100gbit"), 4)
    assert moe.exchange(4000) == 1000 * 16_384 // 4 * 2
    # Two all-reduces of 4000 x 8 KiB, each 2 x 1/4 of the message between every two ranks.
    dense = Scaled(MODELS["llama-3-8b"], Rate.parse("100gbit"), 4)
    assert dense.exchange(4000) == 2 * 2 * 4000 * 8192 // 4


def test_the_unloaded_ttft_grows_with_the_prompt_and_with_slower_decode_links() -> None:
    cluster = Cluster()
    slow = dataclasses.replace(cluster, decode_rate="50mbit")
    found = jobs(REGIMES["one"], Work(30.0))
    by_size = sorted((j for j in found if not j.remote), key=lambda j: j.tokens)
    assert [j.unloaded for j in by_size] == sorted(j.unloaded for j in by_size)
    assert all(unloaded_ttft(slow, slow.scaled, j) > j.unloaded for j in found)
