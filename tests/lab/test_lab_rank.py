# SPDX-License-Identifier: Apache-2.0
"""The prefill emulator over fake lanes."""

from __future__ import annotations

import time
from collections import Counter

from support.labfakes import LAYERS, TINY, Pair, job

from mfsd.model import Stage


def test_two_ranks_compute_everything_in_lock_step() -> None:
    jobs = [job(i, i % 2, new=60) for i in range(9)]
    pair = Pair(jobs, max_batch=100)
    pair.run(time.monotonic())
    exchanges = [lanes.exchange.carried for lanes in pair.lanes]
    assert [(f.key, f.layer, f.size) for f in exchanges[0]] == [(f.key, f.layer, f.size) for f in exchanges[1]]
    assert len(exchanges[0]) % LAYERS == 0
    assert Counter(f.key for f in pair.decoded) == {j.id: LAYERS for j in jobs}
    for j in jobs:
        sizes = {f.size for f in pair.decoded if f.key == j.id}
        assert sizes == {TINY.kv(j.tokens)}


def test_batches_are_first_come_first_served_within_the_budget() -> None:
    jobs = [job(i, 0, new=new) for i, new in enumerate((40, 40, 40, 250, 10))]
    pair = Pair(jobs, max_batch=100)
    pair.run(time.monotonic() + 0.2)
    batches = [ids for _, _, ids in pair.ranks[0].log.batches]
    assert [i for ids in batches for i in ids] == [0, 1, 2, 3, 4]
    size = {j.id: j.new for j in jobs}
    assert all(sum(size[i] for i in ids) <= 100 or len(ids) == 1 for ids in batches)
    assert [3] in batches, "a request above the budget runs alone"


def test_a_rank_without_requests_still_takes_part() -> None:
    pair = Pair([job(0, 1), job(1, 1, at=0.05)], max_batch=100)
    pair.run(time.monotonic())
    assert len(pair.lanes[0].exchange.carried) == len(pair.lanes[1].exchange.carried) > 0
    assert not pair.ranks[0].log.batches


def test_no_work_at_all_ends_at_once() -> None:
    Pair([], max_batch=100).run(time.monotonic())


def test_cached_kv_is_sent_and_announced_by_the_rank_that_has_it() -> None:
    pair = Pair([job(5, 0, remote=300, slo=2.0)], max_batch=1000)
    pair.run(time.monotonic())
    sent = pair.lanes[1].kv[0].carried
    assert [(f.stage, f.key, f.layer) for f in sent] == [(Stage.KV_REUSE, 5, i) for i in range(LAYERS)]
    assert not pair.lanes[0].kv[0].carried
    (asked,) = (m for m in pair.mail[0].sent if m["what"] == "fetch")
    assert asked["tokens"] == 300
    ((args, kwargs),) = pair.hints[1].of("request")
    assert args == ("f5",)
    assert 0 < kwargs["ttft_left_s"] <= 2.0, "its own daemon hears the deadline of the asking rank"
    assert all(kwargs["stage"] is Stage.KV_REUSE for _, kwargs in pair.hints[1].of("transfer"))


def test_hints_come_in_an_order_that_a_daemon_can_follow() -> None:
    pair = Pair([job(1, 0)], max_batch=100)
    pair.run(time.monotonic())
    said = [name for name, _ in pair.hints[0].said]
    assert said[0] == "mark", "the collective connection is marked once"
    assert said.index("request") < said.index("batch") < said.index("transfer")
    transfers = pair.hints[0].of("transfer")
    assert [kwargs["layer"] for _, kwargs in transfers] == list(range(LAYERS))
    assert all(kwargs["request"] == "r1" and kwargs["stage"] is Stage.P2D for _, kwargs in transfers)
    layers = [args[1] for args, kwargs in pair.hints[0].of("layer") if not kwargs]
    assert layers == list(range(LAYERS))


def test_a_requests_kv_stays_on_one_lane_in_order() -> None:
    pair = Pair([job(i, 0, new=50) for i in range(4)], max_batch=1000)
    pair.run(time.monotonic())
    for number, index in pair.ranks[0].log.lane_of.items():
        (lane,) = (lane for lane in pair.lanes[0].p2d if lane.index == index)
        assert [f.layer for f in lane.carried if f.key == number] == list(range(LAYERS))
