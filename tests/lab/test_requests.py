# SPDX-License-Identifier: Apache-2.0
"""What the cluster is asked: the same for every arm, as much as was asked for, and from where it is said to come."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from mfsd.ground.units import Rate
from mfsd.lab import traces
from mfsd.lab.hosts.net import LabError
from mfsd.lab.models import MODELS, Model, Scaled
from mfsd.lab.requests import link_loads, requests
from mfsd.lab.settings import PRESETS, REGIMES, Settings

if TYPE_CHECKING:
    from pathlib import Path

DEMO = PRESETS["demo"].settings


def regime(name: str, **more: Any) -> Settings:
    return dataclasses.replace(PRESETS[name].settings, **more)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def row(ms: int, tokens: int, *blocks: int) -> dict[str, Any]:
    return {"timestamp": ms, "input_length": tokens, "output_length": 1, "hash_ids": list(blocks)}


# --- traces -----------------------------------------------------------------------------------------------------------


def test_the_excerpt_has_all_requests_of_four_minutes_spread_inside_their_ticks() -> None:
    raw = [json.loads(line) for line in traces.MOONCAKE.read_text().splitlines()]
    prompts = traces.mooncake()
    assert len(prompts) == len(raw) == 731
    assert [p.at for p in prompts] == sorted(p.at for p in prompts)
    assert len({p.at for p in prompts}) == 731, "no two at the same moment"
    ticks = sorted(r["timestamp"] / 1000 for r in raw)
    assert all(tick <= p.at < tick + traces.TICK_S for tick, p in zip(ticks, prompts, strict=True))


def test_a_seed_makes_arrivals_reproducible() -> None:
    assert traces.mooncake(seed=1) == traces.mooncake(seed=1)
    assert traces.mooncake(seed=1) != traces.mooncake(seed=2)


def test_only_a_leading_run_of_known_blocks_is_cached(tmp_path: Path) -> None:
    path = write(tmp_path / "t", row(0, 1536, 1, 2, 3), row(3000, 2048, 1, 2, 9, 3), row(6000, 1024, 1, 2))
    first, second, third = traces.mooncake(path)
    assert (first.reused, second.reused) == (0, 1024)
    assert third.cached == (1, 2)
    assert third.reused == 1023, "the last token is always computed"


def test_reuse_follows_the_order_of_the_trace_not_of_the_spread_arrivals(tmp_path: Path) -> None:
    path = write(tmp_path / "t", *(row(0, 512 * 2, 7, 8) for _ in range(20)))
    assert sorted(p.reused for p in traces.mooncake(path)) == [0] + [1023] * 19


@pytest.mark.parametrize("line", ['{"timestamp": 0}', "no json", '{"timestamp":0,"input_length":0,"hash_ids":[]}'])
def test_a_faulty_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t.jsonl", row(0, 10, 1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(traces.TraceError, match=r"t\.jsonl, line 2"):
        traces.mooncake(path)


def test_a_broken_azure_trace_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\nsoon,1,1\n")
    with pytest.raises(traces.TraceError, match=r"t\.csv, line 3"):
        traces.azure(path)


# --- recorded arrivals ------------------------------------------------------------------------------------------------


def test_recorded_requests_are_dealt_in_turns_inside_the_window_and_the_bounds() -> None:
    s = dataclasses.replace(DEMO, duration=20.0)
    found = requests(s)
    wanted = [p for p in traces.mooncake() if 130 <= p.at < 170 and 2048 <= p.tokens <= 65_536]
    wanted = [p for p in wanted if p.tokens - p.reused <= 8192]
    assert [r.tokens for r in found] == [p.tokens for p in wanted]
    assert [r.at for r in found] == pytest.approx([(p.at - 130) / 2 for p in wanted])
    assert [r.rank for r in found] == [i % 2 for i in range(len(found))]
    for r, p in zip(found, wanted, strict=True):
        assert r.new == p.tokens - p.reused
        others = sum(block % 2 != r.rank for block in p.cached)
        assert others * 512 - 512 < r.remote <= others * 512, "blocks lie striped over both ranks"
        assert set(r.held) <= {f"p{1 - r.rank}"}
    assert any(r.remote > 5000 for r in found), "no reuse to speak of: stage 1 would be idle"


def test_with_a_store_it_has_what_the_other_rank_had() -> None:
    ours, stored = requests(DEMO), requests(dataclasses.replace(DEMO, stores=1))
    assert [r.remote for r in stored] == [r.remote for r in ours]
    assert {h for r in stored for h in r.held} == {"s0"}


def test_twice_the_speed_is_about_twice_the_load() -> None:
    loads = []
    for speed in (1.0, 2.0):
        s = dataclasses.replace(DEMO, duration=40 / speed, speed=speed)
        loads.append(max(link_loads(s, requests(s), s.duration).values()))
    assert loads[1] == pytest.approx(2 * loads[0], rel=0.01)


def test_no_request_is_an_error_that_says_so() -> None:
    with pytest.raises(LabError, match="no request of the trace falls into 3 s"):
        requests(dataclasses.replace(DEMO, min_tokens=65_000, duration=3.0))
    with pytest.raises(LabError, match="no request of the trace"):
        requests(regime("one", min_tokens=8192))


# --- shuffled arrivals ------------------------------------------------------------------------------------------------


def test_a_seed_always_gives_the_same_requests_and_another_one_others() -> None:
    first, again = (requests(regime("hot", duration=5.0, seed=3)) for _ in range(2))
    assert first == again
    assert first != requests(regime("hot", duration=5.0, seed=4))


@pytest.mark.parametrize("name", sorted(REGIMES))
@pytest.mark.parametrize("load", [0.5, 1.0])
def test_the_busiest_link_is_offered_what_was_asked_for(name: str, load: float) -> None:
    s = regime(name, duration=200.0, load=load)
    assert max(link_loads(s, requests(s), s.duration).values()) == pytest.approx(load, rel=0.08)


@pytest.mark.parametrize("name", sorted(REGIMES))
def test_requests_are_what_the_regime_says(name: str) -> None:
    s = regime(name, duration=30.0, load=0.8)
    found = requests(s)
    assert [r.at for r in found] == sorted(r.at for r in found)
    for r in found:
        assert 512 <= r.tokens <= 8192
        assert r.new + r.remote == r.tokens
        assert r.new >= 1, "the last token is never cached"
        assert set(r.held) <= {"s0", "s1"}
        assert r.slo == pytest.approx(3 * r.unloaded)
        # 4096 B of KV per token and layer, 32 layers, bytes over 500, to a decode host's link.
        alone = r.tokens * 4096 * 32 / 500 / (s.rate_of("d0").bytes_per_s * 1448 / 1514)
        assert r.unloaded > 0.99 * alone, "its KV alone takes that long"
        assert r.unloaded < 3 * alone + 1.0
    assert {r.instance for r in found} == set(range(s.instances))
    assert {r.rank for r in found} == set(range(s.prefill))
    assert {r.decode for r in found} == set(range(s.decode))
    assert {h for r in found for h in r.held} == {"s0", "s1"}


def test_hot_and_reuse_change_what_they_are_named_for() -> None:
    hot = requests(regime("hot", duration=60.0))
    assert 0.7 < sum(r.decode == 0 for r in hot) / len(hot) < 0.9
    reuse = [r for r in requests(regime("reuse", duration=60.0)) if r.tokens > 4096]
    assert all(r.remote / r.tokens > 0.55 for r in reuse)


def test_a_mixed_class_has_tight_and_loose_deadlines() -> None:
    found = requests(regime("one", duration=100.0, tight=0.2))
    scales = [round(r.slo / r.unloaded, 6) for r in found]
    assert set(scales) == {1.5, 6.0}
    assert 0.1 < scales.count(1.5) / len(scales) < 0.3


def test_poisson_arrivals_come_as_often_as_those_of_the_trace() -> None:
    plain, poisson = (requests(regime("one", duration=200.0, arrivals=a)) for a in ("shuffled", "poisson"))
    assert len(poisson) == pytest.approx(len(plain), rel=0.15)
    assert [r.at for r in poisson] != [r.at for r in plain]


def test_azure_prompts_can_be_replayed() -> None:
    assert all(r.remote == 0 for r in requests(regime("one", trace="azure", load=0.5)))


# --- sizes and times --------------------------------------------------------------------------------------------------


def test_bytes_shrink_with_the_link_and_times_do_not() -> None:
    scaled = DEMO.scaled
    assert scaled.scale == pytest.approx(1 / 50)
    # 4096 tokens of KV, all layers: 512 MiB on 50 Gbit/s, and as long here.
    assert 32 * scaled.kv(4096) / 125e6 == pytest.approx((512 << 20) / 6.25e9, rel=0.001)
    assert scaled.compute(1000) == dataclasses.replace(DEMO, rate="100mbit").scaled.compute(1000)


SMALL = Model("small", 2, kv_bytes=1000, dispatch_bytes=500, compute_s=0.002)
LINK = Rate(1e6)
"""Of 1 MB/s, as is the real one; two ranks, layer by layer."""


@pytest.mark.parametrize(
    ("new", "remote", "decode", "expected"),
    [
        # Compute: 100 x 2 ms / 2 layers / 2 ranks = 0.05 s a layer. Exchange: 100 x 500 x 2 / 4 = 25 kB, 0.025 s.
        # KV: 100 kB, 0.1 s a layer: the first one's waits for the exchange of the second, not for its compute.
        (100, 0, 1e6, 2 * 0.075 + (0.1 - 0.05) + 0.1),
        # At half the rate 0.2 s; the slow link goes on during the exchange, too.
        (100, 0, 0.5e6, 2 * 0.075 + (0.2 - 0.075) + 0.2),
        # 300 tokens fetched: 0.3 s a layer, twice; KV of 400 tokens: 0.4 s a layer, which the second fetch hides in
        # part: from 0.375 to 0.6 and during the compute.
        (100, 300, 1e6, 0.6 + 0.075 + (0.4 - (0.6 - 0.375) - 0.05) + 0.4),
    ],
)
def test_the_unloaded_ttft_of_small_numbers(new: int, remote: int, decode: float, expected: float) -> None:
    scaled = Scaled(SMALL, LINK, LINK, ranks=2)
    assert scaled.unloaded_ttft(new + remote, new, remote, Rate(decode), 1.0) == pytest.approx(expected)


def test_the_unloaded_ttft_grows_with_the_prompt_and_with_slower_decode_links() -> None:
    found, slow = requests(regime("one", duration=30.0)), requests(regime("one", duration=30.0, decode_rate="50mbit"))
    by_size = sorted((r for r in found if not r.remote), key=lambda r: r.tokens)
    assert [r.unloaded for r in by_size] == sorted(r.unloaded for r in by_size)
    one, other = ({r.tokens: r.unloaded for r in each if not r.remote} for each in (found, slow))
    assert all(other[tokens] > one[tokens] for tokens in one.keys() & other.keys())


@pytest.mark.parametrize("model", sorted(MODELS))
def test_grouping_layers_changes_no_totals(model: str) -> None:
    coarse, fine = (regime("one", model=model, steps=steps).scaled for steps in (4, 0))
    for size in ("kv", "exchange"):
        a, b = (s.rounds * getattr(s, size)(4000) for s in (coarse, fine))
        assert a == pytest.approx(b, rel=0.02)
    assert coarse.rounds * coarse.compute(4000) == pytest.approx(fine.rounds * fine.compute(4000))


def test_collectives_of_four_ranks_carry_what_the_papers_formulas_say() -> None:
    # 4 ranks, real rate: of 1000 tokens each, 1/4 of the expert inputs go to each other rank, and back.
    moe = regime("one", rate="100gbit", steps=0).scaled
    assert moe.exchange(4000) == 1000 * 16_384 // 4 * 2
    # Two all-reduces of 4000 x 8 KiB, each 2 x 1/4 of the message between every two ranks.
    dense = regime("one", rate="100gbit", steps=0, model="llama-3-8b").scaled
    assert dense.exchange(4000) == 2 * 2 * 4000 * 8192 // 4
