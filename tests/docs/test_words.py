# SPDX-License-Identifier: Apache-2.0
"""Smaller names in the documentation, held against the code: options, metrics, findings, variables, calls; pages."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import json
import re
from typing import TYPE_CHECKING, Final

import click
import pytest
from support.documents import DOCS, FENCE, LINK, PRESENT, ROOT, SPAN, anchors, code, named, spans, table

from mfsd.cli import show
from mfsd.cli.app import TLS, mfsctl
from mfsd.cli.top import ROWS_MAX
from mfsd.client import Client
from mfsd.daemon.main import main as daemon
from mfsd.datapath import _abi
from mfsd.engine.settings import LimitsConfig
from mfsd.engine.tally import REQUESTS_KEPT
from mfsd.ground import bands, tables
from mfsd.ground.metrics import METRICS
from mfsd.lab.app import main as lab
from mfsd.policy.demand_bound.policy import DemandBound
from mfsd.relay import outgoing
from mfsd.relay.table import PEERS_MAX
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES: Final = [path for path in PRESENT if path.parent != ROOT]
"""Those of docs/."""
LONG: Final = 300
"""Lines of a page from which on it has a table of contents."""
OTHERS: Final = {"--kv-transfer-config", "--strict", "--set-file"}
"""Options of programs that are not ours: vLLM, mypy, Helm."""
BENCHES: Final = sorted({p.stem for p in (ROOT / "bench").glob("*.py")} - {"__init__", "common"})
SCRIPTS: Final = ("scripts/vm/run.py", "scripts/vllm_handoff.py", "tests/monitoring/picture.py")

_OPTION: Final = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_COMMAND: Final = re.compile(r"\b(mfsctl|mfsd-lab|mfsd(?= --)|-m bench\.\w+)(?![\w./-])((?: (?![|&;#])\S+)*)")


def options(found: click.Command) -> set[str]:
    """Of a command itself, --help included; not those for tests."""
    given = [p for p in found.params if isinstance(p, click.Option) and not p.hidden]
    return {o for p in given for o in (*p.opts, *p.secondary_opts)} | {"--help"}


def below(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """Commands of a group with their names, those of groups within it as well."""
    with click.Context(group) as ctx:
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            yield name, command
            if isinstance(command, click.Group):
                yield from ((f"{name} {inner}", c) for inner, c in below(command))


OURS: Final = dict(below(mfsctl))
LABS: Final = dict(below(lab))


def bench(name: str) -> set[str]:
    """Options of a benchmark, whether click's or argparse's."""
    module = importlib.import_module(f"bench.{name}")
    if isinstance(module.main, click.Command):
        return options(module.main)
    return set(re.findall(r'add_argument\("(--[a-z-]+)"', inspect.getsource(module))) | {"--help"}


def known(program: str, words: list[str]) -> set[str]:
    """Options that a command line may have."""
    if program == "mfsd":
        return options(daemon)
    if program.startswith("-m"):
        return bench(program.rpartition(".")[2])
    group, commands = (mfsctl, OURS) if program == "mfsctl" else (lab, LABS)
    both = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    name = next((w for w in (*both, *words) if w in commands), "")
    return options(group) | (options(commands[name]) if name else set())


@functools.cache
def source(*rooms: str) -> str:
    """What is written in some rooms."""
    files = (p for room in rooms for p in sorted((ROOT / room).rglob("*")) if p.suffix in {".py", ".c", ".h"})
    return "\n".join(p.read_text() for p in files)


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_options_that_are_named_exist(path: Path) -> None:
    text = code(path)
    wrong = []
    for program, rest in _COMMAND.findall(text):
        # Brackets of a synopsis, and what stands for a value.
        words = re.sub(r"[\[\]|]", " ", rest).split()
        wrong += [f"{program}{rest}: {o}" for o in _OPTION.findall(rest) if o not in known(program, words)]
    assert not wrong
    every = {o for c in [*OURS.values(), *LABS.values(), mfsctl, lab, daemon] for o in options(c)} | OTHERS
    every |= {o for name in BENCHES for o in bench(name)}
    every |= {o for script in SCRIPTS for o in re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text())}
    assert not set(_OPTION.findall(text)) - every


def test_help_is_for_people() -> None:
    for name, command in [*OURS.items(), *LABS.items(), ("mfsd", daemon)]:
        assert not re.search(r"None|Final|<class", command.get_help(click.Context(command))), name


def test_the_command_reference_has_every_option() -> None:
    """Of each command in its section, those of all commands once."""
    text = (ROOT / "docs/mfsctl.md").read_text()
    sections = re.split(r"^(?=##+ )", text, flags=re.MULTILINE)
    common = options(mfsctl)
    assert not [o for o in common if o not in next(s for s in sections if s.startswith("## Everywhere"))]
    missing = []
    for name, command in OURS.items():
        heading = name.partition(" ")[0]
        begin = re.compile(rf"### mfsctl .*\b{heading}\b|## {heading.capitalize()}\n")
        section = next(s for s in sections if begin.match(s))
        missing += [f"mfsctl {name} {o}" for o in options(command) - common if o not in section]
    assert not missing


def test_examples_have_todays_columns_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/mfsctl.md").read_text()
    (example,) = re.findall(r'^\{"transfers": \[.*?^\]\}', text, re.MULTILINE | re.DOTALL)
    (shown,) = json.loads(example)["transfers"]
    assert {f.name for f in pb.TransferState.DESCRIPTOR.fields} - set(shown) == {"rli"}  # which stage 3 has not
    lines = {" ".join(line.split()) for line in text.splitlines()}
    tables.write(*show.render_connections([pb.Connection()]), show.render_transfers([pb.TransferState()]))
    heads = capsys.readouterr().out.splitlines()[::2]
    heads.append(" ".join(name for name, _ in show.BANDS))
    assert len(heads) == 3
    assert not [h for h in heads if " ".join(h.split()) not in lines]


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_metrics_findings_and_variables_that_are_named_exist(path: Path) -> None:
    text = code(path)
    names = set(re.findall(r"\bmfsd_[a-z][a-z_]*\b", text)) - {m.full_name for m in METRICS}
    assert not [n for n in names if n not in source("bpf", "mfsd/integrations")]
    ids = r'"((?:kernel|loader|privileges|host|tcp|paths|state|device)\.\w+)'
    findings = set(re.findall(ids, source("mfsd/doctor", "mfsd/cli")))
    rooms = "|".join(sorted({f.partition(".")[0] for f in findings} - {"device"}))
    asked = re.findall(rf"(?<![\w./])((?:{rooms})\.[a-z_]+)(?![\w./(])", text)
    assert not [f for f in asked if f not in findings and not f.endswith((".pem", ".key"))]
    variables = source("mfsd/client", "mfsd/cli", "mfsd/integrations", "nccl", "bpf")
    variables += "".join(f"MFSD_TLS_{name.upper()} " for name in TLS)
    assert not [n for n in re.findall(r"(?<!journalctl )\bMFSD_[A-Z_]+\b", text) if n not in variables]


@pytest.mark.parametrize("path", PRESENT, ids=named)
def test_calls_of_the_client_in_examples_can_be_made(path: Path) -> None:
    for language, body in FENCE.findall(path.read_text()):
        for node in ast.walk(ast.parse(body)) if language == "python" else ():
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "hints":
                method = getattr(Client, node.func.attr)
                given = {k.arg: None for k in node.keywords if k.arg is not None}
                inspect.signature(method).bind(None, *[None] * len(node.args), **given)


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_pages_that_are_named_without_a_link_are_there(path: Path) -> None:
    text = LINK.sub("", path.read_text())
    assert not [n for n in re.findall(r"\bdocs/[\w/-]+\.md\b", text) if not (ROOT / n).exists()]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_page_begins_with_what_it_is_for(path: Path) -> None:
    """A heading and a paragraph, before there is code, a list or a table; long ones have a table of contents."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("<!--")]
    assert re.match(r"# \S", lines[0])
    assert re.match(r"[A-Za-z\[`]", lines[1])
    assert not lines[1].startswith("```")
    text = FENCE.sub("", path.read_text())
    if len(path.read_text().splitlines()) > LONG:
        contents = text[text.index("\n## Contents\n") :].partition("\n## ")[2].partition("\n## ")[0]
        headings = {a for a in anchors("\n".join(re.findall(r"^## .+$", text, re.MULTILINE))) if a != "contents"}
        assert headings <= {link.removeprefix("#") for link in LINK.findall(contents)}


def test_the_readme_lists_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("\n## Documentation\n") :]
    integrations = {p.name for p in PAGES if p.parent.name == "integrations"}
    linked = set(LINK.findall(readme))
    assert not [named(p) for p in PAGES if p.name not in integrations and f"({named(p)})" not in section]
    assert not [n for n in integrations if f"docs/integrations/{n}" not in linked]


def test_contributors_are_told_every_target_and_tier() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"help"}
    told = {t for row in table(text, "## Targets") for t in re.findall(r"`make ([a-z0-9-]+)", row[0])}
    assert told == targets
    tiers = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and not p.name.startswith("_")} - {"support"}
    assert {t for row in table(text, "## Tiers of tests") for t in SPAN.findall(row[0])} == tiers


def test_symptoms_are_quoted_as_they_are_printed() -> None:
    rows = table("\n" + (ROOT / "docs/troubleshooting.md").read_text(), "# Troubleshooting")
    quoted = [q for row in rows for q in re.findall(r'"([^"]+)"', row[0])]
    pieces = [p for q in quoted for p in re.split(r"\.\.\.|\d+", q) if len(p) > 4]
    assert pieces
    assert not [p for p in pieces if p.strip() not in source("mfsd")]


def test_policy_parameters_that_are_named_exist() -> None:
    """Where another page names one with the policy's section in front of it, or says that it is the policy's."""
    text = (ROOT / "docs/policies.md").read_text()
    names = {SPAN.findall(row[1])[0] for row in table(text, "## Parameters")}
    for path in PAGES:
        asked = [s.removeprefix("policy.") for s in spans(path) if s.startswith("policy.")]
        like = re.compile(r"max_defer_\w+_s|defer_\w+|most_\w+|overdue_\w+|margin_\w+")
        asked += [s for s in spans(path) if like.fullmatch(s)]
        assert not set(asked) - names - {"name"}, path


QUOTED: Final = {
    "README.md": [f"takes at most {bands.MAX_HTB_LEVELS} levels", f"`bands.levels`, up to {bands.MAX_LEVELS}"],
    "docs/policies.md": [f"at most {bands.MAX_HTB_LEVELS} with htb, {bands.MAX_LEVELS} with prio and ets"],
    "docs/architecture.md": [
        f"htb has {bands.HTB_PRIOS} priorities, hence at most {bands.MAX_HTB_LEVELS} levels;",
        f"prio and ets have {bands.PRIO_BANDS} bands, hence at most {bands.MAX_LEVELS}.",
        f"control {bands.CONTROL_FLOOR:.0%}, default {bands.DEFAULT_FLOOR:.0%}, each level".replace("%", " %"),
        f"each level {bands.LEVEL_FLOOR:.0%}, background {bands.BACKGROUND_FLOOR:.0%},".replace("%", " %"),
        f"scavenger {bands.SCAVENGER_FLOOR:.0%} (`[bands]`)".replace("%", " %"),
        f"Together they may take {bands.MAX_FLOORS * 100:g} % at most",
        f"the ends of the last {_abi.ENDS:,} of all connections",
    ],
    "docs/client.md": [
        f"how the last {_abi.ENDS:,} ended",
        f"`limits.default_ttl_s`, {LimitsConfig().default_ttl_s:g} s",
        f"mfsd holds stage 1 and 3 back for {DemandBound(name='').max_defer_kv_s:g} s at most",
    ],
    "docs/relay.md": [f"{outgoing.QUEUE:,} hints per peer", f"There are {PEERS_MAX} addresses at most"],
    "docs/mfsctl.md": [f"looks at the most urgent {ROWS_MAX:,}", f"of the latest {REQUESTS_KEPT:,} that are"],
}
"""Limits and defaults, as the pages say them."""


@pytest.mark.parametrize("name", QUOTED)
def test_limits_and_defaults_are_todays(name: str) -> None:
    text = " ".join((ROOT / name).read_text().split())
    assert not [q for q in QUOTED[name] if q not in text]
