# SPDX-License-Identifier: Apache-2.0
"""Takes down hints and decisions as they happen, for whoever writes a record of them (mfsd/ground/recording.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

import mfsd
from mfsd.ground import recording
from mfsd.ground.model import INF
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mfsd.engine.device import Device
    from mfsd.engine.records import Transfer
    from mfsd.policy.base import Policy
    from mfsd.policy.views import I2, Views

WAITING: Final = 200_000
"""Lines that wait to be taken; what happens beyond is counted only."""
RATES_S: Final = 1.0
"""Between two looks at what links give."""
ALL_S: Final = 0.5
"""Between two looks for transfers that were there before the record began: a tick may decide on a part of all."""
MOST: Final = 4
"""Recorders at a time."""


class Recorder:
    """One record in the making. Its lines are taken by whoever asked for it."""

    def __init__(self, policy: Policy, devices: Sequence[Device], now: float) -> None:
        self._began, self._devices = now, devices
        self._numbers: dict[Transfer, int] = {}
        self._next = 0
        self._next_rates = self._next_all = 0.0
        self._lost = 0
        named = {getattr(d, "name", str(i)): d.estimator.rate for i, d in enumerate(devices)}
        parameters = {key: getattr(policy, key) for key in registry.describe(policy.name) if hasattr(policy, key)}
        self._lines = [recording.head(mfsd.__version__, policy.name, parameters, policy.levels, named)]

    def decided(self, views: Views, level: I2, transfers: Sequence[Transfer], now: float) -> None:
        """``level``: of all transfers, in the order of the views, which still have the levels before."""
        t, at = views.transfers, self._at(now)
        if now >= self._next_rates and self._devices:
            self._next_rates = now + RATES_S
            self._put({"t": at, "rates": [round(d.estimator.rate) for d in self._devices]})
        different = level != t.level
        # Who is new has another level than before. Those that were there already are found by looking at all.
        every = now >= self._next_all
        if every:
            self._next_all = now + ALL_S
        for row in range(len(t)) if every else np.flatnonzero(different).tolist():
            transfer = transfers[row]
            number = self._numbers.get(transfer)
            if number is not None and not different[row]:
                continue
            if number is None:
                number = self._numbers[transfer] = self._next
                self._next += 1
                due = float(t.deadline[row])
                self._put({
                    "t": at, "hint": number, "id": transfer.id, "session": transfer.session.name,
                    "request": "" if transfer.request is None else transfer.request.id, "stage": int(t.stage[row]),
                    "bytes": round(float(t.size[row])), "left": round(float(t.left[row])),
                    "due": None if due == INF else round(due - now, 6),
                    "compute": round(float(t.compute_left[row]), 6), "device": int(t.device[row]),
                })  # fmt: skip
            self._put({"t": at, "level": number, "to": int(level[row])})

    def ended(self, transfers: Iterable[Transfer], at: Iterable[float], *, delivered: bool) -> None:
        """These are over, each since then."""
        for transfer, when in zip(transfers, at, strict=True):
            number = self._numbers.pop(transfer, None)
            if number is not None:
                self._put({"t": self._at(when), "end": number, "delivered": delivered})

    def take(self, now: float) -> list[str]:
        """What has happened since the last time."""
        if self._lost:
            lost, self._lost = self._lost, 0
            self._lines.append(recording.line({"t": self._at(now), "lost": lost}))
        lines, self._lines = self._lines, []
        return lines

    def _at(self, now: float) -> float:
        return round(max(now - self._began, 0.0), 6)

    def _put(self, event: dict[str, object]) -> None:
        if len(self._lines) >= WAITING:
            self._lost += 1
        else:
            self._lines.append(recording.line(event))
