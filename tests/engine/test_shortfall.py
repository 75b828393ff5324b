# SPDX-License-Identifier: Apache-2.0
"""Workers that end with transfers unfinished whose bytes are interleaved: what was sent is shared out among them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.harness import MSS, FakeSocket, Host, peer

from mfsd.engine.shortfall import shares
from mfsd.ground.model import What

SIZE = 100 * MSS


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=6), st.integers(0, 40))
def test_each_byte_is_shared_by_those_that_lack_some(announced: list[tuple[int, int]], reached: int) -> None:
    """Against doing so a tenth of a thousandth at a time."""
    grain = 1000
    want = np.zeros(len(announced))
    start, size = (np.array(column, dtype=np.float64) for column in zip(*announced, strict=True))
    for at in range(reached * grain):
        under_way = (start * grain <= at) & (want < size - 1e-9)
        if under_way.any():
            want[under_way] += 1 / grain / under_way.sum()
    assert shares(start, size, float(reached)) == pytest.approx(want, abs=0.01)


def two_reads(*, by_addresses: bool = False) -> tuple[Host, FakeSocket]:
    """Of one connection: a large one and a small one."""
    h = Host()
    s = h.socket(1)
    for name, size in (("large", 9 * SIZE), ("small", SIZE)):
        h.request(name, 60.0)
        named = peer(s) if by_addresses else s
        h.transfer(name, named, size, request=name, ordered=False, position=0 if by_addresses else 1)
    h.tick(0.001)
    return h, s


@pytest.mark.parametrize("by_addresses", [False, True])
@pytest.mark.parametrize("how", ["its worker ends", "its connection is closed", "both"])
@pytest.mark.parametrize(
    ("sent", "wanted"), [(SIZE, (0, 0, 2)), (3 * SIZE, (1, 1, 1)), (8 * SIZE, (1, 1, 1)), (9.5 * SIZE, (2, 2, 0))]
)
def test_a_worker_that_leaves_two_reads(
    sent: float, wanted: tuple[int, int, int], how: str, *, by_addresses: bool
) -> None:
    h, s = two_reads(by_addresses=by_addresses)
    h.send(s, int(sent))
    s.last_ack_ms = 300
    if how != "its connection is closed":
        h.engine.end_session(h.session, h.now)
    if how != "its worker ends":
        h.kernel.close(s)
    for _ in range(4):
        h.tick(0.3)
    if how == "its connection is closed":
        for name in ("large", "small"):
            h.done(name, What.REQUEST)
    if how == "its connection is closed" and by_addresses:
        wanted = (2, 2, 0)  # another one might have brought the rest, and its worker says that it did
    assert h.counted == wanted


def test_what_was_said_to_be_done_has_its_bytes() -> None:
    """The small one; the others are not the large one's."""
    h, s = two_reads()
    h.send(s, 9 * SIZE - MSS)
    h.done("large", What.REQUEST)
    h.engine.end_session(h.session, h.now)
    for _ in range(3):
        h.tick(0.3)
    assert h.counted == (1, 1, 1)


def test_bytes_that_went_while_their_hint_was_on_its_way_are_its() -> None:
    h, s = two_reads()
    h.request("late", 60.0)
    h.send(s, 11 * SIZE)
    h.transfer("late", s, SIZE, request="late", ordered=False, position=1)
    h.engine.end_session(h.session, h.now)
    for _ in range(3):
        h.tick(0.3)
    assert h.counted == (3, 3, 0)


def test_nothing_is_shared_out_before_all_has_arrived() -> None:
    """As much has as the small one is long; the rest is on its way when the worker ends."""
    h, s = two_reads()
    h.send(s, SIZE)
    h.send(s, MSS, acked=False)
    h.engine.end_session(h.session, h.now)
    h.tick(0.01)
    assert h.counted == (0, 0, 0)
    h.kernel.close(s)
    for _ in range(3):
        h.tick(0.3)
    assert h.counted == (0, 0, 2)
