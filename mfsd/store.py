# SPDX-License-Identifier: Apache-2.0
"""Dense columns: objects with a row each, stored as a structure of arrays without holes.

Removing a row moves the last one into its place, so the first ``n`` elements of every column are always exactly the
live rows and a policy can work on plain slices.
"""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

import numpy as np


class HasRow(Protocol):
    """An object that knows its row."""

    row: int


T = TypeVar("T", bound=HasRow)


class Dense(Generic[T]):
    """Columns by attribute: ``store.deadline[:store.n]``."""

    def __init__(self, columns: dict[str, Any], capacity: int = 64) -> None:
        self._names = tuple(columns)
        self.n = 0
        self.objects: list[T] = []
        self._columns = {name: np.zeros(capacity, dtype=dtype) for name, dtype in columns.items()}

    def __getattr__(self, name: str) -> Any:
        # The whole column, capacity included; only the first n elements mean anything.
        try:
            return self.__dict__["_columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    def live(self, name: str) -> Any:
        """The live part of a column."""
        return self._columns[name][: self.n]

    def add(self, obj: T, **values: Any) -> int:
        """Append a row; columns not named are zero."""
        row = self.n
        if row == len(self._columns[self._names[0]]):
            # np.resize would repeat the data; new rows must be zero.
            for name, column in self._columns.items():
                grown = np.zeros(2 * len(column), dtype=column.dtype)
                grown[: len(column)] = column
                self._columns[name] = grown
        for name in self._names:
            self._columns[name][row] = values.get(name, 0)
        obj.row = row
        self.objects.append(obj)
        self.n += 1
        return row

    def row(self, row: int) -> dict[str, Any]:
        """All columns of one row, for ``add``."""
        return {name: column[row] for name, column in self._columns.items()}

    def remove(self, obj: T) -> T | None:
        """Remove an object's row. Returns the object that moved into it, if any; its ``row`` is already right."""
        row, last = obj.row, self.n - 1
        moved: T | None = None
        if row != last:
            for column in self._columns.values():
                column[row] = column[last]
            moved = self.objects[last]
            self.objects[row] = moved
            moved.row = row
        self.objects.pop()
        self.n = last
        obj.row = -1
        return moved
