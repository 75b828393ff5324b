# SPDX-License-Identifier: Apache-2.0
"""A calm host does not decide at each tick; whatever comes in is decided at once all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.harness import Host, peer

from mfsd.engine.settings import TenantsConfig
from mfsd.ground.model import INF, CookieSelector, MarkHint, Mode, Stage
from mfsd.policy.demand_bound.calm import MOST_S
from mfsd.policy.registry import DEFAULT, make_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from support.harness import FakeSocket

MB = 1_000_000
TICK = 0.01


class Twin(Host):
    """One that decides at each tick, or one that need not."""

    def __init__(self, *, each: bool) -> None:
        super().__init__(DEFAULT, slots=16)
        self.each = each
        self.socks: list[FakeSocket] = [self.socket(n) for n in range(1, 5)]
        self.decided = 0
        for n, sock in enumerate(self.socks[:2]):
            self.request(f"r{n}", 20.0 + n)
            self.transfer(f"t{n}", sock, 100 * MB, request=f"r{n}")
        for _ in range(3):
            self.tick(TICK)

    def tick(self, after: float = 0.0) -> None:
        if self.each:
            self.engine.steering.calm.until = 0.0
        until = self.engine.calm_until
        super().tick(after)
        self.decided += self.engine.calm_until != until or not until

    @property
    def shown(self) -> tuple[list[int], list[int], dict[int, float]]:
        """What the kernel is told, and the levels that are shown to people."""
        high = self.table.high
        level = self.engine.books.transfers.live("level").tolist()
        return self.table.band[:high].tolist(), level, self.device.guaranteed


def _mark(host: Host, sock: FakeSocket, stage: Stage) -> None:
    host.engine.apply(host.session, MarkHint(CookieSelector(sock.cookie), stage), host.now)


def _loaded(host: Host, band: int) -> None:
    host.device.estimator.band_load[band] = 0.9


def _collectives(host: Host) -> None:
    for _ in range(100):
        host.device.estimator.pauses.observe(0.9, 1.0, TICK)


COMES: dict[str, Sequence[Callable[[Twin], object]]] = {
    "a transfer that is due at once": (
        lambda h: h.request("s", 0.3),
        lambda h: h.transfer("u", h.socks[2], 20 * MB, request="s"),
    ),
    "one behind another": (
        lambda h: h.request("s", 0.3),
        lambda h: h.transfer("u", h.socks[0], 20 * MB, request="s"),
    ),
    "one of several connections": (lambda h: h.transfer("u", peer(h.socks[2]), MB, Stage.P2D, "r0"),),
    "a cancellation": (lambda h: h.done("t0", cancelled=True),),
    "the word that all is written": (lambda h: h.send(h.socks[0], 100 * MB), lambda h: h.done("t0")),
    "an earlier deadline": (lambda h: h.request("r0", 0.9),),
    "compute": (lambda h: h.request("r0", 1.0, compute_left=0.99),),
    "a mark": (
        lambda h: _mark(h, h.socks[3], Stage.COLLECTIVE),
        lambda h: h.tick(),
        lambda h: h.send(h.socks[3], MB),
    ),
    "a mark of what is known": (lambda h: _mark(h, h.socks[0], Stage.COLLECTIVE),),
    "arrival": (lambda h: h.send(h.socks[0], 100 * MB + 2),),
    "a reset": (lambda h: h.kernel.close(h.socks[0], clean=False),),
    "the end of the session": (lambda h: h.engine.end_session(h.session, h.now),),
    "another policy": (lambda h: h.engine.steering.change_policy(make_policy("edf", 5)),),
    "a pause": (lambda h: h.engine.pause(),),
    "observation": (lambda h: h.engine.set_mode(Mode.OBSERVE),),
    "load": (lambda h: _loaded(h, h.bands.default.index),),
    "collectives": (_collectives,),
    "a slower link": (lambda h: setattr(h.device.estimator, "measured", 8e6),),
    "the end of floors": (lambda h: setattr(h.device, "floors", False),),
    "a slower peer": (lambda h: h.connections.peers.saw(0, 5e6, h.now),),
}
SEEN = COMES.keys() - {"a slower peer", "compute", "a pause", "the end of floors"}
"""What changes something of what is shown."""


@pytest.mark.parametrize("what", COMES)
def test_what_comes_in_is_decided_at_once(what: str) -> None:
    calm, each = Twin(each=False), Twin(each=True)
    for _ in range(3):
        for host in (calm, each):
            for sock in host.socks[:2]:
                host.send(sock, 10_000)
            host.tick(TICK)
    assert calm.engine.calm_until > calm.now
    assert calm.shown == each.shown
    before = calm.shown
    for host in (calm, each):
        for step in COMES[what]:
            step(host)
        host.tick(TICK)
    assert calm.shown == each.shown
    for host in (calm, each):
        host.tick(TICK)
    assert calm.shown == each.shown
    if what in SEEN:
        assert calm.shown != before


def test_a_calm_host_decides_rarely() -> None:
    host = Twin(each=False)
    before = host.decided
    for _ in range(100):
        host.send(host.socks[0], 10_000)
        host.tick(TICK)
    assert 100 * TICK / MOST_S <= host.decided - before <= 20


def test_who_stands_still_is_promoted_no_later_than_a_tick_or_two_after_that() -> None:
    calm, each = Twin(each=False), Twin(each=True)
    when: list[float] = []
    for host in (calm, each):
        while host.shown[1][0] >= 4:
            host.tick(TICK)
        when.append(host.now)
    assert when[1] <= when[0] <= when[1] + 2 * TICK


def test_a_tenant_beyond_its_budget_is_demoted_when_it_is() -> None:
    host = Twin(each=False)
    host.engine.set_limits(host.engine.carriage.limits, host.engine.rescuer.config, TenantsConfig(urgent_share=0.01))
    _mark(host, host.socks[3], Stage.COLLECTIVE)
    for _ in range(3):
        host.tick(TICK)
    slot = host.keys.cookies[4]
    assert host.table.band[slot] < host.bands.default.index
    for _ in range(100):
        host.send(host.socks[3], MB)
        host.tick(TICK)
    assert host.table.band[slot] == host.engine.steering.urgency.below


def test_no_image_is_that_of_other_values() -> None:
    host = Twin(each=False)
    transfers = host.engine.books.transfers
    before = transfers.image()
    transfers.live("hold_until")[0] = INF if np.isfinite(transfers.live("hold_until")[0]) else 1.0
    assert transfers.image() != before
