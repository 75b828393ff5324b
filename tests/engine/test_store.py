# SPDX-License-Identifier: Apache-2.0
"""Both stores keep rows dense and objects and columns in step, whatever the order of additions and removals."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfsd.engine.columns import GONE, Deferred, Dense


@dataclass(eq=False)
class Thing:
    key: int
    row: int = GONE


@pytest.mark.parametrize("kind", [Dense, Deferred])
@given(ops=st.lists(st.tuples(st.sampled_from(["add", "remove", "look"]), st.integers(0, 1000)), max_size=200))
def test_rows_stay_dense(kind: type[Dense[Thing]], ops: list[tuple[str, int]]) -> None:
    store = kind({"key": "i8", "zero": "f8"}, 2)
    alive: list[Thing] = []
    made = 0
    for op, pick in ops:
        if op == "add":
            made += 1
            alive.append(Thing(made))
            store.add(alive[-1], key=made)
        elif op == "remove" and alive:
            gone = alive.pop(pick % len(alive))
            store.remove(gone)
            assert gone.row == GONE
        else:
            check(store, alive)
    check(store, alive)


def check(store: Dense[Thing], alive: list[Thing]) -> None:
    assert store.n == len(alive)
    assert sorted(store.live("key").tolist()) == sorted(t.key for t in alive)
    assert set(store.objects) == set(alive)
    for row, thing in enumerate(store.objects):
        assert thing.row == row
        assert store.key[thing.row] == thing.key
    assert not store.live("zero").any()


def test_unknown_columns_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        Dense({"key": "i8"}).nonsense  # noqa: B018 - the access is the test
