# SPDX-License-Identifier: Apache-2.0
"""What connections sent before their first hint is let out of the default band, and only that."""

from __future__ import annotations

import pytest
from support.harness import MSS, FakeSocket, Host

from mfsd.engine.beginnings import PATIENT_S
from mfsd.engine.rescue import DRAIN

MORE = 800_000
"""Bytes that the process has written and TCP not handed down."""


def hinted(h: Host, sent: int = 10 * MSS) -> FakeSocket:
    """A connection whose first bytes were faster than its hint."""
    s = h.socket(1)
    h.send(s, sent, acked=False)
    s.notsent = MORE
    s.unsent_plus_unacked += MORE
    h.request("r1", 0.2)
    h.transfer("t1", s, 1_000_000, request="r1")
    return s


def let_out(h: Host, seconds: float) -> float:
    """The most that the default band is given meanwhile."""
    most = 0.0
    for _ in range(round(seconds / 0.002)):
        h.tick(0.002)
        most = max(most, h.device.guaranteed.get(h.bands.default.index, 0.0))
    return most


def test_what_was_faster_than_the_hint_is_let_out_until_the_connection_sends_again() -> None:
    h = Host("demand-bound")
    h.device.queued[h.bands.default.index, 0] = 10 * MSS
    s = hinted(h)
    assert let_out(h, 0.02) == DRAIN
    assert sum(h.device.guaranteed.values()) <= 1.0
    h.ack(s, 10 * MSS)
    h.send(s, MSS)
    h.tick(0.002)
    assert let_out(h, 0.02) < DRAIN
    assert h.device.purged == []


def test_no_longer_than_a_while() -> None:
    """Others may have filled the band: what is before it there can't be told."""
    h = Host("demand-bound")
    h.device.queued[h.bands.default.index, 0] = 1_000_000
    hinted(h)
    assert let_out(h, PATIENT_S) == DRAIN
    h.tick(0.01)
    assert let_out(h, 0.5) < DRAIN


@pytest.mark.parametrize("why", ["the band is empty", "it is served", "nothing was sent", "no floors", "it sends"])
def test_not_where_there_is_no_need(why: str) -> None:
    h = Host("demand-bound")
    default = h.bands.default.index
    h.device.queued[default, 0] = 0 if why == "the band is empty" else 10 * MSS
    h.device.estimator.band_load[default] = 0.5 if why == "it is served" else 0.0
    h.device.floors = why != "no floors"
    s = hinted(h, 0 if why == "nothing was sent" else 10 * MSS)
    if why == "it sends":
        h.ack(s, 10 * MSS)
        h.send(s, MSS)
    if why == "it is served":
        assert let_out(h, 0.01) < DRAIN
        h.ack(s, 10 * MSS)
    assert let_out(h, 0.2) < DRAIN


def test_one_packet_that_has_stayed_behind_holds_up_all_that_has_overtaken_it() -> None:
    """A tail loss probe, ten milliseconds behind the first window: TCP sends nothing new before that is out."""
    h = Host("demand-bound")
    default = h.bands.default.index
    h.device.queued[default, 0] = 150_000
    h.device.estimator.band_load[default] = 0.9  # as it was before the hint
    s = hinted(h, 11 * MSS)
    assert let_out(h, 0.01) < DRAIN
    h.ack(s, 10 * MSS)
    h.send(s, 44 * MSS, acked=False)
    assert let_out(h, 0.03) == DRAIN
    h.ack(s, 45 * MSS)
    h.send(s, MSS)
    h.tick(0.002)
    assert let_out(h, 0.02) < DRAIN
    assert h.device.purged == []
