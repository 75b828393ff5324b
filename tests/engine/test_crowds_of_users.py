# SPDX-License-Identifier: Apache-2.0
"""Very many transfers of one user while another has some, too: what a tick does for them is bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.crowds import crowd

from mfsd.engine import views
from mfsd.engine.endings import ROOM, ROOM_BESIDE
from mfsd.engine.views import BESIDE, PICK_S, Shown
from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import CookieSelector, RequestHint, Stage, TransferHint

if TYPE_CHECKING:
    import pytest
    from support.harness import Host

    from mfsd.engine.records import Session


def other(h: Host) -> Session:
    """Another user, with a connection whose cookie is 2."""
    session = h.engine.session("other", h.now, uid=7)
    h.socket(2, uid=7)
    h.engine.apply(session, RequestHint("r", h.now + 20.0), h.now)
    return session


def say(h: Host, session: Session, name: str) -> None:
    h.engine.apply(session, TransferHint(name, "r", "", Stage.P2D, 0, 1000, CookieSelector(2)), h.now)


def test_who_is_shown_of_very_many_is_not_picked_at_each_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    h, sock = crowd(BESIDE * 3)
    session, picked, pick = other(h), [0], views._first

    def counted(*args: object) -> views.Rows:
        picked[0] += 1
        return pick(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(views, "_first", counted)
    t = h.engine.books.transfers
    for n in range(4):  # less than PICK_S together
        say(h, session, str(n))
        h.transfer(f"late {n}", sock, 1000)
        h.tick(0.01)
        assert t.get(session.transfers[str(n)], "level") != LEVEL_NEW  # others are shown at once
    assert picked[0] == 1
    h.tick(PICK_S)
    assert picked[0] == 2
    assert t.get(h.session.transfers["late 0"], "level") == LEVEL_NEW


def test_they_are_picked_anew_when_half_of_them_are_gone() -> None:
    h, sock = crowd(BESIDE * 3)
    say(h, other(h), "one")
    shown, t = Shown(), h.engine.books.transfers

    def names() -> list[int]:
        rows = shown.rows(h.engine.books, 0.0)
        assert rows is not None
        return sorted(int(t.objects[row].id) for row in rows if t.objects[row].id != "one")

    assert names() == list(range(BESIDE))
    half = BESIDE // 2
    h.send(sock, 1000 * half)
    for _ in range(half // ROOM_BESIDE):
        h.tick(0.01)
    assert names() == list(range(half, BESIDE))
    h.send(sock, 1000)
    h.tick(0.01)
    assert names() == list(range(half + 1, half + 1 + BESIDE))


def test_what_has_arrived_of_one_keeps_the_other_waiting_for_less() -> None:
    h, sock = crowd(2 * ROOM)
    say(h, other(h), "one")
    h.tick(0.01)
    h.send(sock, 2 * ROOM * 1000)
    before = h.engine.books.transfers.n
    h.tick(0.01)
    assert before - h.engine.books.transfers.n == ROOM_BESIDE
