# SPDX-License-Identifier: Apache-2.0
"""What the demand-bound policy is made of: whom to drop, when transfers are due, what a link is asked."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import policy_views as pv
from support.demand import DEFERRED, RATE, alone, decide, demand_bound, shares
from support.reference_links import bucket

from mfsd.ground.bands import LEVEL_SCAVENGER
from mfsd.policy.demand_bound import drop, fifo, load
from mfsd.policy.views import Views

# --- whom to drop -----------------------------------------------------------------------------------------------------


def _jobs(of: list[int], lent: list[bool] | None = None, following: list[int] | None = None) -> drop.Jobs:
    count = max(of) + 1
    return drop.Jobs(
        np.array(of, dtype=np.int32),
        np.array(lent or [False] * len(of)),
        np.array(following or [-1] * count, dtype=np.int32),
        np.full(count, 0.5),
    )


def _fewest(jobs: list[tuple[float, float]]) -> int:
    """Fewest of (seconds, work) to drop so that the others fit; tries all."""
    for count in range(len(jobs) + 1):
        for gone in itertools.combinations(range(len(jobs)), count):
            kept = sorted(job for i, job in enumerate(jobs) if i not in gone)
            if all(sum(w for _, w in kept[: k + 1]) <= kept[k][0] * drop.ROUNDING for k in range(len(kept))):
                return count
    return len(jobs)


durations = st.floats(0.01, 10)


@given(st.lists(st.tuples(durations, durations), min_size=1, max_size=8))
def test_no_fewer_jobs_could_be_dropped(rows: list[tuple[float, float]]) -> None:
    seconds, work = (np.array([r[k] for r in rows]) for k in (0, 1))
    gone, _ = drop.most_work_first(_jobs(list(range(len(rows)))), np.arange(len(rows)), seconds, work, 100)
    assert len(gone) == _fewest(rows)


@given(st.lists(st.tuples(durations, durations), min_size=1, max_size=6), st.data())
def test_a_request_is_one_job_however_many_transfers_it_has(
    rows: list[tuple[float, float]], data: st.DataObject
) -> None:
    parts = [data.draw(st.integers(1, 4)) for _ in rows]
    of = [i for i, n in enumerate(parts) for _ in range(n)]
    seconds = np.array([rows[i][0] for i in of])
    work = np.array([rows[i][1] / parts[i] for i in of])
    gone, _ = drop.most_work_first(_jobs(of), np.arange(len(of)), seconds, work, 100)
    assert len(gone) == _fewest(rows)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1.0, 2.0, 3.0]), durations), min_size=1, max_size=8))
@example([(0, 1.0, 1.0), (0, 2.0, 1.0), (1, 2.0, 1.5)])
def test_who_is_dropped_does_not_hang_on_the_order_of_those_due_together(parts: list[tuple[int, float, float]]) -> None:
    of, seconds, work = zip(*parts, strict=True)
    for until in set(seconds):
        sizes = [sum(w for job, due, w in parts if job == one and due <= until) for one in set(of)]
        assume(len(set(sizes) - {0}) == len(sizes) - sizes.count(0))  # of equal ones any may go
    dropped = []
    for number in itertools.permutations(range(3)):
        jobs, rows = _jobs([number[job] for job in of]), np.arange(len(of))
        gone, _ = drop.most_work_first(jobs, rows, np.array(seconds), np.array(work), 100)
        dropped.append({number.index(job) for job in gone})
    assert all(gone == dropped[0] for gone in dropped)


def test_the_view_decides_as_brute_force_does() -> None:
    """Stage 3 of separate requests on one device: as few are lost as can be, but for the tolerance."""
    policy, rng = demand_bound(give_up=0.0), np.random.default_rng(3)
    for _ in range(300):
        n = int(rng.integers(1, 8))
        seconds, work = rng.uniform(0.1, 3, n), rng.uniform(0.05, 1.5, n)
        t = pv.transfers(n, size=work * RATE, left=work * RATE, deadline=seconds, request=np.arange(n))
        view = pv.view(t, pv.requests(n, deadline=seconds), pv.link(RATE, 5))
        lost = policy.evaluate(view).infeasible
        assert lost is not None
        assert lost.sum() == _fewest(list(zip(seconds.tolist(), work.tolist(), strict=True)))
        kept = sorted(zip(seconds[~lost], work[~lost], strict=True))
        assert all(sum(w for _, w in kept[: k + 1]) <= kept[k][0] * 1.0001 for k in range(len(kept)))


def test_stage_1_is_not_dropped_but_due_with_the_next_request_of_its_batch() -> None:
    """0.8 s of it and 0.1 s of stage 3 are due in 0.5 s, for request 0; request 1 of the batch is due 0.5 s later."""
    jobs = _jobs([0, 0], [True, False], [1, -1])
    seconds, work = np.array([0.5, 0.5]), np.array([0.8, 0.1])
    assert drop.most_work_first(jobs, np.arange(2), seconds, work, 100)[0] == {0}
    # As 0.3 s of another are due in 1 s as well, request 1 can't make it, either; then nobody waits for it in time.
    jobs = _jobs([0, 2], [True, False], [1, -1, -1])
    assert drop.most_work_first(jobs, np.arange(2), np.array([0.5, 1.0]), np.array([0.8, 0.3]), 100)[0] == {0, 1}


def test_what_is_dropped_is_dropped_everywhere_and_tried_again_when_there_is_room() -> None:
    policy = demand_bound()
    t = pv.transfers(4, request=[0, 0, 1, 2], device=[0, 1, 0, 1], size=1e6)
    t.left[:] = np.array([0.9, 0.1, 0.3, 0.95]) * RATE
    t.deadline[:] = 1.0
    view = pv.view(t, pv.requests(3, deadline=1.0), pv.link([RATE, RATE], 5))
    lost = policy.evaluate(view)
    assert lost.infeasible is not None
    # Request 0 goes on device 0, so that request 2 fits on device 1.
    assert lost.infeasible.tolist() == [True, True, False, False]
    assert lost.level.tolist()[:2] == [LEVEL_SCAVENGER] * 2
    t.level, t.infeasible = lost.level, lost.infeasible
    view.requests.deadline[2] = t.deadline[3] = 2.0  # room on device 1, but not on device 0
    again = policy.evaluate(view)
    assert again.infeasible is not None
    assert again.infeasible.tolist() == [True, True, False, False]
    t.left[2] = 0.09 * RATE
    back = policy.evaluate(view)
    assert back.infeasible is not None
    assert not back.infeasible.any()


def test_tolerance_holds_between_giving_up_and_coming_back() -> None:
    policy, t = demand_bound(give_up=0.05), alone(1.04, 1.0)
    assert decide(t, policy).infeasible == [False]
    t.infeasible[:] = True
    assert decide(t, policy).infeasible == [True]
    t.left[:] = 0.99 * RATE
    assert decide(t, policy).infeasible == [False]
    t.left[:] = 1.06 * RATE
    t.infeasible[:] = False
    assert decide(t, policy).infeasible == [True]


def test_late_requests_and_those_that_compute_too_long_are_lost() -> None:
    t = pv.transfers(4, request=[0, 1, -1, 2], deadline=[-0.01, 1.0, -0.01, 1.0], left=1e3)
    view = pv.view(t, pv.requests(3, deadline=[-0.01, 1.0, 1.0], compute_left=[0.0, 1.1, 0.0]), pv.link(RATE, 5))
    assert demand_bound().infeasible(view).tolist() == [True, True, True, False]


def test_the_time_that_dropping_takes_is_bounded() -> None:
    n = 5 * drop.MOST
    rng = np.random.default_rng(1)
    jobs = _jobs(list(range(n)))
    seconds, work = rng.uniform(0.1, 2, n), rng.uniform(0.5, 1.5, n) / n * 10
    gone, looked = drop.most_work_first(jobs, np.arange(n), seconds, work, 100)
    assert looked == 100
    assert 0 < len(gone) <= 100


# --- deadlines --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 5), st.integers(1, 400) | st.just(np.inf)), max_size=20))
def test_what_stands_before_a_transfer_is_due_when_that_is(rows: list[tuple[int, int, float]]) -> None:
    conn = np.array([r[0] for r in rows], dtype=np.int32)
    ahead = np.array([r[1] for r in rows], dtype=np.float64) * 1e6
    due = np.array([r[2] for r in rows], dtype=np.float64)
    by = fifo.hurried_by(conn, ahead, due)
    got = due if by is None else due[by]
    for i in range(len(rows)):
        behind = [j for j in range(len(rows)) if j == i or (conn[j] == conn[i] >= 0 and ahead[j] >= ahead[i])]
        # Deadlines of one bucket count as equal.
        assert bucket(float(got[i])) == bucket(min(float(due[j]) for j in behind))
        if by is not None and by[i] != i:
            assert by[i] in behind
            assert due[by[i]] < due[i]


@pytest.mark.parametrize("first", [0, 1])
def test_of_those_of_a_batch_who_are_due_together_the_one_with_most_to_send_is_given_up(first: int) -> None:
    """0.5 s of stage 1, which both wait for, 0.1 s and 0.4 s of stage 3, all due in 0.8 s: the small one fits."""
    sizes = [0.1, 0.4] if first == 0 else [0.4, 0.1]
    t = pv.transfers(3, stage=[1, 3, 3], batch=0, request=[-1, 0, 1], deadline=[math.inf, 0.8, 0.8])
    t.size[:] = t.left[:] = np.array([0.5, *sizes]) * RATE
    r = pv.requests(2, batch=0, deadline=0.8)
    lost = demand_bound().judge(Views.of(t, pv.link(RATE, 5), requests=r, batches=pv.batches(1))).asked.lost
    assert lost.requests.tolist() == [size > 0.1 for size in sizes]


def test_bytes_before_a_tight_transfer_are_hurried_whatever_they_are() -> None:
    """0.3 s of background, 0.3 s of loose stage 3, and a tight one behind them: it needs most of the link."""
    t = pv.transfers(3, conn=7, stage=[4, 3, 3], left=0.3 * RATE, ahead=[0, 0.3 * RATE, 0.6 * RATE], deadline=[9, 9, 1])
    need = demand_bound(margin_ms=0.0, margin_share=0.0).judge(pv.view(t, net=pv.link(RATE, 5))).need
    assert need.tolist() == pytest.approx([0.9, 0.9, 0.9])
    t.conn[:] = [1, 2, 3]
    need = demand_bound(margin_ms=0.0, margin_share=0.0).judge(pv.view(t, net=pv.link(RATE, 5))).need
    assert need[1:].tolist() == pytest.approx([0.6 / 9, 0.3])


def test_stage_1_is_due_for_the_first_request_of_its_batch_that_is_not_lost_and_for_its_layer() -> None:
    t = pv.transfers(2, stage=1, batch=0, request=[1, 1], target_layer=[2, 8], current_layer=1, computing=True)
    t.deadline[:], t.left[:] = 2.0, 0.1 * RATE
    r = pv.requests(3, batch=0, deadline=[0.9, 2.0, 0.001], compute_left=[0.0, 0.0, 1.0])
    view = Views.of(
        t, pv.link(RATE, 5), requests=r, batches=pv.batches(1, layers=10, current_layer=1, layer_compute=0.05)
    )
    verdict = demand_bound(margin_ms=0.0, margin_share=0.0).judge(view)
    # Request 2 is lost. Layers 2 to 9, or 8 and 9, are still to be computed once it is there.
    assert verdict.asked.due.tolist() == pytest.approx([0.9 - 8 * 0.05, 0.9 - 2 * 0.05])
    # Layer 2 is next, layer 8 is six layers after the current one: 0.2 s of work in 0.3 s.
    assert verdict.layer_need[0] >= 1.0
    assert verdict.layer_need[1] == pytest.approx(0.2 / 0.3)
    # Both stand above unhinted traffic, but only deadlines are guaranteed.
    decision = demand_bound().evaluate(view)
    assert (decision.level < DEFERRED).all()
    assert shares(decision) == [0.0] * 5
    view.batches.compute_done[:] = True
    assert demand_bound().judge(view).layer_need.tolist() == [0.0, 0.0]


# --- buckets ----------------------------------------------------------------------------------------------------------


@given(st.floats(-1, 1e5), st.floats(-1, 1e5))
def test_buckets_keep_the_order_and_are_narrow(a: float, b: float) -> None:
    one, two = (int(x) for x in load.bucket(np.array([a, b])))
    assert 0 <= one < load.BUCKETS
    assert (one < two) <= (a < b)
    if one == two and min(a, b) > 0.001 and max(a, b) < 4096:
        assert max(a, b) <= min(a, b) * (1 + 1 / 32)
    assert one - int(load.bucket(np.array([1.0]))[0]) == bucket(a) - bucket(1.0)


@given(st.lists(st.tuples(st.floats(0.01, 1000), st.floats(1, 1e9)), min_size=1, max_size=40), st.integers(-3, 3))
def test_needs_are_those_of_the_demand_bound_and_scale_with_time(rows: list[tuple[float, float]], power: int) -> None:
    """Exact but for buckets, to the safe side; twice the time for twice the bytes changes nothing without a margin."""
    seconds, octets = (np.array([r[k] for r in rows]) for k in (0, 1))
    link, one = np.zeros(len(rows), dtype=np.int32), np.ones(1)
    rate, margin = np.array([1e9]), load.Margin(0.0, 0.03)
    need = load.Need(load.Load.of(link, seconds, octets, rate), margin, one).shares()
    for i in range(len(rows)):
        exact = max(
            octets[seconds <= due].sum() / (due * 0.97 * 1e9) for due in seconds[seconds >= seconds[i]].tolist()
        )
        assert min(exact, 1.0) * (1 - 1e-9) <= need[i]
        if need[i] < 1:
            assert need[i] <= exact * (1 + 1 / 31)
    k = 2.0**power
    scaled = load.Need(load.Load.of(link, seconds * k, octets * k, rate), margin, one).shares()
    if (seconds * min(k, 1.0) > 0.001).all() and (seconds * max(k, 1.0) < 4096).all():
        assert scaled.tolist() == pytest.approx(need.tolist())


@given(st.lists(st.tuples(durations, durations, st.integers(0, 1)), min_size=1, max_size=8))
def test_a_link_at_that_share_has_those_in_time_that_share_it_evenly(rows: list[tuple[float, float, int]]) -> None:
    due, work, link = (np.array([r[k] for r in rows]) for k in (0, 1, 2))
    share = load.evenly(link, due, work * RATE, np.full(2, RATE))
    for on in set(link.tolist()):
        late = []
        for own, at in zip(work[link == on], due[link == on], strict=True):
            got = sum(min(own, other) for other in work[link == on])  # by all, until it has its own
            late.append(got / share[on] / at)
        assert max(late) == pytest.approx(1.0)
