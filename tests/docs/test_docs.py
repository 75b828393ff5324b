# SPDX-License-Identifier: Apache-2.0
"""What the documentation says of the tree, held against the tree: links, files, commands, keys, policies, examples."""

from __future__ import annotations

import ast
import importlib
import re
from typing import TYPE_CHECKING, Final

import pytest
from pydantic import BaseModel
from support.documents import DOCS, FENCE, LINK, PRESENT, ROOT, SPAN, anchors, code, named, spans, table

from mfsd.cli.app import COMMANDS
from mfsd.daemon import config
from mfsd.daemon.config_rules import RuleConfig
from mfsd.lab.app import main as lab
from mfsd.policy import registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOP: Final = ("mfsd", "bpf", "proto", "systemd", "tests", "scripts", "bench", "packaging", "docs", ".ci")
MOST: Final = 400
"""Lines of a file."""
_DESCRIBED: Final = re.compile(r"default ('[^']*'|[^,]+), ([^:]+): (.+)")


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text()):
        assert not re.match(r"\w+:", link), f"{link}: name what is elsewhere, or have `make docs` look for it"
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_files_that_are_named_are_there(path: Path) -> None:
    files = [s for s in spans(path) if re.fullmatch(rf"({'|'.join(map(re.escape, TOP))})/[\w./*-]+", s)]
    missing = [f for f in files if not any(ROOT.glob(f.rstrip("/")))]
    assert not missing
    assert files or path.name != "architecture.md"


def test_every_room_is_in_the_table_of_rooms() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = " ".join(row[0] for row in table(text, "## Rooms"))
    entries = [p for p in (ROOT / "mfsd").iterdir() if not p.name.startswith("__")]
    assert not [p.name for p in entries if f"`mfsd/{p.name}{'/' if p.is_dir() else ''}`" not in rooms]


def test_files_can_be_read_in_one_sitting() -> None:
    generated = {ROOT / "mfsd/datapath/_abi.py", *(ROOT / "mfsd/v1").rglob("*.py")}
    files = [path for room in ("mfsd", "bench", "scripts", "packaging") for path in (ROOT / room).rglob("*.py")]
    files += (ROOT / "bpf").glob("*.[ch]")
    assert not [named(f) for f in files if f not in generated and len(f.read_text().splitlines()) > MOST]


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_commands_that_are_named_exist(path: Path) -> None:
    text = code(path)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", text))
    assert not {t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)}
    benchmarks = set(re.findall(r"\bNAME=([a-z]+)", text))
    assert not {n for n in benchmarks if not (ROOT / f"bench/{n}.py").exists()}
    assert not set(re.findall(r"\bmfsd-lab ([a-z]+)", text)) - set(lab.commands)
    assert not set(re.findall(r"\bmfsctl ([a-z][a-z-]*)", text)) - set(COMMANDS)


def test_the_command_reference_has_every_command() -> None:
    text = (ROOT / "docs/mfsctl.md").read_text()
    headings = "\n".join(re.findall(r"^##+ (.+)$", text, re.MULTILINE))
    assert not [name for name in COMMANDS if not re.search(rf"\b{name}\b", headings, re.IGNORECASE)]


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_keys_of_the_configuration_that_are_named_exist(path: Path) -> None:
    plain = {name: type(value) for name, value in config.Config() if isinstance(value, BaseModel) and name != "policy"}
    lists = (("device", config.DeviceConfig), ("peer", config.PeerConfig), ("rule", RuleConfig))
    sections: dict[str, type[BaseModel]] = dict([*plain.items(), *lists])
    pattern = re.compile(rf"({'|'.join(sections)})\.([a-z_]+)(?: = .+)?")
    keys = [found.groups() for found in map(pattern.fullmatch, spans(path)) if found]
    assert not [f"{section}.{key}" for section, key in keys if key not in sections[section].model_fields]


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_examples_of_the_configuration_are_accepted(path: Path, tmp_path: Path) -> None:
    blocks = [body for language, body in FENCE.findall(path.read_text()) if language == "toml"]
    for i, block in enumerate(blocks):
        file = tmp_path / f"{i}.toml"
        file.write_text(block)
        config.load(file)
    assert blocks or path.name != "README.md"


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_what_examples_import_of_mfsd_is_there(path: Path) -> None:
    for language, body in FENCE.findall(path.read_text()):
        for node in ast.walk(ast.parse(body)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mfsd":
                module = importlib.import_module(node.module or "")
                assert not [a.name for a in node.names if not hasattr(module, a.name)], node.module


def test_every_policy_is_compared() -> None:
    rows = table((ROOT / "docs/policies.md").read_text(), "## All of them")
    names = [name for row in rows for name in SPAN.findall(row[0])]
    assert sorted(names) == sorted(registry.names())
    for row in rows:
        least = [str(registry.make_policy(name).least_levels) for name in SPAN.findall(row[0])]
        assert row[3] == ", ".join(dict.fromkeys(least)), row[0]


def parameters() -> Iterator[list[str]]:
    """Rows of the table of parameters; policies of one class with one default share a row."""
    shared: dict[tuple[type, str, str], list[str]] = {}
    for name in registry.names():
        for key, text in registry.describe(name).items():
            shared.setdefault((type(registry.make_policy(name)), key, text), []).append(f"`{name}`")
    for (_, key, text), names in shared.items():
        found = _DESCRIBED.fullmatch(text)
        assert found is not None, text
        default = {"True": "true", "False": "false"}.get(found[1], found[1].replace("'", '"'))
        yield [", ".join(names), f"`{key}`", default, found[2].replace("'", '"'), found[3]]


def test_every_parameter_has_its_default() -> None:
    rows = table((ROOT / "docs/policies.md").read_text(), "## Parameters")
    assert rows == list(parameters())


@pytest.mark.parametrize("name", sorted({p.stem for p in (ROOT / "bench").glob("*.py")} - {"__init__", "common"}))
def test_a_benchmark_that_is_asked_for_help_does_not_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"bench.{name}").main
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out
