# SPDX-License-Identifier: Apache-2.0
"""The configuration's files: mfsd.toml, and what the files of conf.d beside it add to it or change.

conf.d/*.toml are read in the order of their names, but for hidden ones, which editors leave (.#site.toml). Tables are
merged key by key; a later file wins. Entries of [[device]], [[peer]] and [[rule]] are added, except that an entry for a
device, network or name that an earlier file has changes that one's keys.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from errno import EAGAIN
from typing import TYPE_CHECKING, Any, Final

from mfsd.daemon.config_text import shown_key, toml

if TYPE_CHECKING:
    from pathlib import Path

FOLDER: Final = "conf.d"
MAX_BYTES: Final = 1 << 20
"""Of a file."""
MAX_DOTS: Final = 1000
"""In a line, comments aside: tomllib takes time and memory in the square of the length of a dotted key."""
_DEPTH: Final = 3
"""Keys of one below another that are merged, section.key.name: below there is nothing."""
IDENTITY: Final = {"device": "name", "peer": "network", "rule": "name"}
"""Key that tells the entries of a list of sections apart."""
_PART: Final = re.compile(r"\.?(?:\"(?:[^\"\\]|\\.)*\"|[^.\[\"]+)|\[\d+\]")
"""One step of a place: a key or an index."""
_AT: Final = re.compile(r"at line (\d+),")
"""Where TOML's errors say that they are."""
_BARE: Final = re.compile(r"\s*([\w.-]+)\s*=\s*([A-Za-z0-9/][^\"'#=]*?)\s*(?:#.*)?")
"""A key with a text that stands in no quotes."""


class UnreadableError(ValueError):
    """A file can't be read, or is no TOML."""

    def __init__(self, problem: str, path: Path) -> None:
        super().__init__(problem)
        self.problem, self.path = problem, path


def files(path: Path) -> list[Path]:
    """What makes up the configuration: the file itself, if there are others it may be missing, and its drop-ins.

    Raises UnreadableError.
    """
    folder = path.parent / FOLDER
    try:
        more = [p for p in folder.iterdir() if p.name.endswith(".toml") and not p.name.startswith(".")]
    except FileNotFoundError:
        more = []
    except OSError as e:
        if os.path.lexists(folder):
            raise UnreadableError(f"can't be read: {e.strerror}", folder) from e
        more = []  # nor can the file beside it
    more.sort(key=lambda p: p.name)
    return [path, *more] if not more or _is(path) else more


def there(path: Path) -> bool:
    """Whether any of them is, readable or not."""
    try:
        return any(map(_is, files(path)))
    except UnreadableError:
        return True


def _is(path: Path) -> bool:
    """Whether there is something of this name, whatever it is."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


@dataclass
class Merged:
    """What several files say together, and which of them says it."""

    data: dict[str, Any] = field(default_factory=dict)
    _said: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Place in ``data``, as problems write it -> file that said it last, and the place there."""
    _entries: dict[str, tuple[list[Any], dict[str, int]]] = field(default_factory=dict)
    """Of a list of sections in ``data``, which index has what tells its entries apart."""

    def add(self, path: Path) -> None:
        """One more file. Raises UnreadableError."""
        try:
            said = _toml(_read(path))
        except OSError as e:
            raise UnreadableError(f"can't be read: {e.strerror}", path) from e
        except RecursionError as e:
            problem = "is not TOML: nested too deeply; a key stands in its section, [section], at most"
            raise UnreadableError(problem, path) from e
        except ValueError as e:
            raise UnreadableError(f"is not TOML: {e}", path) from e
        for name, value in said.items():
            if name in IDENTITY and isinstance(value, list) and isinstance(self.data.get(name, []), list):
                self._add_entries(path, name, value)
            else:
                self._put(path, self.data, (name, value), shown_key(name), shown_key(name))

    def place(self, problem: str) -> tuple[Path | None, str]:
        """Which file a problem is in, and the problem with the place as that file counts. None: no file said it."""
        where, equals, rest = problem.partition(" = ")
        ends = [part.end() for part in _PART.finditer(where)] if equals else []
        for end in reversed(ends):
            found = self._said.get(where[:end])
            if found is not None:
                path, there = found
                return path, f"{there}{where[end:]} = {rest}"
        return None, problem

    def _add_entries(self, path: Path, name: str, entries: list[Any]) -> None:
        there: list[Any] = self.data.setdefault(name, [])
        whose, earlier = self._entries.get(name, (None, {}))
        if whose is not there:
            earlier = {key: i for i, e in enumerate(there) if (key := _identity(name, e)) is not None}
        new: dict[str, int] = {}
        for i, entry in enumerate(entries):
            identity = _identity(name, entry)
            known = None if identity is None else earlier.get(identity)
            if known is None:
                there.append({} if isinstance(entry, dict) else entry)
                known = len(there) - 1
                if identity is not None:
                    new[identity] = known
            here, where = f"{name}[{i}]", f"{name}[{known}]"
            self._said[where] = (path, here)
            if isinstance(entry, dict):
                for k, v in entry.items():
                    self._put(path, there[known], (k, v), f"{where}.{shown_key(k)}", f"{here}.{shown_key(k)}", 2)
        earlier.update(new)
        self._entries[name] = there, earlier

    def _put(
        self, path: Path, table: dict[str, Any], item: tuple[str, Any], where: str, here: str, depth: int = 1
    ) -> None:
        self._said[where] = (path, here)
        name, value = item
        if not isinstance(value, dict) or depth == _DEPTH:
            table[name] = value
            return
        if not isinstance(table.get(name), dict):
            table[name] = {}
        for k, v in value.items():
            self._put(path, table[name], (k, v), f"{where}.{shown_key(k)}", f"{here}.{shown_key(k)}", depth + 1)


def _identity(name: str, entry: Any) -> str | None:
    value = entry.get(IDENTITY[name]) if isinstance(entry, dict) else None
    return value if isinstance(value, str) else None


def _read(path: Path) -> str:
    # Of the kernel's files some, which call themselves regular, have no end, and whoever reads them waits for more.
    at_once = os.O_NONBLOCK if path.is_file() else 0
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        raw = file.read(MAX_BYTES + 1)
    if raw is None:
        raise BlockingIOError(EAGAIN, "there is nothing to read now")
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes; is this the right file?")
    return raw.decode("utf-8-sig")  # some editors begin a file with a mark


def _toml(text: str) -> dict[str, Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MAX_DOTS and not line.lstrip().startswith("#"):
            raise ValueError(f"nested too deeply (at line {number}): more than {MAX_DOTS} dots in one line")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{e}{_advice(text, str(e))}") from e


def _advice(text: str, error: str) -> str:
    """What is most often wrong with the line that an error names."""
    at = _AT.search(error)
    bare = _BARE.fullmatch(text.split("\n")[int(at[1]) - 1]) if at else None
    return f"; a text stands in quotes: {shown_key(bare[1])} = {toml(bare[2])}" if bare else ""


def read(path: Path, *, again: bool = False) -> Merged:
    """All files of a configuration. Raises UnreadableError.

    A pipe may let who reads it wait for ever, and what was in it is gone. So only the main file may be one, and not
    ``again``, while others wait.
    """
    merged = Merged()
    for file in files(path):
        try:
            odd = file.exists() and not file.is_file() and not file.is_dir()
        except OSError as e:
            raise UnreadableError(f"can't be read: {e.strerror}", file) from e
        if odd and (again or file != path):
            raise UnreadableError(f"can't be read{' again' if again else ''}: it is no regular file", file)
        merged.add(file)
    return merged
