# SPDX-License-Identifier: Apache-2.0
"""The configuration's files: mfsd.toml, and what the files of conf.d beside it add to it or change.

conf.d/*.toml are read in the order of their names. Tables are merged key by key; a later file wins. Entries of
[[device]] and [[peer]] are added, except that an entry for a device or network that an earlier file has changes that
one's keys.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.daemon.config_text import key

if TYPE_CHECKING:
    from pathlib import Path

FOLDER: Final = "conf.d"
MAX_BYTES: Final = 1 << 20
"""Of a file."""
MAX_DOTS: Final = 1000
"""In a line, comments aside: tomllib takes time and memory in the square of the length of a dotted key."""
IDENTITY: Final = {"device": "name", "peer": "network"}
"""Key that tells the entries of a list of sections apart."""
_PART: Final = re.compile(r"\.?(?:\"(?:[^\"\\]|\\.)*\"|[^.\[\"]+)|\[\d+\]")
"""One step of a place: a key or an index."""


class UnreadableError(ValueError):
    """A file can't be read, or is no TOML."""

    def __init__(self, problem: str, path: Path) -> None:
        super().__init__(problem)
        self.problem, self.path = problem, path


def files(path: Path) -> list[Path]:
    """What makes up the configuration: the file itself, if there are others it may be missing, and its drop-ins."""
    more = sorted((path.parent / FOLDER).glob("*.toml"), key=lambda p: p.name)
    return [path, *more] if path.exists() or not more else more


@dataclass
class Merged:
    """What several files say together, and which of them says it."""

    data: dict[str, Any] = field(default_factory=dict)
    _said: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Place in ``data``, as problems write it -> file that said it last, and the place there."""

    def add(self, path: Path) -> None:
        """One more file. Raises UnreadableError."""
        try:
            said = _toml(_text(path))
        except OSError as e:
            raise UnreadableError(f"can't be read: {e.strerror}", path) from e
        except RecursionError as e:
            too_deep = "is not TOML: nested too deeply; a key stands in its section, [section], at most"
            raise UnreadableError(too_deep, path) from e
        except ValueError as e:
            raise UnreadableError(f"is not TOML: {e}", path) from e
        for name, value in said.items():
            if name in IDENTITY and isinstance(value, list) and isinstance(self.data.get(name, []), list):
                self._add_entries(path, name, value)
            else:
                self._put(path, self.data, name, value, key(name), key(name))

    def place(self, problem: str) -> tuple[Path | None, str]:
        """Which file a problem is in, and the problem with the place as that file counts. None: no file said it."""
        where, equals, rest = problem.partition(" = ")
        parts = _PART.findall(where) if equals else []
        for n in range(len(parts), 0, -1):
            found = self._said.get("".join(parts[:n]))
            if found is not None:
                path, there = found
                return path, f"{there}{''.join(parts[n:])} = {rest}"
        return None, problem

    def _add_entries(self, path: Path, name: str, entries: list[Any]) -> None:
        there: list[Any] = self.data.setdefault(name, [])
        earlier = {_identity(name, e): i for i, e in enumerate(there) if _identity(name, e) is not None}
        for i, entry in enumerate(entries):
            known = earlier.get(_identity(name, entry))
            if known is None:
                there.append({} if isinstance(entry, dict) else entry)
                known = len(there) - 1
            here, where = f"{name}[{i}]", f"{name}[{known}]"
            self._said[where] = (path, here)
            if isinstance(entry, dict):
                for k, v in entry.items():
                    self._put(path, there[known], k, v, f"{where}.{key(k)}", f"{here}.{key(k)}")

    def _put(self, path: Path, table: dict[str, Any], name: str, value: Any, where: str, here: str) -> None:
        self._said[where] = (path, here)
        there = table.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            for k, v in value.items():
                self._put(path, there, k, v, f"{where}.{key(k)}", f"{here}.{key(k)}")
            return
        if isinstance(value, dict):
            table[name] = {}
            for k, v in value.items():
                self._put(path, table[name], k, v, f"{where}.{key(k)}", f"{here}.{key(k)}")
            return
        table[name] = value


def _text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes; is this the right file?")
    return raw.decode()


def _toml(text: str) -> dict[str, Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MAX_DOTS and not line.lstrip().startswith("#"):
            raise ValueError(f"nested too deeply (at line {number}): more than {MAX_DOTS} dots in one line")
    return tomllib.loads(text)


def _identity(name: str, entry: Any) -> str | None:
    value = entry.get(IDENTITY[name]) if isinstance(entry, dict) else None
    return value if isinstance(value, str) else None


def read(path: Path) -> Merged:
    """All files of a configuration. Raises UnreadableError."""
    merged = Merged()
    for file in files(path):
        merged.add(file)
    return merged
