# SPDX-License-Identifier: Apache-2.0
"""Views of which only some columns matter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from mfsd.ground.bands import LEVEL_NEW
from mfsd.ground.model import Stage
from mfsd.policy.views import (
    BACKGROUND,
    COLLECTIVE,
    KV_REUSE,
    P2D,
    UNSTAGED,
    BatchView,
    LinkView,
    RequestView,
    TransferView,
    Views,
)

NEUTRAL: dict[type, dict[str, Any]] = {
    TransferView: {
        "stage": 0,
        "size": 1.0,
        "left": 1.0,
        "ahead": 0.0,
        "request": -1,
        "batch": -1,
        "conn": -1,
        "target_layer": 0,
        "current_layer": 0,
        "computing": False,
        "layer_started": True,
        "deadline": math.inf,
        "compute_left": 0.0,
        "created": 0.0,
        "level": LEVEL_NEW,
        "device": 0,
        "peer": -1,
        "max_defer": math.inf,
        "infeasible": False,
    },
    RequestView: {"deadline": math.inf, "arrival": 0.0, "batch": -1, "compute_left": 0.0, "pruned": False},
    BatchView: {
        "layers": 1,
        "current_layer": 0,
        "layer_compute": 0.0,
        "compute_done": False,
        "arrival": 0.0,
        "rank": 0,
    },
}
TYPES = {"U1": np.uint8, "I2": np.int16, "I4": np.int32, "F8": np.float64, "B1": np.bool_}


@pytest.mark.parametrize("cls", NEUTRAL, ids=lambda c: c.__name__)
def test_rows_of_which_nothing_is_said_point_at_nothing_and_want_nothing(cls: Any) -> None:
    rows = cls.of(2)
    assert len(rows) == 2
    for f in dataclasses.fields(cls):
        column = getattr(rows, f.name)
        assert column.dtype == TYPES[str(f.type)], f.name
        assert column.tolist() == [NEUTRAL[cls][f.name]] * 2, f.name


def test_a_column_is_one_value_or_one_per_row_and_copied() -> None:
    left = np.array([1.0, 2.0, 3.0])
    t = TransferView.of(3, left=left, stage=Stage.P2D, request=[0, -1, 1])
    left[0] = 9.0
    assert t.left.tolist() == [1.0, 2.0, 3.0]
    assert t.stage.tolist() == [3, 3, 3]
    assert t.request.tolist() == [0, -1, 1]
    with pytest.raises(TypeError, match="port"):
        TransferView.of(3, port=0)
    with pytest.raises(ValueError, match="broadcast"):
        TransferView.of(3, left=[1.0, 2.0])


def test_links() -> None:
    link = LinkView.of([1e8, 2e8], 3, load=0.5, load_above=[[0.0, 0.1, 0.2, 0.3]])
    assert link.rate.tolist() == [1e8, 2e8]
    assert link.load.tolist() == [0.5, 0.5]
    assert link.load_above.tolist() == [[0.0, 0.1, 0.2, 0.3]] * 2
    assert link.peer_rate.tolist() == []
    assert (link.floor.tolist(), link.taken.tolist()) == ([0.0, 0.0], [0.0, 0.0])
    assert LinkView.of([1e8, 2e8], 3, floor=0.2, taken=[0.1, 0.0]).floor.tolist() == [0.2, 0.2]
    assert LinkView.of(1e9, 3, peer_rate=[1.0]).load_above.shape == (1, 4)
    assert LinkView.of(1e9, 3, peer_rate=[1.0]).peer_rate.tolist() == [1.0]


def test_a_state_without_requests_and_batches() -> None:
    view = Views.of(TransferView.of(1), LinkView.of(1.0, 1))
    assert (len(view.transfers), len(view.requests), len(view.batches), view.now) == (1, 0, 0, 0.0)
    assert (len(view.sizes), view.cluster_requests) == (0, 0)


def test_stages_are_those_of_the_model() -> None:
    assert (UNSTAGED, KV_REUSE, COLLECTIVE, P2D, BACKGROUND) == (0, 1, 2, 3, 4) == tuple(Stage)


def test_rows_can_be_taken() -> None:
    some = TransferView.of(4, stage=3, left=[1.0, 2.0, 3.0, 4.0]).take(np.array([3, 0]))
    assert some.left.tolist() == [4.0, 1.0]
    assert some.stage.tolist() == [3, 3]
    assert some.deadline.tolist() == [math.inf, math.inf]
