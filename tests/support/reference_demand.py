# SPDX-License-Identifier: Apache-2.0
"""The demand-bound policy again, one row at a time in plain Python, given who is lost; see reference.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from support.reference import COLLECTIVE, KV, P2D, SCAVENGER, State
from support.reference_links import SHORTEST, Demand, Link

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST, MOSTLY, WIRE = 0.02, 0.8, 1.05
DOUBT = 10.0
CROWD, REST = 32, 16
FIRST_S, STAYS_FIRST, NEXT_S, NEAR_S, HOLD, HELD_S = 0.02, 3.0, 0.01, 0.1, 0.7, 0.25


class Plain:
    """The policy; ``lost``: who can't be in time, requests and transfers without one."""

    def __init__(self, s: State, p: Any, lost: tuple[set[int], set[int]]) -> None:
        self.s, self.p, (self.lost_requests, self.lost_alone) = s, p, lost
        self.due = self._due()
        self.room = [1.0 - float(x) for x in s.link.taken]
        rates = zip(s.link.rate, self.room, s.link.packet, strict=True)
        devices = [Link(float(rate) or math.inf, room, float(packet)) for rate, room, packet in rates]
        for i in self._waiting():
            devices[s.t.device[i]].rows[i] = self.due[i], float(s.t.left[i])
        self.here = [Demand(link, p) for link in devices]
        self.there = self._peers()
        self.promised_here = [self._promised(d) for d in self.here]
        self.promised_there = {peer: self._promised(d) for peer, d in self.there.items()}

    def lost(self, i: int) -> bool:
        return int(self.s.t.request[i]) in self.lost_requests or i in self.lost_alone

    def greedy(self, i: int) -> bool:
        """More than an equal share of a device on which a third, and four at least, are lost."""
        device = self.s.t.device[i]
        if not self.lacking(device, 4, 1 / 3):
            return False
        equal = self.here[device].link.rate / sum(self.s.t.device[j] == device for j in self.s.rows())
        return bool(float(self.s.t.left[i]) / equal > self.due[i])

    def lacking(self, device: int, count: int, share: float) -> bool:
        """So many stage-3 transfers of a device are lost, and such a share of all that it has, and of their work."""
        mine = [j for j in self.s.rows() if self.s.t.device[j] == device]
        late = [j for j in mine if self.s.t.stage[j] == P2D]
        gone = [j for j in late if self.lost(j)]
        work, lost = (sum(float(self.s.t.left[j]) for j in some) for some in (late, gone))
        return len(gone) >= max(count, len(mine) * share) and lost >= share * work

    def _promised(self, of: Demand) -> Demand:
        """The same without the greedy."""
        rows = {i: asks for i, asks in of.link.rows.items() if not self.greedy(i)}
        return Demand(Link(of.link.rate, of.link.room, of.link.packet, rows), self.p)

    def _waiting(self) -> list[int]:
        return [i for i in self.s.rows() if math.isfinite(self.due[i])]

    def layer_s(self, i: int) -> float:
        batch = int(self.s.t.batch[i])
        known = batch >= 0 and not self.s.b.compute_done[batch]
        return float(self.s.b.layer_compute[batch]) if known else 0.0

    def _own_due(self, i: int) -> float:
        s = self.s
        stage, batch = int(s.t.stage[i]), int(s.t.batch[i])
        own = math.inf if self.lost(i) else float(s.t.deadline[i]) - s.now
        if stage == P2D:
            return own
        if stage != KV:
            return math.inf
        first = [float(s.r.deadline[q]) - s.now for q in s.members(batch) if q not in self.lost_requests]
        after = max(int(s.b.layers[batch]) - int(s.t.target_layer[i]), 0) * self.layer_s(i) if batch >= 0 else 0.0
        return min([own, *(first if batch >= 0 else [])]) - after

    def _due(self) -> list[float]:
        """Seconds left for itself and for who is at or behind its place on its connection."""
        t, own = self.s.t, [self._own_due(i) for i in self.s.rows()]
        place = t.ahead.astype(np.float32)
        return [
            min(
                own[j]
                for j in self.s.rows()
                if j == i or (t.conn[i] >= 0 and t.conn[j] == t.conn[i] and place[j] >= place[i])
            )
            for i in self.s.rows()
        ]

    def _peers(self) -> dict[int, Demand]:
        """Links into peers that need enough to matter."""
        s, links = self.s, dict[int, Link]()
        for i in self._waiting():
            if math.isfinite(s.far(i)):
                link = links.setdefault(int(s.t.peer[i]), Link(s.far(i), 1.0))
                link.rows[i] = self.due[i], float(s.t.left[i])
        for link in links.values():
            link.packet = float(s.link.packet[max(s.t.device[i] for i in link.rows)])
        calm = HOLD * self.p.defer_until
        return {
            peer: Demand(link, self.p)
            for peer, link in links.items()
            if sum(octets for _, octets in link.rows.values())
            > calm * link.rate * min(seconds for seconds, _ in link.rows.values())
        }

    def links(self, i: int) -> list[Demand]:
        far = self.there.get(int(self.s.t.peer[i]))
        return [self.here[self.s.t.device[i]], *([far] if far is not None and i in far.link.rows else [])]

    def need(self, i: int) -> float:
        return max(d.need(i) for d in self.links(i))

    def was(self, i: int, *names: str) -> bool:
        return int(self.s.t.level[i]) in {getattr(self.p.layout, name) for name in names}

    def late(self, i: int) -> bool:
        here, far = self.s.t.device[i], self.promised_there.get(int(self.s.t.peer[i]))
        links = [d for d in (self.promised_here[here], far) if d is not None and i in d.link.rows]
        return any(d.is_late(i) or (self.was(i, "urgent") and d.is_late(i, 2.0)) for d in links)

    def among(self, i: int, seconds: float, longer: float, *levels: str) -> bool:
        """Among the first: of its device, until ``longer`` from these levels, or of a scarcer link into its peer."""
        here, *far = self.links(i)
        stays = self.was(i, *levels) and here.before(i, well=True) < longer
        return here.before(i) < seconds or stays or any(d.before(i) < seconds for d in far if d.need(i) > here.need(i))

    def needs(self, i: int) -> bool:
        if math.isinf(self.due[i]) or self.s.t.stage[i] not in (KV, P2D):
            return False
        held = self.was(i, "urgent", "first", "others")
        least = self.p.defer_until * (HOLD if held else 1.0)
        return self.need(i) >= least or self.late(i) or (held and self.laxity(i) < HELD_S)

    def laxity(self, i: int) -> float:
        return min(d.laxity(i) for d in self.links(i))

    def layer_need(self, i: int) -> float:
        """Share of its device that it and stage 1 due before it need to be there when their layers start."""
        s, rows = self.s, {}
        for j in self._waiting():
            if s.t.stage[j] == KV and self.layer_s(j) > 0 and s.t.device[j] == s.t.device[i]:
                layers = max(int(s.t.target_layer[j]) - int(s.t.current_layer[j]) - 1, 0)
                rows[j] = layers * self.layer_s(j), float(s.t.left[j])
        if i not in rows:
            return 0.0
        here = self.here[s.t.device[i]].link
        return Demand(Link(here.rate, 1.0, here.packet, rows), self.p).need(i)

    def crowd(self, i: int, among: Callable[[int], bool], *was: str) -> bool:
        """Very many connections of its device carry transfers of which this holds; fewer will do for who was there."""
        t = self.s.t
        mine = {int(t.conn[j]) for j in self.s.rows() if t.device[j] == t.device[i] and t.conn[j] >= 0 and among(j)}
        return self.s.link.collectives[t.device[i]] <= 0 and len(mine) >= (REST if self.was(i, *was) else CROWD)

    def level(self, i: int) -> int:
        s, p, lay = self.s, self.p, self.p.layout
        odd = s.out_of_order(i)
        if odd is not None:
            return odd
        if s.t.stage[i] == COLLECTIVE:
            return int(lay.collective)
        held_back_for = s.now - float(s.t.created[i])
        default = p.max_defer_kv_s if s.t.stage[i] == KV else p.max_defer_p2d_s
        longest = float(s.t.max_defer[i]) if math.isfinite(s.t.max_defer[i]) else default
        level = self._by_need(i)
        return int(lay.others) if level >= lay.deferred and held_back_for >= longest else level

    def _by_need(self, i: int) -> int:
        s, lay = self.s, self.p.layout
        if self.lost(i) and s.t.stage[i] == P2D:
            return SCAVENGER
        if self._open(i):
            return int(lay.others)
        if math.isfinite(self.due[i]):
            if self._urgent(i) and not self.crowd(i, self._urgent, "others"):
                return int(lay.urgent)
            if self._above(i):
                return int(lay.first if self._first(i) and not self.crowd(i, self._first, "others") else lay.others)
        return self._deferred(i)

    def _open(self, i: int) -> bool:
        return self.s.t.stage[i] in (KV, P2D) and math.isinf(self.due[i]) and not self.lost(i)

    def _urgent(self, i: int) -> bool:
        return self.needs(i) and self.late(i) and self.among(i, NEXT_S, NEXT_S, "urgent")

    def _above(self, i: int) -> bool:
        s, p = self.s, self.p
        if math.isinf(self.due[i]):
            return False
        needs = self.needs(i) or self._near(i) or self.layer_need(i) >= p.defer_until
        return needs or math.isinf(s.rate(i)) or self._in_crowd(i)

    def _near(self, i: int) -> bool:
        """Unless it has had what it needs where it waits, beside collectives that never pause."""
        t, lay = self.s.t, self.p.layout
        had = lay.deferred <= int(t.level[i]) < self.p.levels and not self.greedy(i) and t.stage[i] in (KV, P2D)
        return self.laxity(i) < NEAR_S and not (had and self.s.link.collectives[t.device[i]] >= MOSTLY)

    def _first(self, i: int) -> bool:
        among = math.isfinite(self.due[i]) and self.among(i, FIRST_S, STAYS_FIRST * FIRST_S, "urgent", "first")
        return among and bool(self.s.t.stage[i] != KV) and self._above(i)

    def _in_crowd(self, i: int) -> bool:
        def waits(j: int) -> bool:
            return math.isfinite(self.due[j]) and int(self.s.t.stage[j]) in (KV, P2D)

        return waits(i) and self.crowd(i, waits, "first", "others")

    def _deferred(self, i: int) -> int:
        lay, levels = self.p.layout, self.p.levels
        need = self.need(i) if math.isfinite(self.due[i]) else 0.0
        edges = [self.p.defer_until / 2**k for k in range(1, levels - lay.deferred)]
        rising = lay.deferred + sum(need < e for e in edges)
        falling = lay.deferred + sum(need < HOLD * e for e in edges)
        old = int(self.s.t.level[i])
        return int(min(max(old, falling), rising)) if lay.deferred <= old < levels else int(rising)

    def guarantee(self, levels: list[int]) -> list[list[float]]:
        """Shares of the rate by device and level."""
        return [self._on(d, levels) for d in range(len(self.here))]

    def _on(self, device: int, levels: list[int]) -> list[float]:
        s, p, lay = self.s, self.p, self.p.layout
        mine = [i for i in s.rows() if s.t.device[i] == device]
        overdue = [i for i in mine if levels[i] == lay.others and self._held_back(i)]
        needy = [i for i in mine if i not in overdue and self.needs(i) and levels[i] < lay.deferred]
        asks = {levels[i] for i in needy}
        first, others = (
            min((self.due[i] for i in needy if levels[i] == at), default=math.inf) for at in (lay.first, lay.others)
        )
        total, average, rush = self._shares(device)
        out, left = [0.0] * p.levels, max(1.0 - float(s.link.floor[device]), 0.0)

        def give(level: int, share: float) -> None:
            nonlocal left
            share = min(max(share, 0.0), left)
            out[level] += share
            left -= share

        if lay.urgent in asks:
            give(lay.urgent, p.headroom * max(rush, self._evenly(device, levels)) if rush > 0.0 else 0.0)
        short = self.lacking(device, 2, 1 / 4)
        most = min(p.most, p.most_short) if short else p.most
        if rush > 0.0 and lay.urgent not in asks:
            most = 1.0
        rest = min(p.headroom * total, self._most(device, most), self._beside(device, average, rush)) - out[lay.urgent]
        if min(first, others) < math.inf:
            leads = lay.first if first <= others else lay.others
            moving = self._moving(mine, levels, rest) if leads == lay.first else 0.0
            give(leads, rest - moving)
            give(lay.others, moving)
        if overdue:
            give(lay.others, p.overdue_share)
        collectives = s.link.collectives[device]
        plain = s.link.unhinted[device] >= LEAST and collectives <= 0
        waiting = [i for i in mine if lay.deferred <= levels[i] < p.levels and self._waits(i) and not plain]
        sure = {i for i in waiting if DOUBT * self.need(i) > 1.0 and not self.greedy(i)}
        for wait in range(lay.deferred, p.levels) if plain or collectives >= MOSTLY else ():
            some = [i for i in mine if levels[i] == wait and self._waits(i)]
            fit = [i for i in some if plain or DOUBT * self.need(i) <= 1.0]
            steady = max((self._calm(i, device) for i in some if i in sure), default=0.0) * p.headroom
            if len({int(s.t.conn[i]) for i in sure if s.t.conn[i] >= 0}) >= CROWD and any(i in sure for i in some):
                steady = max(steady, p.defer_until)
            doubt = min(max((self._doubt(i) for i in fit), default=0.0), p.defer_until)
            give(wait, max(doubt, min(steady, most) - sum(out)))
        opened = any(self._open(i) for i in mine)
        for known in range(lay.first, lay.others + 1):
            if s.link.unannounced[device][known] or (opened and known == lay.others):
                give(known, min(most - sum(out), self._fair(device)))
        return out

    def _most(self, device: int, most: float) -> float:
        busy = self.s.link.collectives[device] >= MOSTLY and not self.lacking(device, 2, 1 / 4)
        return 1.0 if busy else most

    def _moving(self, mine: list[int], levels: list[int], rest: float) -> float:
        """Of the rest, for those who wait for those due first, beside collectives that never pause."""
        device, lay = self.s.t.device[mine[0]], self.p.layout
        waiting = any(self._waits(i) and levels[i] == lay.others for i in mine)
        if self.s.link.collectives[device] < MOSTLY or not waiting:
            return 0.0
        here = self.here[device].link
        first = {i: here.rows[i] for i in mine if self._waits(i) and levels[i] == lay.first}
        alone = Demand(Link(here.rate, here.room, here.packet, first), self.p)
        return min(max(rest - 1.25 * max((alone.need(i, 2.0) for i in first), default=0.0), 0.0), 0.2)

    def _evenly(self, device: int, levels: list[int]) -> float:
        """Who is urgent has as much as everybody else who is, until it has all."""
        t, lay, rate = self.s.t, self.p.layout, self.here[device].link.rate
        urgent = [i for i in self.s.rows() if levels[i] == lay.urgent and t.device[i] == device and self._waits(i)]
        work = {i: float(t.left[i]) / rate for i in urgent}
        until = {i: sum(min(work[i], w) for w in work.values()) for i in urgent}
        return max((until[i] / max(self.due[i], SHORTEST) for i in urgent), default=0.0)

    def _calm(self, i: int, device: int) -> float:
        """With twice the margin."""
        return max(self.need(i), min(self.here[device].need(i, 2.0), float(self.p.defer_until)))

    def _doubt(self, i: int) -> float:
        """If ten times as much was meant as was said."""
        t, here = self.s.t, self.here[self.s.t.device[i]]
        seconds = self.due[i] * (1 - float(self.p.margin_share)) - here.fixed
        rest = DOUBT * float(t.size[i]) - max(float(t.size[i] - t.left[i]), 0.0)
        own = rest / here.link.rate / seconds if seconds > 0 else 0.0
        return max(DOUBT * self.need(i), own)

    def _waits(self, i: int) -> bool:
        return math.isfinite(self.due[i]) and self.s.t.stage[i] in (KV, P2D)

    def _beside(self, device: int, average: float, rush: float) -> float:
        """What is enough beside collectives that pause, the time of one of which and its pause is 1 without it."""
        link = self.s.link
        room, work = max(1.0 - float(link.taken[device]), LEAST), float(link.collectives[device])
        spare = room - WIRE * average * (1.0 + (float(self.p.headroom) - 1.0) * work**2)
        if not 0.0 < work < MOSTLY or spare <= LEAST or rush > 0.0:
            return math.inf
        slowed = work / spare - (1.0 - work)
        return max(room - work / max(slowed, LEAST), 0.0) / WIRE

    def _fair(self, device: int) -> float:
        """With it KV has on average 97 % of what it has by plain sharing with collectives, if they pause too little."""
        work, half = float(self.s.link.collectives[device]), float(self.p.defer_until)
        if work == 0.0 or work >= MOSTLY:
            return half
        wanted, low, high = 0.97 / (1.0 + work), 0.0, 1.0
        for _ in range(60):
            share = (low + high) / 2
            enough = 1.0 - work / (work / (1.0 - share) + 1.0 - work) >= wanted
            low, high = (low, share) if enough else (share, high)
        return min(high, half) if high > 1e-9 else 0.0

    def _held_back(self, i: int) -> bool:
        return self.s.t.stage[i] in (KV, P2D) and self._by_need(i) >= self.p.layout.deferred

    def _shares(self, device: int) -> tuple[float, float, float]:
        here = self.promised_here[device]
        far = [self.promised_there[peer] for peer, d in self.there.items() if self._leads(d) == device]

        def together(share: Callable[[Demand], float]) -> float:
            return min(sum(min(share(d), 1.0) * d.link.rate for d in far) / here.link.rate, 1.0)

        most = max(here.steady(), here.rush())
        near = any(g.due - g.total / here.link.room < HELD_S for g in here.groups.values())
        own = most if most >= HOLD * self.p.defer_until or near else 0.0
        total = max(own, together(lambda d: max(d.steady(), d.rush())))
        average = max(here.average(), together(lambda d: d.average()))
        return total, average, max(here.rush(), together(lambda d: d.rush()))

    def _leads(self, far: Demand) -> int:
        """Device that leads to a peer: the last one, where several do."""
        return int(max(self.s.t.device[i] for i in far.link.rows))
