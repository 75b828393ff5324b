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
            assert store.row(gone) == GONE
        else:
            check(store, alive)
    check(store, alive)


def check(store: Dense[Thing], alive: list[Thing]) -> None:
    assert store.n == len(alive)
    assert sorted(store.live("key").tolist()) == sorted(t.key for t in alive)
    assert set(store.objects) == set(alive)
    for row, thing in enumerate(store.objects):
        assert store.row(thing) == row
        assert store.get(thing, "key") == thing.key
    assert not store.live("zero").any()


def test_an_object_is_found_whatever_was_added_and_removed_before_anybody_looked() -> None:
    store: Deferred[Thing] = Deferred({"key": "i8"}, 2)
    things = [Thing(k) for k in range(6)]
    for thing in things:
        store.add(thing, key=thing.key)
    for thing in things[:2]:
        store.remove(thing)
    store.put(things[5], "key", 50)
    assert store.get(things[5], "key") == 50
    assert [store.get(t, "key") for t in things[2:5]] == [2, 3, 4]
    assert store.rows(things[2:]).tolist() == [store.row(t) for t in things[2:]]


def test_unknown_columns_are_errors() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        Dense({"key": "i8"}).live("nonsense")
