# SPDX-License-Identifier: Apache-2.0
"""What the policy sees: views of the books, the connections and the devices, as of one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mfsd.policy.usage import PACKET
from mfsd.policy.views import BatchView, LinkView, RequestView, TransferView, Views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.engine.books import Books
    from mfsd.engine.connections import Connections
    from mfsd.engine.device import Device
    from mfsd.engine.streams import Moved
    from mfsd.ground.bands import Bands, Ladder
    from mfsd.policy.views import B1, F8

STUCK_BYTES: Final = 2 * 65536
"""What a starved TCP socket has in the qdisc: two GSO segments (TCP small queues, net/ipv4/tcp_output.c). These bytes
have passed the classifier but not the link, so a transfer counts as having this much left until TCP says otherwise."""

SHOWN: Final = 10_240
"""Transfers that a policy is shown at a time: what a tick costs must not grow with what anybody may announce."""
BESIDE: Final = 2048
"""Of one user where several have transfers: what one announces beyond what can be sent soon makes ticks long."""
PICK_S: Final = 0.05
"""How often those of one who has more are picked anew, which takes as long as all else; half may end meanwhile."""
Rows = npt.NDArray[np.intp]


class Shown:
    """Which transfers the policy is shown.

    Where there are too many, users have even parts, but beside others no more than BESIDE, and of each the oldest come
    first: they are sent first.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[float, float]] = {}
        """By user that has more: when the last one that is shown was announced, and where it starts."""
        self._next = 0.0

    def rows(self, books: Books, now: float) -> Rows | None:
        """Rows of those that are shown, in their order; None: all."""
        t = books.transfers
        if t.n <= BESIDE:
            return None
        owner = books.streams.owner.take(t.live("stream"))
        have = np.bincount(owner)
        alone = np.count_nonzero(have) == 1
        if t.n <= SHOWN and (alone or have.max() <= BESIDE):
            return None
        if now >= self._next:
            self._next = now + PICK_S
            self._last.clear()
        most = _even(have) if alone else min(_even(have), BESIDE)
        few = have <= most
        picked = few.take(owner)
        for user in np.flatnonzero(~few).tolist():
            picked |= self._of(user, t.live("created"), t.live("start"), owner == user, most)
        return np.flatnonzero(picked)

    def _of(self, user: int, created: F8, start: F8, mine: B1, most: int) -> B1:
        """The first ``most`` of a user's transfers (``mine``), or nearly so many of them, shape (n,)."""
        last = self._last.get(user)
        if last is not None:
            shown: B1 = mine & ((created < last[0]) | ((created == last[0]) & (start <= last[1])))
            if most // 2 <= np.count_nonzero(shown) <= most:
                return shown
        rows = np.flatnonzero(mine)
        rows = rows[_first(created.take(rows), start.take(rows), most)]
        latest = created.take(rows).max()
        self._last[user] = latest, start.take(rows[created.take(rows) == latest]).max()
        shown = np.zeros(len(mine), dtype=np.bool_)
        shown[rows] = True
        return shown


def _even(have: npt.NDArray[np.intp]) -> int:
    """Even parts of what is shown for users who ``have`` so many; what one does not need is the others'."""
    most, left, room = 0, have, SHOWN
    while room >= np.count_nonzero(left) > 0:
        part = room // int(np.count_nonzero(left))
        most += part
        room -= int(np.minimum(left, part).sum())
        left = np.maximum(left - part, 0)
    return most


def _first(created: F8, start: F8, count: int) -> Rows:
    """Indices of the ``count`` first by ``created``, of those of one moment by ``start``. There are more than that."""
    last = np.partition(created, count)[count]
    before, same = np.flatnonzero(created < last), np.flatnonzero(created == last)
    return np.concatenate([before, same[np.argpartition(start[same], count - len(before))[: count - len(before)]]])


def views_of(
    books: Books,
    connections: Connections,
    moved: Moved,
    devices: Sequence[Device],
    bands: Bands,
    ladder: Ladder,
    unannounced: B1,
    now: float,
    rows: Rows | None = None,
) -> Views:
    """Everything that a policy may look at, or of transfers these ``rows`` only. ``unannounced``: as of LinkView.

    Arrays are copies or live columns, to be read only.
    """
    requests, batches = _requests(books, now), _batches(books)
    t = books.transfers

    def column(name: str) -> Any:
        live = t.live(name)
        return live if rows is None else live.take(rows)

    stream, start, end, size = column("stream"), column("start"), column("end"), column("size")
    # take: a third of the time of [], at 10,000 rows
    sent, acked = moved.sent.take(stream), moved.acked.take(stream)
    slot = books.streams.slot.take(stream)
    batch, request = column("batch"), column("request")
    if len(requests):
        batch = np.where((batch < 0) & (request >= 0), requests.batch.take(request), batch)
    current, computing = np.zeros(len(stream), dtype=np.int32), np.zeros(len(stream), dtype=np.bool_)
    if len(batches):
        owned = batch >= 0
        current = batches.current_layer.take(batch) * owned
        computing = owned & ~batches.compute_done.take(batch)
    compute_left = requests.compute_left.take(request) * (request >= 0) if len(requests) else np.zeros(len(stream))
    transfers = TransferView(
        stage=column("stage"),
        size=size,
        left=np.maximum(end - np.maximum(sent, start), np.minimum(end - np.maximum(acked, start), STUCK_BYTES)),
        ahead=np.maximum(start - sent, 0.0),
        request=request,
        batch=batch,
        conn=slot,
        target_layer=column("target_layer"),
        current_layer=current,
        computing=computing,
        layer_started=current != column("seen_layer"),
        deadline=column("deadline"),
        compute_left=compute_left,
        created=column("created"),
        level=column("level"),
        device=connections.device_of(slot),
        peer=connections.peer.take(slot),
        max_defer=column("hold_until") - column("created"),
        infeasible=column("infeasible"),
    )
    np.maximum(transfers.left, 1.0, out=transfers.left)  # acknowledged, but not retired yet
    ordered = column("ordered")
    if not ordered.all():
        _interleaved(transfers, ~ordered, stream, start, sent)
    return Views(transfers, requests, batches, _link(connections, devices, bands, ladder, unannounced, now), now)


def _interleaved(view: TransferView, interleaved: B1, of: npt.NDArray[np.int32], starts: F8, sent: F8) -> None:
    """What is left of, and stands before, transfers whose bytes are interleaved: they share what their stream moves.

    Nobody can tell whose bytes went; of what moved, all that were announced by then have equal shares. Of the others as
    much stands before its end as they have left, but no more than it has itself: all advance together.
    """
    loose = np.flatnonzero(interleaved)
    size = view.size[loose]
    _, which, count = np.unique(of[loose], return_inverse=True, return_counts=True)
    moved = _equal_shares(which, count, starts[loose], sent[loose])
    left = np.maximum(size - moved, np.minimum(size, STUCK_BYTES))
    view.left[loose] = left
    if len(loose):
        # In order of what is left: all of those before it, and its own amount of each of those behind it.
        order = np.lexsort((left, which))
        first = np.concatenate([[0], np.cumsum(count)[:-1]])[which[order]]
        own = left[order]
        before = np.cumsum(own) - own
        behind = count[which[order]] - (np.arange(len(order)) - first) - 1
        view.ahead[loose[order]] = np.maximum(before - before[first], 0.0) + own * behind


def _equal_shares(which: Rows, count: npt.NDArray[np.intp], start: F8, sent: F8) -> F8:
    """What each transfer has moved of its stream's bytes, shape (n,): each byte is shared by those that had begun.

    ``which``: stream of each; ``count``: transfers of each stream; ``start``: offset at which each was announced;
    ``sent``: how far its stream has come.
    """
    order = np.lexsort((start, which))
    first = (np.cumsum(count) - count).take(which[order])
    after = first + count.take(which[order])
    begun = np.arange(len(order)) - first + 1
    following = np.append(start[order][1:], np.inf)
    following[after - 1] = np.inf
    share = np.maximum(np.minimum(following, sent[order]) - start[order], 0.0) / begun
    to_come = np.append(np.cumsum(share[::-1])[::-1], 0.0)  # from each on to the end of all
    out = np.empty(len(order))
    out[order] = to_come[:-1] - to_come.take(after)
    return out


def _requests(books: Books, now: float) -> RequestView:
    r, b = books.requests, books.batches
    compute_left = np.maximum(r.live("compute_until") - now, 0.0)
    batch = r.live("batch")
    if b.n and r.n:
        per_layer = b.live("layer_compute")
        todo = (b.live("layers") - b.live("current_layer")) * per_layer
        todo -= np.clip(now - b.live("layer_since"), 0.0, per_layer)  # the current layer, as far as it can be
        todo = np.where(b.live("compute_done"), 0.0, np.maximum(todo, 0.0))
        known = (b.live("layers") > 0) & (per_layer > 0) | b.live("compute_done")
        compute_left = np.where((batch >= 0) & known.take(batch), todo.take(batch), compute_left)
    return RequestView(
        deadline=r.live("deadline"),
        arrival=r.live("arrival"),
        batch=batch,
        compute_left=compute_left,
        pruned=r.live("pruned"),
    )


def _batches(books: Books) -> BatchView:
    b = books.batches
    return BatchView(
        layers=b.live("layers"),
        current_layer=b.live("current_layer"),
        layer_compute=b.live("layer_compute"),
        compute_done=b.live("compute_done"),
        arrival=b.live("arrival"),
        rank=b.live("rank"),
    )


def _link(
    connections: Connections, devices: Sequence[Device], bands: Bands, ladder: Ladder, unannounced: B1, now: float
) -> LinkView:
    estimators = [d.estimator for d in devices]
    load = np.array([e.band_load for e in estimators]) if estimators else np.zeros((1, len(bands)))
    above = np.zeros((len(load), len(bands) + 1))
    load.cumsum(axis=1, out=above[:, 1:])
    # None where the device has none; those of the levels are no obstacle to what stands on a level.
    floors = bands.floors * np.array([[d.floors] for d in devices] or [[False]])
    rate = np.array([e.rate for e in estimators] or [0.0])
    beyond = connections.device_of(connections.positions.goes_on(now))
    return LinkView(
        rate=rate,
        load=np.minimum(load.sum(axis=1), 1.0),
        load_above=np.minimum(above.take(ladder.above, axis=1), 1.0),
        floor=floors.sum(axis=1),
        taken=np.minimum(load, floors).take(bands.unlevelled, axis=1).sum(axis=1),
        collectives=np.array([e.pauses.collectives for e in estimators] or [0.0]),
        unhinted=load[:, bands.default.index],
        beyond=np.bincount(beyond, minlength=len(rate)).astype(np.int32),
        unannounced=unannounced,
        packet=np.where(rate > 0.0, PACKET / np.where(rate > 0.0, rate, 1.0), 0.0),
        peer_rate=connections.peers.rate,
    )
