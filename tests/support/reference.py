# SPDX-License-Identifier: Apache-2.0
"""The policies again, one row at a time in plain Python: slow, and meant to be obviously right.

Written from the paper and the docstrings, not from the vectorised code. Times, sizes and rates are scalars;
``inf`` and ``-1`` mean "none" as in the views.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mfsd.policy.views import Views

NEW, NONE, SCAVENGER, BACK = 0x7FFE, -1, 0x7FFF, 0x7FFD
KV, COLLECTIVE, P2D, BACKGROUND = 1, 2, 3, 4


class State:
    """The views, by row."""

    def __init__(self, view: Views) -> None:
        self.t, self.r, self.b, self.link, self.now = view.transfers, view.requests, view.batches, view.link, view.now
        self.sizes = view.sizes.tolist() or view.transfers.size.tolist()
        self.live = max(view.cluster_requests, len(view.requests))

    def rows(self) -> range:
        return range(len(self.t))

    def rate(self, i: int) -> float:
        rate = float(self.link.rate[self.t.device[i]])
        return rate if rate > 0 else math.inf

    def far(self, i: int) -> float:
        """What is known of the link into its peer."""
        peer = int(self.t.peer[i])
        return float(self.link.peer_rate[peer]) if peer >= 0 and len(self.link.peer_rate) else math.inf

    def path(self, i: int) -> float:
        return min(self.rate(i), self.far(i))

    def out_of_order(self, i: int) -> int | None:
        """Level of what every policy treats alike."""
        return {0: NONE, BACKGROUND: BACK}.get(int(self.t.stage[i]))

    def waited_for(self, i: int) -> float:
        """Bytes that somebody waits for."""
        return 0.0 if self.t.stage[i] == BACKGROUND else float(self.t.left[i])

    def of_request(self, i: int) -> list[int]:
        """Transfers of the same request on the same device, itself included."""
        t = self.t
        if t.request[i] < 0:
            return [i]
        return [j for j in self.rows() if t.request[j] == t.request[i] and t.device[j] == t.device[i]]

    def to_the_same_peer(self, i: int) -> list[int]:
        """Transfers of the same request to the same peer, over whatever device, itself included."""
        t = self.t
        if t.request[i] < 0:
            return [i]
        return [j for j in self.rows() if t.request[j] == t.request[i] and t.peer[j] == t.peer[i]]

    def members(self, batch: int) -> list[int]:
        return [q for q in range(len(self.r)) if self.r.batch[q] == batch]


# --- what can't be in time ------------------------------------------------------------------------------------------


def needed(s: State, i: int) -> float:
    own = s.t.left[i] + s.t.ahead[i]
    here = max(own, sum(s.waited_for(j) for j in s.of_request(i))) / s.rate(i)
    there = max(own, sum(s.waited_for(j) for j in s.to_the_same_peer(i))) / s.far(i)
    return float(max(here, there, s.t.compute_left[i]))


def doomed_requests(s: State, margin: float, given_up: Callable[[int], bool]) -> set[int]:
    out = set()
    for q in range(len(s.r)):
        mine = [i for i in s.rows() if s.t.request[i] == q]
        waited = [i for i in mine if s.t.stage[i] != BACKGROUND]
        slack = 1.0 if any(given_up(i) for i in mine) else 1.0 + margin
        left = s.r.deadline[q] - s.now
        if left <= 0 or s.r.compute_left[q] > left * slack:
            out.add(q)
        for i in waited:
            time_left = s.t.deadline[i] - s.now
            if time_left <= 0 or needed(s, i) > time_left * slack:
                out.add(q)
    return out


def doomed(s: State, margin: float = 0.0, given_up: Callable[[int], bool] = lambda _: False) -> list[bool]:
    requests = doomed_requests(s, margin, given_up)
    out = []
    for i in s.rows():
        if s.t.stage[i] == BACKGROUND:
            out.append(False)
        elif s.t.request[i] >= 0:
            out.append(int(s.t.request[i]) in requests)
        else:
            time_left = s.t.deadline[i] - s.now
            slack = 1.0 if given_up(i) else 1.0 + margin
            out.append(bool(time_left <= 0 or needed(s, i) > time_left * slack))
    return out


# --- numerics -------------------------------------------------------------------------------------------------------


def bucket(value: float, edges: Sequence[float]) -> int:
    return sum(1 for e in edges if e <= value)


def geometric(count: int, first: float, last: float) -> list[float]:
    """``count`` buckets have ``count - 1`` edges, from first to last."""
    if count <= 2:
        return [first] * (count - 1)
    return [first * ((last / first) ** (1 / (count - 2))) ** i for i in range(count - 1)]


def rli(s: State, i: int) -> int:
    if s.t.stage[i] == COLLECTIVE:
        return 0
    return max(int(s.t.target_layer[i]) - int(s.t.current_layer[i]), 0)


def mlu(s: State, i: int, size: str, rho: float) -> float:
    left = s.t.left[i] + s.t.ahead[i]
    if size == "request":
        left = max(left, sum(s.t.left[j] for j in s.of_request(i) if s.t.stage[j] == P2D))
    time_left = s.t.deadline[i] - s.now
    if time_left <= 0:
        return math.inf
    if math.isinf(time_left) or math.isinf(s.path(i)):
        return 0.0
    return float(left / (time_left * (s.path(i) * (1 - rho))))


def red(deadlines: Sequence[float]) -> tuple[float, float]:
    """RED and the earliest loose deadline of one batch."""
    d = sorted(x for x in deadlines if math.isfinite(x))
    if not d:
        return math.inf, math.inf
    if len(d) == 1:
        return d[0], d[0]
    gaps = [d[k + 1] - d[k] for k in range(len(d) - 1)]
    cut = gaps.index(max(gaps)) + 1
    tight, loose = d[:cut], d[cut:]
    f = len(tight) / len(d)
    return tight[0] + (1 - f) * (loose[0] - tight[0]), loose[0]


def dense(keys: Sequence[float]) -> list[int]:
    distinct = sorted(set(keys))
    return [distinct.index(k) for k in keys]


# --- across requests ------------------------------------------------------------------------------------------------


Link = tuple[str, int]


def link_load(
    s: State, owner: Callable[[int], bool], unknown: float = math.inf, *, future: bool = False
) -> dict[Link, float]:
    """Seconds of each link that the transfers chosen by ``owner`` need: our devices, then the links into known peers.

    ``unknown``: what a device of unknown rate counts as. A peer's link of unknown rate is like the device before it.
    """
    out: dict[Link, float] = {("out", p): 0.0 for p in range(len(s.link.rate))}
    out |= {("in", p): 0.0 for p in sorted(set(s.t.peer.tolist())) if p >= 0}
    for i in s.rows():
        if owner(i):
            rate = s.rate(i) if math.isfinite(s.rate(i)) else unknown
            octets = s.waited_for(i) + (to_come(s, i) if future else 0.0)
            out["out", int(s.t.device[i])] += octets / rate
            if s.t.peer[i] >= 0:
                out["in", int(s.t.peer[i])] += octets / (s.far(i) if math.isfinite(s.far(i)) else rate)
    return out


def to_come(s: State, i: int) -> float:
    """Bytes of layers after the last one announced, each like that one: collectives of a batch, P2D of a request."""
    stage, batch, request = int(s.t.stage[i]), int(s.t.batch[i]), int(s.t.request[i])
    owner, column = (batch, s.t.batch) if stage == COLLECTIVE else (request, s.t.request)
    if stage not in (COLLECTIVE, P2D) or batch < 0 or owner < 0 or s.b.compute_done[batch]:
        return 0.0
    alike = [
        int(s.t.target_layer[j])
        for j in s.rows()
        if s.t.stage[j] == stage and column[j] == owner and s.t.batch[j] >= 0 and not s.b.compute_done[s.t.batch[j]]
    ]
    layer = int(s.t.target_layer[i])
    return float(s.t.size[i]) * max(int(s.b.layers[batch]) - 1 - layer, 0) if layer == max(alike) else 0.0


def compute_left(s: State, batch: int) -> float:
    layers = max(int(s.b.layers[batch]) - int(s.b.current_layer[batch]), 0) * float(s.b.layer_compute[batch])
    return max([0.0 if s.b.compute_done[batch] else layers, *(float(s.r.compute_left[q]) for q in s.members(batch))])


def rank_batches(s: State, *, robust: bool) -> list[int]:
    """Batches in the order of their urgency."""

    def key(batch: int) -> tuple[float, float, int]:
        deadlines = [float(s.r.deadline[q]) for q in s.members(batch)]
        urgency = red(deadlines)[0] if robust else min(deadlines, default=math.inf)
        return urgency, float(s.b.arrival[batch]), batch

    return sorted(range(len(s.b)), key=key)


def arrange(s: State, *, robust: bool, share: float) -> tuple[list[int], list[bool]]:
    """Rank of each batch and pruned requests (algorithm 1 of the paper). ``share``: drop budget, of live requests."""
    order = rank_batches(s, robust=robust)
    request_load = [
        link_load(s, lambda i: bool(s.t.request[i] == q), future=True)  # noqa: B023 (used at once)
        for q in range(len(s.r))
    ]
    budget = max(int(share * s.live), 1) if share else 0
    # Who was pruned stays so when its prefill has ended; the others are judged anew.
    pruned = [bool(budget and s.r.pruned[q] and s.r.batch[q] < 0) for q in range(len(s.r))]
    outside = {q for q in range(len(s.r)) if s.r.batch[q] < 0 and not s.r.pruned[q]}
    before = link_load(
        s,
        lambda i: int(s.t.request[i]) in outside or (s.t.request[i] < 0 and s.t.batch[i] < 0),
        future=True,
    )
    pool: list[int] = []
    for batch in order:
        mine = s.members(batch)
        loads = [request_load[q] for q in mine]
        loads.append(link_load(s, lambda i: bool(s.t.request[i] < 0 and s.t.batch[i] == batch), future=True))  # noqa: B023 (the same)
        total = {link: x + sum(load[link] for load in loads) for link, x in before.items()}
        pool += [q for q in mine if math.isfinite(s.r.deadline[q])]
        due_in = red([float(s.r.deadline[q]) for q in mine])[1] - s.now
        while sum(pruned) < budget and pool:
            worst = max(total, key=lambda link: total[link])
            if compute_left(s, batch) + total[worst] <= due_in:
                break
            victim = max(pool, key=lambda q: request_load[q][worst])
            if request_load[victim][worst] <= 0:
                break
            pool.remove(victim)
            pruned[victim] = True
            total = {link: x - request_load[victim][link] for link, x in total.items()}
        before = total
    return [order.index(b) for b in range(len(s.b))], pruned


# --- policies -------------------------------------------------------------------------------------------------------


def fresh(s: State, i: int) -> bool:
    return int(s.t.level[i]) in (NEW, NONE, SCAVENGER, BACK)


def may_change(s: State, i: int, p: Any) -> bool:
    if fresh(s, i):
        return True
    if not p.promotion:
        return False
    return bool(p.when == "tick") or bool(s.t.layer_started[i]) or not bool(s.t.computing[i])


def ladder(s: State, p: Any) -> list[int]:
    """DeadlineLadder; ``p`` gives the parameters."""
    base = 1 + p.early_levels if p.kv == "rli" else 1
    top_doomed = p.levels - p.doomed_levels
    edges = geometric(top_doomed - base, p.first_ms / 1e3, p.last_ms / 1e3)

    def given_up(i: int) -> bool:
        level = int(s.t.level[i])
        return top_doomed <= level < p.levels or level == SCAVENGER

    lost_rows = doomed(s, p.margin, given_up) if p.give_up else [False] * len(s.t)
    lost = doomed_requests(s, p.margin, given_up) if p.give_up else set()
    out = []
    for i in s.rows():
        stage, batch = s.t.stage[i], int(s.t.batch[i])
        odd = s.out_of_order(i)
        if odd is not None:
            out.append(odd)
            continue
        if stage == P2D and lost_rows[i]:
            work = sum(float(s.t.left[j]) for j in s.of_request(i)) / s.path(i)
            step = bucket(work, [p.doomed_first_ms / 1e3 * 2**k for k in range(p.doomed_levels)])
            out.append(top_doomed + step if step < p.doomed_levels else SCAVENGER)
            continue
        if stage == COLLECTIVE:
            want = 0
        elif stage == KV and p.kv == "rli":
            want = min(max(rli(s, i), 1), p.early_levels)
        else:
            due = float(s.t.deadline[i])
            if stage == KV and batch >= 0:
                due = min((float(s.r.deadline[q]) for q in s.members(batch) if q not in lost), default=math.inf)
            want = base + bucket(due - s.now, edges)
        keeps = not may_change(s, i, p) and not given_up(i)
        out.append(int(s.t.level[i]) if keeps else want)
    return out


def mfs(s: State, p: Any) -> list[int]:
    """Mfs with ``p``'s parameters, for the layouts that are written out below."""
    early_levels, late_levels = LAYOUTS[p.levels, p.arbitration, p.p1, p.red_classes or (0 if p.red else 1)]
    classes = len(early_levels[0])
    thresholds = [p.upper * p.ratio ** -(p.origin + k) for k in range(len(late_levels) - 1)]
    lost = doomed(s, p.margin, lambda i: s.t.level[i] == SCAVENGER)
    computing = sorted((int(s.b.rank[b]), b) for b in range(len(s.b)) if not s.b.compute_done[b])
    red_class = {b: k * classes // len(computing) for k, (_, b) in enumerate(computing)}
    out = []
    for i in s.rows():
        stage, old = int(s.t.stage[i]), int(s.t.level[i])
        pruned = p.pruning and s.t.request[i] >= 0 and bool(s.r.pruned[s.t.request[i]])
        demoted = pruned and (stage == P2D or (stage == KV and p.prune_early))
        demoted |= stage == P2D and p.late_infeasible == "scavenger" and lost[i]
        odd = s.out_of_order(i)
        if odd is not None:
            out.append(odd)
        elif demoted:
            out.append(SCAVENGER)
        elif not may_change(s, i, p):
            out.append(old)
        elif stage == P2D:
            step = len(late_levels) - 1
            if p.mlu:
                value = mlu(s, i, p.size, rho_of(s, i, p))
                step = next((k for k, q in enumerate(thresholds) if value >= q), step)
            out.append(late_levels[step] if fresh(s, i) else min(old, late_levels[step]))
        else:
            step = rli(s, i) if p.rli else int(stage == KV)
            if not fresh(s, i):
                step = min(step, max(k for k in range(len(early_levels)) if k == 0 or early_levels[k][0] <= old))
            step = min(step, len(early_levels) - 1)
            out.append(early_levels[step][red_class.get(int(s.t.batch[i]), classes - 1)])
    return out


LAYOUTS: dict[tuple[int, str, bool, int], tuple[list[list[int]], list[int]]] = {
    (8, "ladder", True, 0): ([[1], [2], [3]], [0, 4, 5, 6, 7]),
    (13, "ladder", True, 0): ([[1, 2], [3, 4], [5, 6]], [0, 7, 8, 9, 10, 11, 12]),
    (13, "ladder", True, 1): ([[1], [2], [3], [4], [5], [6]], [0, 7, 8, 9, 10, 11, 12]),
    (13, "ladder", False, 0): ([[0, 1], [2, 3], [4, 5]], [6, 7, 8, 9, 10, 11, 12]),
    (13, "ladder", False, 3): ([[0, 1, 2], [3, 4, 5]], [6, 7, 8, 9, 10, 11, 12]),
    (13, "level", True, 0): ([[1, 2], [4, 5], [7, 8], [10, 11]], [0, 3, 6, 9, 12]),
    (13, "shared", True, 0): ([[k] for k in range(1, 13)], list(range(13))),
}
"""Levels, arbitration, P1, RED classes (0: as many as fit) -> level of each early step and class, and of each late step
(P1 first if there is one), written down from the pictures in mfsd/policy/mfs/layout.py."""


def rho_of(s: State, i: int, p: Any) -> float:
    if p.rho == "none":
        return 0.0
    if p.rho == "all":
        return min(float(s.link.load[s.t.device[i]]), 0.99)
    level = p.levels - 1 if fresh(s, i) else int(s.t.level[i])
    return min(float(s.link.load_above[s.t.device[i], min(level, p.levels)]), 0.99)
