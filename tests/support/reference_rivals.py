# SPDX-License-Identifier: Apache-2.0
"""The rivals again, one row at a time in plain Python; see reference.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from support.reference import BACKGROUND, COLLECTIVE, P2D, SCAVENGER, State, bucket, dense, doomed, geometric, link_load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def size_class(s: State, value: float, classes: int, p: Any) -> int:
    """Classes with equally many of the sizes seen, or geometric ones; on several edges at once: in their middle."""
    if p.low_kb:
        edges = geometric(classes, p.low_kb * 1024, p.high_kb * 1024)
    else:
        edges = [quantile(sorted(s.sizes), k / classes) for k in range(1, classes)]
    return (sum(e < value for e in edges) + sum(e <= value for e in edges)) // 2


def quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def by_size(s: State, p: Any) -> list[int]:
    value = {"sjf": lambda i: s.t.size[i], "srpt": lambda i: s.t.left[i], "pias": lambda i: s.t.size[i] - s.t.left[i]}
    keys = [float(value[p.name](i)) for i in s.rows()]
    levels = [min(k, p.levels - 1) for k in dense(keys)] if p.exact else [size_class(s, k, p.levels, p) for k in keys]
    return placed(s, levels)


def placed(s: State, levels: Sequence[int]) -> list[int]:
    """These levels, but for what every policy treats alike."""
    odd = [s.out_of_order(i) for i in s.rows()]
    return [level if other is None else other for level, other in zip(levels, odd, strict=True)]


def earliest_of_batch(s: State, batch: int, key: Callable[[int], float]) -> float:
    return min((key(q) for q in s.members(batch)), default=math.inf) if batch >= 0 else math.inf


def edf(s: State, p: Any) -> list[int]:
    ordered = p.levels if p.everything else p.levels - 1
    edges = [p.first_ms / 1e3 * p.factor**k for k in range(ordered - 1)]
    out = []
    for i in s.rows():
        due = float(s.t.deadline[i])
        if p.everything and math.isinf(due):
            due = earliest_of_batch(s, int(s.t.batch[i]), lambda q: float(s.r.deadline[q]))
        explicit = s.t.stage[i] == P2D or (s.t.stage[i] == COLLECTIVE and math.isfinite(due))
        out.append(bucket(due - s.now, edges) if explicit or p.everything else p.levels - 1)
    return placed(s, out)


def karuna(s: State, p: Any) -> list[int]:
    out = []
    for i in s.rows():
        time_left = float(s.t.deadline[i]) - s.now
        if s.t.stage[i] == P2D and 0 < time_left < math.inf:
            fair_share_of_time = time_left / (float(s.t.deadline[i]) - float(s.t.created[i]))
            out.append(0 if s.t.left[i] / s.t.size[i] > fair_share_of_time else p.levels - 1)
        else:
            out.append(1 + size_class(s, float(s.t.size[i]), p.levels - 2, p))
    return placed(s, out)


def llf(s: State, p: Any) -> list[int]:
    lost = doomed(s)
    laxity = []
    for i in s.rows():
        own = s.t.left[i] + s.t.ahead[i]
        if s.t.stage[i] == P2D:
            own = max(own, sum(s.t.left[j] for j in s.of_request(i) if s.t.stage[j] == P2D))
            due = float(s.t.deadline[i])
        elif s.t.batch[i] >= 0:
            due = earliest_of_batch(s, int(s.t.batch[i]), lambda q: float(s.r.deadline[q] - s.r.compute_left[q]))
        else:
            due = float(s.t.deadline[i] - s.t.compute_left[i])
        laxity.append(due - own / s.path(i) - s.now)
    quantum = p.quantum_ms / 1e3
    steps = [math.floor(x / quantum) if math.isfinite(x) else x for x in laxity]
    ranks = dense(steps)
    out = []
    for i in s.rows():
        doomed_p2d = p.give_up and s.t.stage[i] == P2D and lost[i]
        out.append(SCAVENGER if doomed_p2d else min(ranks[i], p.levels - 1))
    return placed(s, out)


def sincronia_order(demand: Sequence[Sequence[float]]) -> list[int]:
    """Order of coflows by bottleneck-select-scale-iterate, first to last, unit weights."""
    weight = dict.fromkeys(range(len(demand)), 1.0)
    order: list[int] = []
    while weight:
        link = max(range(len(demand[0])), key=lambda u: sum(demand[c][u] for c in weight))
        if sum(demand[c][link] for c in weight) <= 0:
            last = min(weight)
        else:
            last = min((c for c in weight if demand[c][link] > 0), key=lambda c: weight[c] / demand[c][link])
            paid = weight[last] / demand[last][link]
            weight = {c: w - paid * demand[c][link] for c, w in weight.items()}
        del weight[last]
        order.insert(0, last)
    return order


def sincronia(s: State, p: Any) -> list[int]:
    """Position of each transfer's coflow, at most the last level."""

    def coflow(i: int) -> tuple[int, int, int]:
        stage, request, batch = (int(x[i]) for x in (s.t.stage, s.t.request, s.t.batch))
        whose = request if request >= 0 and stage != COLLECTIVE else -2 - batch
        return stage, whose, -1 if stage == P2D else int(s.t.target_layer[i])

    names = sorted({coflow(i) for i in s.rows() if s.t.stage[i] != BACKGROUND})
    loads = [link_load(s, lambda i: coflow(i) == name, unknown=1.0) for name in names]  # noqa: B023 (used at once)
    order = sincronia_order([list(load.values()) for load in loads]) if names else []
    position = {names[c]: k for k, c in enumerate(order)}
    return placed(s, [min(position.get(coflow(i), 0), p.levels - 1) for i in s.rows()])
