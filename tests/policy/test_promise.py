# SPDX-License-Identifier: Apache-2.0
"""What the default policy promises, on a fluid link: do no harm, and starve nobody.

Floors are those of the daemon, decisions are made at ticks of 10 ms.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fluid import CROWDS, FLOORS, MARGIN_S, MARGIN_SHARE, RATE, Job, case, edf_could, promised, shared

from mfsd.ground.bands import BACKGROUND_FLOOR, DEFAULT_FLOOR, LEVEL_FLOOR, LEVEL_SCAVENGER
from mfsd.ground.model import Stage
from mfsd.lab.sim.decide import simulate
from mfsd.lab.sim.singlelink import BatchSpec, Case, RequestSpec
from mfsd.policy import registry

DEFERRED = 4
KNOWN_S = 1.0
"""When the link's load, an average over 0.1 s, shows all that a crowd takes."""
SURPRISED = [Job(1.0, math.exp(-2.75)), Job(1.0, math.exp(-3.28125))]
"""At a load of 4 the second alone is just in time on an empty link, and not beside a crowd."""
SHARING = [Job(1.0, 1.0), Job(1.0, math.exp(-2.75)), Job(1.0, math.exp(-2.5625)), Job(math.exp(2.0), math.exp(-1.0))]
"""At a load of 0.9 the second and the third are urgent together, and the second has half of what they get."""
EDGE = [*[Job(1.0, 1.0)] * 4, Job(1.0, math.exp(0.0078125)), Job(math.exp(2.0), 1.0)]
"""At a load of 4 the fifth comes right behind 10 ms of work: at each tick among what is next, or not."""
crowds = st.sampled_from(list(CROWDS))


def _between(low: float, high: float) -> st.SearchStrategy[float]:
    """Log-uniform, so that small and large come up alike."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


def _sets(most: int) -> st.SearchStrategy[list[Job]]:
    """Work is relative until the set is scaled."""
    jobs = st.builds(Job, work=_between(0.01, 10), due=_between(1.5 * MARGIN_S, 5))
    return st.lists(jobs, min_size=1, max_size=most)


@settings(max_examples=60)
@given(_sets(16), st.sampled_from([0.999, 0.9, 0.6]), crowds)
@example(SHARING, 0.9, "a bulk transfer")
def test_what_edf_alone_on_the_link_meets_is_met_beside_anybody(jobs: list[Job], load: float, crowd: str) -> None:
    """With the margins of the policy, and what the floors leave."""
    factor = edf_could(jobs, 1 - FLOORS) * load
    fitted = [Job(j.work * factor, j.due) for j in jobs]
    outcome, decider, _ = promised(case(fitted, crowd))
    assert outcome.met.all()
    assert not any(flag for seen in decider.seen for flag in seen.infeasible)


@settings(max_examples=100)
@given(_between(0.001, 2), _between(1.5, 12), crowds)
def test_what_plain_sharing_with_a_competitor_meets_is_met(work: float, tightness: float, crowd: str) -> None:
    of = case([Job(work, work * tightness)], crowd)
    if shared(of).met[0]:
        assert promised(of)[0].met[0]


@pytest.mark.parametrize("crowd", CROWDS)
def test_so_is_a_large_one(crowd: str) -> None:
    """10 s of work due in 21 s."""
    of = case([Job(10.0, 21.0)], crowd)
    assert promised(of)[0].met[0] or not shared(of).met[0]


@settings(max_examples=60)
@given(
    _between(0.001, 1),
    _between(1.2, 12),
    st.sampled_from([1.0, 1.5, 4.0]),
    _between(0.1, 10),
    st.floats(0, 0.5),
    crowds,
)
def test_what_plain_sharing_with_another_transfer_meets_is_met(
    work: float, tightness: float, looser: float, other: float, later: float, crowd: str
) -> None:
    """Equal or looser, larger or smaller, at once or a little later; beside somebody else again as long as it fits."""
    jobs = [Job(work, work * tightness), Job(work * other, work * tightness * looser, at=later * work)]
    of = case(jobs, crowd)
    plain = shared(of, until=200.0)
    # Both together must leave the floors their share.
    if plain.met.all() and edf_could([Job(j.work, j.due + j.at) for j in jobs], 1 - FLOORS) > 1:
        assert promised(of, until=200.0)[0].met.all()


@pytest.mark.parametrize("crowd", ["a saturating collective", "a bulk transfer"])
def test_the_policy_before_it_starved_them(crowd: str) -> None:
    """So the tests above can fail: 0.2 s of work due in 0.6 s, which plain sharing meets."""
    of = case([Job(0.2, 0.6)], crowd)
    assert shared(of).met[0]
    assert promised(of)[0].met[0]
    assert not simulate(of, registry.make_policy("deadline-ladder"), 0.01, until=9.0).met[0]


@pytest.mark.parametrize("share", [0.5, 0.82])
def test_what_comes_later_is_met_if_edf_needs_half_of_the_link_and_seldom_missed_if_it_needs_most(share: float) -> None:
    """Nobody who defers can promise that: what waits may need the link together with what comes."""
    rng = np.random.default_rng(19)
    missed = total = 0
    for _ in range(8):
        jobs = _arrivals(rng, share)
        outcome, _, _ = promised(case(jobs, "a saturating collective"))
        missed, total = missed + int((~outcome.met).sum()), total + len(jobs)
    assert missed <= (0 if share == 0.5 else 0.05) * total


def _arrivals(rng: np.random.Generator, share: float) -> list[Job]:
    """Jobs over three seconds whose work is scaled to what EDF just meets with a share of the link."""
    count = int(rng.integers(5, 20))
    due, at = np.exp(rng.uniform(math.log(0.1), math.log(3), count)), np.sort(rng.uniform(0, 3, count))
    work = due * np.exp(rng.normal(-1.5, 1, count))
    low, high = 0.0, 10.0
    for _ in range(20):
        factor = (low + high) / 2
        jobs = [Job(w * factor, d, a) for w, d, a in zip(work.tolist(), due.tolist(), at.tolist(), strict=True)]
        low, high = (factor, high) if _edf_meets(jobs, share) else (low, factor)
    return [Job(w * low, d, a) for w, d, a in zip(work.tolist(), due.tolist(), at.tolist(), strict=True)]


def _edf_meets(jobs: list[Job], share: float) -> bool:
    """Earliest deadline first, preemptive, with the margins."""
    now, waiting = 0.0, [[j.at, j.at + j.due * 0.97 - MARGIN_S, j.work / share] for j in jobs]
    while waiting:
        here = [w for w in waiting if w[0] <= now]
        next_at = min((w[0] for w in waiting if w[0] > now), default=math.inf)
        if not here:
            now = next_at
            continue
        first = min(here, key=lambda w: w[1])
        served = min(first[2], next_at - now)
        now, first[2] = now + served, first[2] - served
        if first[2] <= 1e-12:
            waiting.remove(first)
            if now > first[1]:
                return False
    return True


# --- nobody starves ---------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.lists(st.tuples(_between(0.001, 0.3), st.sampled_from([0.001, 0.1, 1.0, 50.0])), min_size=1, max_size=8),
    st.sampled_from(["a saturating collective", "everybody"]),
)
def test_everybody_moves_and_nobody_is_held_back_for_longer_than_allowed(
    rows: list[tuple[float, float]], crowd: str
) -> None:
    """Due soon, in a while, hopeless: after 2 s at most they get what is for those who were held back."""
    longest, share = 2.0, 0.05
    jobs = [Job(work, due) for work, due in rows]
    of = case(jobs, crowd)
    outcome, decider, run = promised(of, max_defer_p2d_s=longest, overdue_share=share)
    assert (outcome.finish <= longest + 0.1 + sum(j.work for j in jobs) / share).all()
    low = [[level >= DEFERRED for level in seen.levels] for seen in decider.seen]
    assert all(sum(held) <= (longest + 0.05) / 0.01 for held in low)
    for crowd_of, octets in zip(of.crowds, run.carried.tolist(), strict=True):
        floor = {Stage.COLLECTIVE: LEVEL_FLOOR, Stage.NONE: DEFAULT_FLOOR, Stage.BACKGROUND: BACKGROUND_FLOOR}
        assert octets >= floor[crowd_of.stage] * RATE * run.now * (1 - 1e-9)


def test_who_can_wait_leaves_all_that_it_does_not_need_to_the_collectives() -> None:
    """1 s of work due in 6 s, beside a saturating collective."""
    _, decider, run = promised(case([Job(1.0, 6.0)], "a saturating collective"), until=3.9)
    assert set(decider.seen[0].levels) == {DEFERRED}
    share = 1.1 * 1.0 / (6.0 * (1 - 2 * MARGIN_SHARE) - 2 * MARGIN_S) + LEVEL_FLOOR
    assert run.carried[0] >= (1 - share) * 3.9 * RATE * (1 - 1e-9)
    outcome, decider, run = promised(case([Job(1.0, 6.0)], "a saturating collective"))
    assert outcome.met[0]
    assert run.now > 5.0  # it was in no hurry


def test_collectives_that_pause_lose_nothing_to_who_needs_half_of_the_link() -> None:
    """80 layers with 30 ms of compute and 10 ms of collectives; after half a second, 0.84 s of work due in 1.75 s."""
    layers, compute, sending = 80, 0.03, 0.01
    forward = BatchSpec(0.0, compute, (sending * RATE,) * layers, (RequestSpec(math.inf),))
    (kv,) = case([Job(0.84, 1.75, at=0.5)]).batches
    outcome, _, _ = promised(Case(RATE, (forward, replace(kv, instance=1))))
    assert outcome.met.all()
    assert outcome.finish[0] <= layers * (compute + sending) * (1 + LEVEL_FLOOR)  # 3.2 s and next to nothing


# --- to and fro -------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(_sets(12), st.sampled_from([0.5, 0.9, 1.5, 4.0]), crowds)
@example(SURPRISED, 4.0, "a bulk transfer")
@example(EDGE, 4.0, "nobody")
def test_without_surprises_promotions_are_few_and_verdicts_stand(jobs: list[Job], load: float, crowd: str) -> None:
    """Who gets more than it needs waits again, but not often; who is lost comes back once at most.

    If others leave, or as far as they have moved meanwhile.

    Crowds have been there for long: what the link gives is known from the first verdict on. See the next test.
    """
    factor = edf_could(jobs, 1 - FLOORS) * load
    _, decider, _ = promised(case([Job(j.work * factor, j.due, KNOWN_S) for j in jobs], crowd), until=10.0)
    for seen in decider.seen:
        kept = [level for level in seen.levels if level != LEVEL_SCAVENGER]
        promotions = sum(b < a for a, b in itertools.pairwise(kept))
        assert promotions <= 4 + len(jobs)
        flips = sum(a != b for a, b in zip([False, *seen.infeasible], seen.infeasible, strict=False))
        assert flips <= (0 if load < 1 else 3)


def test_who_was_lost_for_somebody_who_is_lost_later_comes_back() -> None:
    """A bulk transfer begins with them, and what it takes is known a tick later only.

    So the first verdict keeps the second one, and the first one, which does not fit beside it, is lost. Then the second
    one can not be in time any more, whatever is done, but the first one can: no verdict that stood would be as good.
    """
    factor = edf_could(SURPRISED, 1 - FLOORS) * 4.0
    outcome, decider, _ = promised(case([Job(j.work * factor, j.due) for j in SURPRISED], "a bulk transfer"))
    first, second = (seen.infeasible for seen in decider.seen)
    assert first == [True, True] + [False] * (len(first) - 2)
    assert second == [False] + [True] * (len(second) - 1)
    assert outcome.met.tolist() == [True, False]
