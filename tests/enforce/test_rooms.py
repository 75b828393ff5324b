# SPDX-License-Identifier: Apache-2.0
"""Who imports whom below the engine, for the type checker only or not: one direction, no circles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mfsd

ROOT = Path(mfsd.__file__).parents[1]
GROUND = ("mfsd.ground",)
MAY = {
    "mfsd.host": (*GROUND, "mfsd.host"),
    "mfsd.datapath": (*GROUND, "mfsd.host", "mfsd.datapath"),
    "mfsd.datapath.bpf": (*GROUND, "mfsd.host", "mfsd.datapath", "!mfsd.datapath.qdisc", "!mfsd.datapath.undo"),
    "mfsd.datapath.undo": (*GROUND, "mfsd.host", "mfsd.datapath", "!mfsd.datapath.qdisc", "!mfsd.datapath.bpf"),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules of ours that a file names in its imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if is_module(name)}
            found |= modules or {node.module}
    return {name for name in found if name.split(".")[0] == "mfsd"}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def under(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def files(room: str) -> list[Path]:
    return sorted(ROOT.joinpath(*room.split(".")).rglob("*.py"))


def test_there_are_no_circles() -> None:
    graph = {name_of(p): imported(p) for room in ("mfsd.host", "mfsd.datapath") for p in files(room)}
    assert len(graph) > 20
    assert "mfsd.host.netlink" in graph["mfsd.datapath.tc"]
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("room", MAY)
def test_a_room_knows_nothing_above_it(room: str) -> None:
    allowed = [r for r in MAY[room] if not r.startswith("!")]
    forbidden = [r.removeprefix("!") for r in MAY[room] if r.startswith("!")]
    wrong = {
        f"{name_of(path)} imports {name}"
        for path in files(room)
        for name in imported(path)
        if not any(under(name, r) for r in allowed) or any(under(name, r) for r in forbidden)
    }
    assert wrong == set()
