# SPDX-License-Identifier: Apache-2.0
"""Crowds: so many connections that moving each of them costs more than deferring them brings.

A deferred connection stands still, and its retransmission timer goes off, and doubles, while its packets wait in the
host's own queue. A promotion out of that costs it some time; those of very many at once cost each other that. And
whoever is beside a crowd gains little by its deferral: of plain sharing among so many there is less for one than the
floor of unhinted traffic. Beside collectives crowds are deferred: what these must lose is guaranteed by deadline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from mfsd.policy.views import B1, Views

CROWD: Final = 32
"""Connections of a device that are one together."""
REST: Final = 16
"""What is left of a crowd counts as one until there are fewer."""


def few(view: Views, rows: B1, was: B1) -> B1:
    """These transfers, but for crowds of them, shape (n,). ``was``: who may be of what is left of one."""
    if np.count_nonzero(rows) < REST:
        return rows
    device, there = view.transfers.device, np.where(view.link.collectives <= 0.0, _connections(view, rows), 0)
    rest: B1 = there >= REST
    if not rest.any():
        return rows
    out: B1 = rows & ~((there >= CROWD).take(device) | (rest.take(device) & was))
    return out


def crowded(view: Views, rows: npt.NDArray[np.intp]) -> B1:
    """Whether these rows belong to a crowd of them, whatever collectives there are, shape (m,)."""
    if len(rows) < CROWD:
        return np.zeros(len(rows), dtype=np.bool_)
    some = np.zeros(len(view.transfers), dtype=np.bool_)
    some[rows] = True
    out: B1 = (_connections(view, some) >= CROWD).take(view.transfers.device.take(rows))
    return out


def _connections(view: Views, rows: B1) -> npt.NDArray[np.intp]:
    """How many connections of each device carry these transfers, shape (devices,)."""
    t = view.transfers
    some = np.flatnonzero(rows & (t.conn >= 0))
    conn = t.conn.take(some)
    device = np.full(int(conn.max(initial=-1)) + 1, -1, dtype=np.int32)
    device[conn] = t.device.take(some)
    return np.bincount(device[device >= 0], minlength=len(view.link.rate))
