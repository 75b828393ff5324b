# SPDX-License-Identifier: Apache-2.0
"""Dense columns: objects with a row each, stored as a structure of arrays without holes.

Removing a row moves another one into its place, so the first ``n`` elements of every column are always exactly the
live rows and a policy can work on plain slices. Which row an object has is therefore nobody's to keep: ask ``row``, or
read and write single values by object (``get``, ``put``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

GONE: Final = -1
"""Row of an object that has been removed."""
FRESH: Final = -2
"""Row of an object that has been added but not written to the columns yet (Deferred)."""


class HasRow(Protocol):
    """An object in a store. ``row`` is the store's own note; others ask ``Dense.row``."""

    row: int


T = TypeVar("T", bound=HasRow)


class Dense(Generic[T]):
    """Columns of values by name, and the objects that they belong to."""

    def __init__(self, columns: dict[str, Any], capacity: int = 64) -> None:
        self._names = tuple(columns)
        self._n = 0
        self._objects: list[T] = []
        self._columns = {name: np.zeros(capacity, dtype=dtype) for name, dtype in columns.items()}

    def _settle(self) -> None:
        """Bring the columns up to date. Everything that reads them does so first."""

    @property
    def n(self) -> int:
        """Live rows."""
        self._settle()
        return self._n

    @property
    def objects(self) -> list[T]:
        """The objects in the order of their rows."""
        self._settle()
        return self._objects

    def live(self, name: str) -> Any:
        """The live part of a column, shape (n,), writable. Raises KeyError for a column that does not exist."""
        self._settle()
        return self._columns[name][: self._n]

    def image(self) -> bytes:
        """All live values: the same while none has changed."""
        self._settle()
        return b"".join([column[: self._n].tobytes() for column in self._columns.values()])

    def row(self, obj: T) -> int:
        """Row of an object now; GONE after its removal."""
        self._settle()
        return obj.row

    def rows(self, objects: Iterable[T]) -> npt.NDArray[np.int64]:
        """Rows of objects that are in the store."""
        self._settle()
        return np.array([o.row for o in objects], dtype=np.int64)  # a quarter of what np.fromiter takes

    def get(self, obj: T, name: str) -> Any:
        """One value of an object that is in the store, as a plain one of Python."""
        self._settle()
        return self._columns[name].item(obj.row)

    def put(self, obj: T, name: str, value: Any) -> None:
        """Write one value of an object that is in the store."""
        self._settle()
        self._columns[name][obj.row] = value

    def add(self, obj: T, **values: Any) -> None:
        """Append a row; columns not named are zero."""
        row = self._n
        self._reserve(row + 1)
        for name, column in self._columns.items():
            column[row] = values.get(name, 0)
        obj.row = row
        self._objects.append(obj)
        self._n += 1

    def _reserve(self, rows: int) -> None:
        capacity = len(self._columns[self._names[0]])
        if rows <= capacity:
            return
        while capacity < rows:
            capacity *= 2
        for name, column in self._columns.items():
            # Not np.resize, which would repeat the data: new rows must be zero.
            grown = np.zeros(capacity, dtype=column.dtype)
            grown[: len(column)] = column
            self._columns[name] = grown

    def remove(self, obj: T) -> T | None:
        """Remove an object's row. Returns the object that moved into it, if any."""
        row, last = obj.row, self._n - 1
        moved: T | None = None
        if row != last:
            for column in self._columns.values():
                column[row] = column[last]
            moved = self._objects[last]
            self._objects[row] = moved
            moved.row = row
        self._objects.pop()
        self._n = last
        obj.row = GONE
        return moved


class Deferred(Dense[T]):
    """A store whose rows are written and removed many at a time.

    Writing a numpy scalar per column costs more than all else that a hint does, so additions and removals are only
    noted, and carried out in a few array operations when somebody looks.
    """

    def __init__(self, columns: dict[str, Any], capacity: int = 1024) -> None:
        super().__init__(columns, capacity)
        self._fresh: list[tuple[T, tuple[Any, ...]]] = []
        self._dead: list[int] = []

    def append(self, obj: T, values: tuple[Any, ...]) -> None:
        """Add a row with the values of all columns, in their order."""
        obj.row = FRESH
        self._fresh.append((obj, values))

    def extend(self, objects: Sequence[T], values: Sequence[Any]) -> None:
        """Add rows, given as columns in their order: arrays of shape (len(objects),), or one value for all rows."""
        self._settle()
        start, end = self._n, self._n + len(objects)
        self._reserve(end)
        for column, value in zip(self._columns.values(), values, strict=True):
            column[start:end] = value
        for row, obj in enumerate(objects, start):
            obj.row = row
        self._objects += objects
        self._n = end

    def add(self, obj: T, **values: Any) -> None:
        """Add a row; columns not named are zero."""
        self.append(obj, tuple(values.get(name, 0) for name in self._names))

    def remove(self, obj: T) -> None:
        """Remove an object's row. What moves into it is nobody's business: rows are not kept elsewhere."""
        self.remove_all((obj,))

    def remove_all(self, objects: Iterable[T]) -> None:
        """Remove the rows of objects."""
        for obj in objects:
            if obj.row >= 0:
                self._dead.append(obj.row)
            obj.row = GONE

    def noted(self, objects: Sequence[T], names: Iterable[str]) -> list[npt.NDArray[Any]]:
        """Columns of objects that have been written, without carrying out what was noted since."""
        rows = np.array([o.row for o in objects], dtype=np.int64)
        return [self._columns[name].take(rows) for name in names]

    def _settle(self) -> None:
        """Carry out what was noted."""
        if self._dead:
            self._compact()
        if self._fresh:
            self._write()

    def _compact(self) -> None:
        dead, self._dead = np.array(self._dead), []
        n = self._n - len(dead)
        holes = dead[dead < n]
        kept = np.ones(self._n - n, dtype=np.bool_)
        kept[dead[dead >= n] - n] = False
        tail = n + np.flatnonzero(kept)
        for column in self._columns.values():
            column[holes] = column[tail]
        objects = self._objects
        for hole, row in zip(holes.tolist(), tail.tolist(), strict=True):
            obj = objects[row]
            objects[hole] = obj
            obj.row = hole
        del objects[n:]
        self._n = n

    def _write(self) -> None:
        noted, self._fresh = self._fresh, []
        fresh = [(obj, values) for obj, values in noted if obj.row == FRESH]
        if not fresh:
            return
        start, end = self._n, self._n + len(fresh)
        self._reserve(end)
        for column, values in zip(self._columns.values(), zip(*(v for _, v in fresh), strict=True), strict=True):
            column[start:end] = values
        for row, (obj, _) in enumerate(fresh, start):
            obj.row = row
            self._objects.append(obj)
        self._n = end
