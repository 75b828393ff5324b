# SPDX-License-Identifier: Apache-2.0
"""Which cells are run, in which order, and that an interrupted run goes on; the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from support.labfakes import HEALTHY, result

from mfsd.lab import matrix, run
from mfsd.lab.app import main
from mfsd.lab.arms import ARMS, arm_of
from mfsd.lab.hosts.net import LabError
from mfsd.lab.results.result import RESULT, Health
from mfsd.lab.serving import real
from mfsd.lab.settings import PRESETS, Settings, told, varying
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_names_of_cells_are_unique_and_every_arm_is_run() -> None:
    cells = [c for part in matrix.full() for c in part.cells]
    names = {c.name: c for c in cells}
    assert all(names[c.name] == c for c in cells)
    assert {c.arm for c in cells} == set(ARMS)
    assert sorted(c.name for c in matrix.in_order(cells)) == sorted(names)
    assert {c.seed for c in cells} >= {0, 1, 2}
    assert not {c.name for c in matrix.quick()} & set(names), "a quick look must not overwrite the matrix"
    assert all(c.check() for c in cells)


def test_cells_are_run_seed_by_seed_with_few_changes_of_daemons_and_none_always_last() -> None:
    cells = matrix.in_order(matrix.full()[0].cells)
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)
    first, second = ([c.arm for c in cells if c.seed == seed and c.regime == "several"] for seed in (0, 1))
    assert first == second[::-1]
    assert sum(a != b for a, b in itertools.pairwise(first)) == len(set(first)) - 1


def test_quick_fits_into_four_minutes() -> None:
    cells = matrix.quick()
    assert {c.arm for c in cells} == {"none", "two-class", "mfs", "ladder-net", "demand-bound"}
    assert len({c.load for c in cells}) == 2
    assert run.seconds(cells) < 200


def test_a_result_of_other_settings_or_versions_is_not_taken_for_this_cells(tmp_path: Path) -> None:
    made = result("none", 0.4, [True])
    cell = made.settings
    made.identity = run.identity(cell)
    path = run.path_of(tmp_path, cell)
    path.write_bytes(RESULT.dump_json(made))
    assert run.load(tmp_path, cell) == made
    for other in (
        dataclasses.replace(cell, duration=6.0),
        dataclasses.replace(cell, rate="100mbit"),
        dataclasses.replace(cell, arm="ladder"),
    ):
        assert run.path_of(tmp_path, other) != path
        run.path_of(tmp_path, other).write_bytes(path.read_bytes())
        assert run.load(tmp_path, other) is None
    path.write_text('{"of": "an earlier version"}')
    assert run.load(tmp_path, cell) is None


def test_an_arm_that_is_governed_otherwise_is_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = PRESETS["one"].settings
    cell = dataclasses.replace(cell, arm="ladder")
    before = run.identity(cell)
    monkeypatch.setitem(ARMS, "ladder", dataclasses.replace(ARMS["ladder"], title="the same in other words"))
    assert run.identity(cell) == before
    monkeypatch.setitem(ARMS, "ladder", dataclasses.replace(ARMS["ladder"], tick_ms=5.0))
    assert run.identity(cell) != before


@pytest.mark.parametrize("again", [True, False])
def test_a_run_goes_on_where_it_was_and_tries_what_the_machine_spoilt_once_more_if_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, again: bool
) -> None:
    networks: list[tuple[str, ...]] = []
    ran: list[str] = []

    @contextlib.contextmanager
    def network(settings: Settings) -> Iterator[None]:
        networks.append(settings.links)
        yield

    def one(_network: None, cell: Settings, _tell: object) -> tuple[Any, None]:
        ran.append(cell.regime)
        ok = cell.regime != "hot" or ran.count("hot") == 2
        out = result("none", cell.load, [True], regime=cell.regime)
        out.health = Health([] if ok else ["busy"], {**HEALTHY, "tries": ran.count(cell.regime)})
        return out, None

    monkeypatch.setattr(run, "Network", network)
    monkeypatch.setattr(run, "run", one)
    cells = [PRESETS[r].settings for r in ("one", "hot", "several")]
    run.run_all(tmp_path, cells[:1], lambda *_: None, again=again)
    assert ran == ["one"]
    todo = [c for c in cells if run.load(tmp_path, c) is None]
    told_of: list[tuple[str, int]] = []
    run.run_all(tmp_path, todo, lambda cell, _s, number: told_of.append((cell.regime, number)), again=again)
    assert ran == (["one", "hot", "hot", "several"] if again else ["one", "hot", "several"])
    assert told_of == [("hot", 0), ("several", 1)]
    assert len(networks) == 3, "other links, other hosts"
    found = run.results(tmp_path, cells)
    assert [r.health.figures["tries"] for r in found] == [1, 2 if again else 1, 1]
    assert [r.health.ok for r in found] == [True, again, True]
    assert all(r.commit for r in found)
    assert not list(tmp_path.rglob("*.part"))


def test_settings_are_told_with_all_their_values() -> None:
    cells = matrix.quick()
    rows = {name: (value, meaning) for name, value, meaning in told(cells)}
    assert set(rows) == {f.name for f in dataclasses.fields(Settings)}
    assert rows["load"][0] == "0.85, 1"
    assert rows["instances"][0] == "4"
    assert all(meaning.endswith(".") for _, meaning in rows.values())
    assert varying(cells) == ["load"]


def test_an_arm_may_be_any_policy_of_mfsd_and_nothing_else() -> None:
    for name in registry.names():
        assert arm_of(name).policy == ARMS[name].policy if name in ARMS else name
    with pytest.raises(
        ValueError, match=r"arm = lader: must be one of deadline-ladder, demand-bound, .*edf, .*ladder, "
    ):
        arm_of("lader")


@pytest.mark.parametrize(
    ("preset", "given", "complaint"),
    [
        ("one", {"stores": 0}, "stores = 0"),
        ("demo", {"model": "llama-3-8b"}, "need transport = conduits"),
        ("real", {"instances": 2}, "transport = real: one instance"),
        ("real", {"arm": "none-cross"}, "no cross traffic"),
        ("one", {"arm": "lader"}, "arm = lader: must be one of"),
    ],
)
def test_settings_that_can_not_be_run_are_refused(preset: str, given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LabError, match=complaint):
        dataclasses.replace(PRESETS[preset].settings, **given).check()


def test_the_command_line_names_what_can_be_chosen() -> None:
    runner = CliRunner()
    found = runner.invoke(main, ["parts"])
    assert found.exit_code == 0
    assert [line.split()[0] for line in found.output.splitlines()] == [p.name for p in matrix.full()]
    assert [line.split()[0] for line in runner.invoke(main, ["arms"]).output.splitlines()] == list(ARMS)
    helped = " ".join(runner.invoke(main, ["cell", "--help"]).output.split())
    for f in dataclasses.fields(Settings):
        assert f"--{f.name.replace('_', '-')}" in helped
    wrong = runner.invoke(main, ["cell", "--rate", "10parsec"])
    assert wrong.exit_code == 2
    assert "'10parsec' is not a rate" in wrong.output
    wrong = runner.invoke(main, ["full", "--part", "nonsense"])
    assert wrong.exit_code == 2
    assert "is not one of 'main', 'fifo'" in wrong.output
    wrong = runner.invoke(main, ["cell", "--duration", "1"])
    assert wrong.exit_code == 2
    assert "1.0 is not in the range 3<=x<=3600" in wrong.output


def test_without_the_extra_the_transports_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(LabError, match=r"^torch not installed: in a clone, pip install -e '\.\[transports\]'"):
        real.check_extra()
