# SPDX-License-Identifier: Apache-2.0
"""The forward pass over connections without a network, played by one process and by one per host."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from support.labfakes import STEPS, TWO_RANKS, Cluster, Voice, request

from mfsd.ground.model import Stage
from mfsd.lab.arms import Faults
from mfsd.lab.serving.forward import Inbox, Instance, Log
from mfsd.lab.serving.hinter import Hinter

if TYPE_CHECKING:
    from mfsd.lab.requests import Request
    from mfsd.lab.settings import Settings

ONE_PROCESS = dataclasses.replace(TWO_RANKS, transport="conduits")
LONG = request(0, 0, new=5000)
"""Its pass takes 30 ms, in which all others arrive."""
BOTH = pytest.mark.parametrize("settings", [ONE_PROCESS, TWO_RANKS], ids=["one process", "process per host"])


def pass_of(cluster: Cluster) -> dict[int, int]:
    """Request -> number of its forward pass, as the daemons heard it."""
    return {
        int(name[1:]): int(args[0].rpartition("b")[2])
        for _, method, args, _ in cluster.voice.said
        if method == "batch"
        for name in args[1]
    }


@BOTH
def test_all_ranks_compute_everything_in_lock_step(settings: Settings) -> None:
    work = [request(i, i % 2, new=60) for i in range(9)]
    cluster = Cluster(settings, work)
    cluster.run()
    one, other = (cluster.carried(Stage.COLLECTIVE, src) for src in ("p0", "p1"))
    assert one == other, "the same exchanges, of the same sizes, in the same order"
    assert [key for key, _, _ in one] == list(range(len(one)))
    assert len(one) % STEPS == 0
    assert len(cluster.log.exchanges) == len(one)
    came = Counter((key, step) for key, step, _ in cluster.carried(Stage.P2D))
    assert came == Counter((r.id, step) for r in work for step in range(STEPS)), "each step of each request, once"
    assert {size for _, _, size in cluster.carried(Stage.P2D)} == {TWO_RANKS.scaled.kv(60)}
    log = cluster.log
    assert all(log.began[r.id] < log.handed[r.id] <= log.computed[r.id] for r in work)
    assert log.passes >= sum(TWO_RANKS.scaled.compute(60) for _ in one)


@BOTH
def test_an_exchange_is_as_large_as_the_tokens_of_all_ranks_make_it(settings: Settings) -> None:
    cluster = Cluster(settings, [LONG, request(1, 0, at=0.01, new=70), request(2, 1, at=0.01, new=30)])
    cluster.run()
    sizes = {TWO_RANKS.scaled.exchange(tokens) for tokens in (LONG.new, 100)}
    assert {size for _, _, size in cluster.carried(Stage.COLLECTIVE)} == sizes


@BOTH
def test_batches_are_first_come_first_served_within_the_budget(settings: Settings) -> None:
    work = [LONG, *(request(i, 0, new=new) for i, new in enumerate((40, 40, 40, 250, 10), 1))]
    cluster = Cluster(settings, work)
    cluster.run()
    assert pass_of(cluster) == {0: 0, 1: 1, 2: 1, 3: 2, 4: 3, 5: 4}, "100 tokens a pass; one above them runs alone"


def test_a_scheduler_takes_what_fits_in_order_and_at_least_one() -> None:
    inbox = Inbox(80)
    for i, new in enumerate((50, 30, 40, 10, 200)):
        inbox.put(request(i, 0, new=new))
    assert [[r.id for r in inbox.take()] for _ in range(4)] == [[0, 1], [2, 3], [4], []]


def test_a_rank_without_requests_still_takes_part() -> None:
    cluster = Cluster(TWO_RANKS, [request(0, 1), request(1, 1, at=0.05)])
    cluster.run()
    assert len(cluster.carried(Stage.COLLECTIVE, "p0")) == len(cluster.carried(Stage.COLLECTIVE, "p1")) == 2 * STEPS
    assert not cluster.voice.of("batch", "p0")


@BOTH
def test_cached_kv_is_sent_and_announced_by_the_host_that_has_it(settings: Settings) -> None:
    cluster = Cluster(settings, [request(5, 0, held={"p1": 300}, slo=2.0)])
    cluster.run()
    size = TWO_RANKS.scaled.kv(300)
    assert cluster.carried(Stage.KV_REUSE, "p1", "p0") == [(5, i, size) for i in range(STEPS)]
    assert not cluster.carried(Stage.KV_REUSE, "p0")
    ((_, told),) = cluster.voice.of("request", "p1")
    assert 1.5 < told["ttft_left_s"] <= 2.0, "its daemon hears the deadline of the asking rank"
    sent = cluster.voice.of("transfer", "p1")
    assert [(k["stage"], k["request"], k["layer"]) for _, k in sent] == [
        (Stage.KV_REUSE, "r5", i) for i in range(STEPS)
    ]
    assert cluster.voice.of("done", "p1")[0] == ((), {"request": "r5"})
    assert len(cluster.log.fetch_waits) == STEPS


@BOTH
def test_hints_come_in_an_order_that_a_daemon_can_follow(settings: Settings) -> None:
    cluster = Cluster(settings, [request(1, 0)])
    cluster.run()
    said = [method for host, method, _, _ in cluster.voice.said if host == "p0"]
    assert said[0] == "mark", "the collective connection is marked once"
    assert said.index("request") < said.index("batch") < said.index("transfer")
    transfers = cluster.voice.of("transfer")
    assert [k["layer"] for _, k in transfers] == list(range(STEPS))
    assert all(k["request"] == "r1" and k["stage"] is Stage.P2D for _, k in transfers)
    assert [args[1] for args, k in cluster.voice.of("layer") if not k] == list(range(STEPS))


@BOTH
def test_a_requests_kv_stays_on_one_conduit_in_order_and_requests_are_spread(settings: Settings) -> None:
    work = [request(i, 0, new=50) for i in range(4)]
    cluster = Cluster(dataclasses.replace(settings, max_batch=1000), work)
    cluster.run()
    used = [s for e in cluster.ends for s in e.senders if s.conduit.stage is Stage.P2D and s.carried]
    assert sorted(cluster.log.conduit.values()) == [s.conduit.number for s in used]
    assert len(used) == 4
    for sender in used:
        assert [step for _, step, _ in sender.carried] == list(range(STEPS))


def test_all_ranks_of_a_dense_model_fetch_and_send_their_share() -> None:
    dense = dataclasses.replace(ONE_PROCESS, model="llama-3-8b", stores=1, cache="stores", prefill=4)
    cluster = Cluster(dense, [request(3, 0, held={"s0": 4000})])
    cluster.run()
    for stage, tokens in ((Stage.KV_REUSE, 4000), (Stage.P2D, 4100)):
        each = [cluster.carried(stage, **{end: f"p{i}"}) for i in range(4) for end in [
            "dst" if stage is Stage.KV_REUSE else "src"]]  # fmt: skip
        assert each == [[(3, step, dense.scaled.kv(tokens) // 4) for step in range(STEPS)]] * 4
    assert cluster.voice.of("done", "s0") == [((), {"request": "r3"})], "once, when every rank has got its share"


class SlowTransport:
    """Cached KV whose steps come in the wrong order; notes what is done when."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.come = {step: asyncio.Event() for step in range(STEPS)}
        self.passes = 0

    async def agree(self, inbox: Inbox) -> tuple[list[Request], int]:
        await inbox.until(lambda: len(inbox))
        batch = inbox.take()
        return batch, sum(r.new for r in batch)

    def fetch(self, _request: Request) -> None:
        loop = asyncio.get_running_loop()
        for delay, step in ((0.02, 1), (0.04, 0), (0.06, 3), (0.08, 2)):
            loop.call_later(delay, self.come[step].set)

    async def fetched(self, _request: Request, step: int) -> None:
        await self.come[step].wait()

    async def exchange(self, _size: int) -> float:
        self.done.append(f"exchange with {[s for s, e in self.come.items() if e.is_set()]}")
        return time.monotonic()

    def hand_over(self, _request: Request, step: int) -> None:
        self.done.append(f"step {step}")


def test_a_step_waits_for_its_very_own_cached_kv_and_for_no_later_one() -> None:
    async def main() -> tuple[SlowTransport, Log]:
        transport, log = SlowTransport(), Log()
        hinter = Hinter(Voice(()), STEPS, Faults(), 0)
        instance = Instance(0, "i0", TWO_RANKS, transport, hinter, log)
        task = asyncio.create_task(instance.run())
        instance.arrive(request(0, 0, held={"p1": 10}), 1.0)
        while 0 not in log.computed:  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.005)
        task.cancel()
        return transport, log

    transport, log = asyncio.run(main())
    assert transport.done == [
        "exchange with [0, 1]", "step 0", "exchange with [0, 1]", "step 1",
        "exchange with [0, 1, 2, 3]", "step 2", "exchange with [0, 1, 2, 3]", "step 3",
    ]  # fmt: skip
    first, second, third, fourth = log.fetch_waits
    assert first > 0.03
    assert second < 0.01
    assert third > 0.02
    assert fourth < 0.01


def test_a_collective_lasts_from_when_the_last_rank_began_until_the_last_has_everything() -> None:
    mine, theirs = Log(exchanges={"0/0": (1.0, 1.5, 10)}), Log(exchanges={"0/0": (1.2, 1.4, 10)})
    mine.done, theirs.done, theirs.overslept = {1: 2.0}, {2: 3.0}, 0.25
    mine.add(theirs)
    assert mine.exchanges == {"0/0": (1.2, 1.5, 10)}
    assert mine.done == {1: 2.0, 2: 3.0}
    assert mine.overslept == 0.25
