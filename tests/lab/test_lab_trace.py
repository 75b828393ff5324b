# SPDX-License-Identifier: Apache-2.0
"""Traces and what ranks are asked."""

from __future__ import annotations

import collections
import json
from typing import TYPE_CHECKING, Any

import pytest
from support.labfakes import TINY, job

from mfsd.lab import trace, workload
from mfsd.lab.models import MIXTRAL, Scaled
from mfsd.units import Rate

if TYPE_CHECKING:
    from pathlib import Path

GIGABIT = Scaled(MIXTRAL, Rate.parse("1gbit"))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def row(ms: int, tokens: int, *blocks: int) -> dict[str, Any]:
    return {"timestamp": ms, "input_length": tokens, "output_length": 1, "hash_ids": list(blocks)}


def test_the_excerpt_has_all_requests_of_four_minutes_spread_inside_their_ticks() -> None:
    raw = [json.loads(line) for line in trace.EXCERPT.read_text().splitlines()]
    prompts = trace.load()
    assert len(prompts) == len(raw) == 731
    assert [p.at for p in prompts] == sorted(p.at for p in prompts)
    assert len({p.at for p in prompts}) == 731, "no two at the same moment"
    ticks = sorted(r["timestamp"] / 1000 for r in raw)
    assert all(tick <= p.at < tick + trace.TICK_S for tick, p in zip(ticks, prompts, strict=True))


def test_a_seed_makes_arrivals_reproducible() -> None:
    assert trace.load(seed=1) == trace.load(seed=1)
    assert trace.load(seed=1) != trace.load(seed=2)


def test_only_a_leading_run_of_known_blocks_is_cached(tmp_path: Path) -> None:
    path = write(tmp_path / "t", row(0, 1536, 1, 2, 3), row(3000, 2048, 1, 2, 9, 3), row(6000, 1024, 1, 2))
    first, second, third = trace.load(path)
    assert (first.reused, second.reused) == (0, 1024)
    assert third.cached == (1, 2)
    assert third.reused == 1023, "the last token is always computed"


def test_reuse_follows_the_order_of_the_trace_not_of_the_spread_arrivals(tmp_path: Path) -> None:
    path = write(tmp_path / "t", *(row(0, 512 * 2, 7, 8) for _ in range(20)))
    assert sorted(p.reused for p in trace.load(path)) == [0] + [1023] * 19


@pytest.mark.parametrize("line", ['{"timestamp": 0}', "no json", '{"timestamp":0,"input_length":0,"hash_ids":[]}'])
def test_a_faulty_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t.jsonl", row(0, 10, 1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(trace.TraceError, match=r"t\.jsonl, line 2"):
        trace.load(path)


def test_jobs_are_dealt_in_turns_inside_the_window_and_the_bounds() -> None:
    selection = workload.Selection(start=130, duration=20, speed=2.0)
    jobs = workload.jobs(trace.load(), selection, GIGABIT)
    assert [j.rank for j in jobs] == [i % 2 for i in range(len(jobs))]
    assert all(0 <= j.at < 20 for j in jobs)
    assert all(selection.min_tokens <= j.tokens <= selection.max_tokens and j.new <= selection.max_new for j in jobs)
    assert all(0 <= j.remote <= j.tokens - j.new for j in jobs)
    assert any(j.remote > 5000 for j in jobs), "no reuse to speak of: stage 1 would be idle"
    assert all(j.slo == pytest.approx(3 * j.unloaded) for j in jobs)


def test_twice_the_speed_is_about_twice_the_load() -> None:
    loads = []
    for speed in (1.0, 2.0):
        selection = workload.Selection(duration=40 / speed, speed=speed)
        loads.append(workload.link_load(workload.jobs(trace.load(), selection, GIGABIT), selection, GIGABIT))
    assert loads[1] == pytest.approx(2 * loads[0], rel=0.01)


def test_bytes_shrink_with_the_link_and_times_do_not() -> None:
    assert GIGABIT.scale == pytest.approx(1 / 50)
    # 4096 tokens of KV, all layers: 512 MiB on 50 Gbit/s (reference/serving.md, 5.1) and as long here.
    assert MIXTRAL.layers * GIGABIT.kv(4096) / 125e6 == pytest.approx((512 << 20) / 6.25e9, rel=0.001)
    assert GIGABIT.compute(1000) == Scaled(MIXTRAL, Rate.parse("100mbit")).compute(1000)


def test_unloaded_ttft_is_at_least_each_of_its_parts_and_at_most_their_sum() -> None:
    for new, remote in ((100, 0), (5000, 0), (100, 8000), (4000, 4000)):
        j = job(0, 0, new=new, remote=remote)
        layers, rate = TINY.model.layers, TINY.link.bytes_per_s
        pass_s = layers * (TINY.compute(new) + TINY.exchange(new) / rate)
        kv_s = layers * TINY.kv(j.tokens) / rate
        fetch_s = layers * TINY.kv(remote) / rate if remote else 0.0
        assert max(pass_s, kv_s, fetch_s) <= TINY.unloaded_ttft(j) <= pass_s + kv_s + fetch_s + 1e-12


def test_a_batch_takes_what_fits_in_order_and_at_least_one() -> None:
    waiting = collections.deque(workload.Job(i, 0.0, 0, new, new, 0) for i, new in enumerate((50, 30, 40, 10, 200)))
    assert [[j.id for j in workload.next_batch(waiting, 80)] for _ in range(4)] == [[0, 1], [2, 3], [4], []]
