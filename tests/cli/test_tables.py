# SPDX-License-Identifier: Apache-2.0
"""Tables and text: whole lines in a pipe whatever COLUMNS says, nothing cut on a terminal of any width."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal

import pytest
from rich.cells import cell_len
from support import samples
from support.ctl import MFSCTL, Rig, in_a_pipe, on_a_terminal, run

from mfsd.cli import act, show
from mfsd.cli.app import Globals
from mfsd.ground import tables
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

LONG: Final = [f"prefill-{n}/" + "layer-and-chunk-" * 7 + str(n) for n in range(3)]
"""Names of transfers, longer than 80 columns."""
TEXT: Final = Globals("", json=False)


@pytest.fixture
def long_names(rig: Rig) -> Rig:
    """A daemon with transfers whose names and owner are long, to a host with a long address."""
    owner = "request-" * 12
    assert rig.run("hint", "request", owner, "--ttft-left", "60s").code == 0
    for n, name in enumerate(LONG):
        what = ("--request", owner, "--stage", "p2d", "--bytes", f"{n + 1}.25GB", "--layer", "79")
        ends = ("--from", f"[fd12:3456:789a:bcde:f012:3456:789a:bcde]:6000{n}", "--to", "[fd12:3456:789a::1]:65534")
        assert rig.run("hint", "transfer", name, *what, *ends).code == 0
    return rig


# --- in a pipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 80])
def test_a_row_is_a_line_in_a_pipe(long_names: Rig, columns: int) -> None:
    def lines(*args: str) -> list[str]:
        return in_a_pipe([*MFSCTL, "--socket", str(long_names.socket), *args], columns).splitlines()

    head, *rows = lines("transfers")
    assert head.split() == ["transfer", "owner", "stage", "layer", "left", "due", "mlu", "rli", "level", "slot"]
    assert len(rows) == len(LONG)
    for n, name in enumerate(LONG):
        (row,) = [r.split() for r in rows if r.startswith(name)]
        size = [f"{n + 1}.25", "GB"]
        assert row[:9] == [name, "request-" * 12, "p2d", "79", *size, "of", *size]
    head, *rows = lines("connections")
    assert {r.partition("[")[2].partition("  ")[0] for r in rows} == {
        f"fd12:3456:789a:bcde:f012:3456:789a:bcde]:6000{n} -> [fd12:3456:789a::1]:65534" for n in range(3)
    }
    told = long_names.run("explain", LONG[1], "--json").json
    lines_of_it = lines("explain", LONG[1])
    reasons = [line for line in lines_of_it if line.startswith("- ")]
    assert len(reasons) == len(told["reasons"])
    assert any(len(line) > columns for line in reasons)
    figures = {line.split()[0] for line in lines_of_it if len(line.split()) == 2}
    assert figures >= set(told["figures"])


def test_extreme_answers_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """What no daemon of a test has: counters, rates and backlogs at their largest."""
    show.print_status(TEXT, samples.status())
    out = capsys.readouterr().out
    for text in ("mfsd 9.8.7", "  enforce  ", "up 2 h 13 min", "met 1.23 M,", "rate 1 Gbit/s", "busy 73%"):
        assert text in out
    assert "packets: cookie 1 G\n" in out  # counters at zero are left out
    assert "! eth1: observed only: [link] is foreign\n" in out  # no markup of rich's
    (row,) = [line.split() for line in out.splitlines() if line.startswith("level 0")]
    assert " ".join(row) == "level 0 6d66:2001 32 - 500 Mbit/s - 1 Gbit/s 5 1 PB 1 T 5 262 kB middle 46"
    (control,) = [line.split() for line in out.splitlines() if line.startswith("control")]
    assert " ".join(control) == "control 6d66:1001 1 20 Mbit/s - - - 0 0 B 0 0 0 B urgent -"
    (behind,) = [line.split() for line in out.splitlines() if line.startswith("background")]
    assert " ".join(behind[:8]) == "background 6d66:9001 32 987 Mbit/s - 100 Mbit/s"
    tables.write(*show.render_connections([samples.connection()]))
    (_, row_text) = capsys.readouterr().out.splitlines()
    assert samples.LONG_V6 in row_text
    assert row_text.split()[-9:] == ["31", "12", "1", "TB", "1", "TB", "100/99", "29.9", "s"]
    tables.console().print(show.render_transfers(samples.transfers()))
    (_, late, other) = capsys.readouterr().out.splitlines()
    assert late.split()[-6:] == ["-686", "ms", "1.25", "-", "scavenger", "7"]
    assert late.split()[:2] == ["t" * 60, "request-" * 8]
    assert other.split()[-5:] == ["-", "-", "0", "none", "-"]


COMMAND: Final = ["tc", "class", "add", *["dev", "eth0"] * 30]
PLANS: Final = (
    pb.DevicePlan(
        device="eth0", backend="htb", found=["qdisc mq 0: root"], undo=["word " * 40 + "end"],
        steps=[pb.PlanStep(what="A step", command=" ".join(COMMAND), done=True)],
    ),
    pb.DevicePlan(device="eth1", backend="prio", reasons=["auto"], marks=["DSCP 46 into packets of level 0"]),
)  # fmt: skip


def test_a_plan_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    for plan in PLANS:
        act._print_plan(plan)
    assert capsys.readouterr().out.splitlines() == [
        "eth0: htb", "found", "  qdisc mq 0: root", "steps", "  [done] A step", f"    {' '.join(COMMAND)}", "undo",
        f"  {'word ' * 40}end",
        "eth1: prio", "why so", "  auto", "marks", "  DSCP 46 into packets of level 0",
        "steps", "  nothing to do: all of it is in place",
    ]  # fmt: skip


@pytest.mark.daemon
def test_doctor_in_a_pipe(tmp_path: Path) -> None:
    conf = tmp_path / "c.toml"
    conf.write_text(f'[daemon]\nsocket = "{tmp_path}/s"\nstate_dir = "{tmp_path}"\n')
    argv = ["doctor", "--device", "lo", "--config", str(conf)]
    lines = in_a_pipe([*MFSCTL, *argv], 40).splitlines()
    findings = run(*argv, "--json").json["findings"]
    assert findings
    for finding in findings:
        assert sum(line.endswith(f"  {finding['id']}") for line in lines) == 1
        if finding["severity"] != "ok" and finding["fix"]:
            assert f"     do: {' '.join(finding['fix'].split())}" in lines


def test_a_long_table_keeps_every_name_and_nobody_moves_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["x" * 300, "\x1b[2J", "日本" * 60, *(f"row {i}" for i in range(1000))]
    heads: list[tuple[str, Literal["left", "right"]]] = [("name", "left"), ("owner", "left"), ("size", "right")]

    def drawn() -> list[str]:
        table = tables.table(heads, [[n, f"owner {i}", str(i)] for i, n in enumerate(names)])
        with tables.console() as console, console.capture() as capture:
            console.print(table)
        return capture.get().splitlines()

    whole = drawn()
    assert len(whole) == 1 + len(names)
    assert [line.split("  ")[0] for line in whole[1:]] == [names[0], "?[2J", *names[2:]]
    monkeypatch.setattr(tables, "columns", lambda _stream=None: 60)
    narrow = drawn()
    assert max(map(cell_len, narrow)) <= 60
    text = "".join(line.split("  ")[0] for line in narrow)
    assert (text.count("x"), text.count("日本")) == (300, 60)
    assert narrow[-1].split() == ["row", "999", "owner", "1002", "1002"]


BENCH: Final = """
import sys
from pathlib import Path
from bench import common
common.ROOT = Path(sys.argv[1])
common.write("names", [common.Figure(**f) for f in __import__("json").loads(sys.argv[2])])
"""
FIGURES: Final = [
    {"name": "retransmitted_segments_p99", "value": 12345.678, "unit": "GSO segments",
     "baseline": 987654.3, "ratio": 0.0125, "target": 2, "met": False},
    {"name": "attainment_" + "_of_a_very_long_name" * 5, "value": 0.123456, "unit": "per promotion"},
    {"name": "[bold]_is_no_markup", "value": 1e9, "unit": "B", "target": 1e9, "met": True},
]  # fmt: skip
SHOWN: Final = [
    ["retransmitted_segments_p99", "1.235e+04", "GSO", "segments", "9.877e+05", "0.0125", "2", "NO"],
    [FIGURES[1]["name"], "0.1235", "per", "promotion"],
    ["[bold]_is_no_markup", "1e+09", "B", "1e+09", "yes"],
]


def bench(directory: Path) -> list[str]:
    return [sys.executable, "-c", BENCH, str(directory), json.dumps(FIGURES)]


@pytest.mark.daemon
@pytest.mark.parametrize("columns", [40, 80])
def test_figures_of_a_benchmark_in_a_pipe(tmp_path: Path, columns: int) -> None:
    title, head, *rows, where = in_a_pipe(bench(tmp_path), columns).splitlines()
    assert title.split() == ["bench", "names"]
    assert head.split() == ["figure", "value", "unit", "baseline", "ratio", "target", "met"]
    assert [row.split() for row in rows] == SHOWN
    assert where.startswith("build/bench/names.json  on  {'cpu': ")
    assert where.endswith("}")
    assert json.loads((tmp_path / "build/bench/names.json").read_text())["figures"][0]["value"] == 12345.678


# --- on a terminal ----------------------------------------------------------------------------------------------------


def characters(*texts: str) -> Counter[str]:
    """How often each occurs, blanks and the rule under a head aside."""
    return Counter(c for text in texts for c in text if c not in " \n─")


@pytest.mark.daemon
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nothing_is_lost_on_a_terminal(tmp_path: Path, columns: int) -> None:
    """What doesn't fit goes on in the next line; nothing is cut, and no line is longer than the terminal or 99."""
    shown = on_a_terminal(bench(tmp_path), columns)
    assert max(map(len, shown.splitlines())) <= min(columns, 99)
    piped = in_a_pipe(bench(tmp_path), columns)
    assert characters(shown) == characters(piped)
    whole = [line.split()[0] for line in shown.splitlines()[3:] if line.strip()]
    assert ("retransmitted_segments_p99" in whole) == (columns >= 80)


@pytest.mark.parametrize("columns", [40, 80])
def test_mfsctl_on_a_terminal(long_names: Rig, columns: int) -> None:
    argv = [*MFSCTL, "--socket", str(long_names.socket), "connections"]
    shown = on_a_terminal(argv, columns)
    assert max(map(len, shown.splitlines())) <= columns
    ends = "[fd12:3456:789a:bcde:f012:3456:789a:bcde]:60000->[fd12:3456:789a::1]:65534"
    assert not characters(ends * 3) - characters(shown)
    explained = on_a_terminal([*argv[:-1], "explain", LONG[0]], columns)
    assert max(map(len, explained.splitlines())) <= columns
    sentence = long_names.run("explain", LONG[0], "--json").json["reasons"][-1]
    assert f"- {sentence}" in " ".join(explained.split())


@pytest.mark.parametrize("columns", [72, 80])
@pytest.mark.parametrize("words", ["status --help-stats", "stats --help", "rules --library"])
def test_what_describes_much_fits_a_terminal_and_is_whole(words: str, columns: int) -> None:
    argv = [*MFSCTL, *words.split()]
    shown, piped = on_a_terminal(argv, columns), in_a_pipe(argv, columns)
    assert max(map(len, shown.splitlines())) <= columns
    assert characters(shown) == characters(piped)
    assert max(map(len, piped.splitlines())) > 99


def test_the_options_of_a_command_come_before_those_of_all(rig: Rig) -> None:
    said = rig.run("explain", "--help").out
    assert said.index("--slot") < said.index("--cookie") < said.index("--json") < said.index("--tls-key")
    assert "..." not in rig.run("hint", "--help").out.partition("Commands:")[2]


def test_what_most_names_need_is_in_one_piece_on_80_columns(rig: Rig) -> None:
    ends = ("--from", "10.123.101.111:43157", "--to", "10.123.101.112:41157")
    assert rig.run("hint", "request", "request-1", "--ttft-left", "60s").code == 0
    what = ("--request", "request-1", "--stage", "collective", "--bytes", "999.5MB")
    assert rig.run("hint", "transfer", "request-1/kv/0", *what, *ends).code == 0
    argv = [*MFSCTL, "--socket", str(rig.socket)]
    shown = on_a_terminal([*argv, "connections"], 80)
    assert "10.123.101.111:43157 -> 10.123.101.112:41157 " in shown
    shown = on_a_terminal([*argv, "trace", "request-1"], 80)
    assert max(map(len, shown.splitlines())) <= 80
    # Two tables: however short its times are in print, one has no room.
    assert sum(line.startswith("request-1/kv/0 ") for line in shown.splitlines()) == 2
    assert "announced" in shown
    assert "under way" in shown


STATUS: Final = """
import sys
sys.path.insert(0, "tests")
from support import samples
from mfsd.cli import show
from mfsd.cli.app import Globals
show.print_status(Globals("", json=False), samples.status())
"""


@pytest.mark.parametrize("columns", [80, 99, 200])
def test_a_status_fits_a_terminal_and_no_cell_is_folded(columns: int) -> None:
    shown = on_a_terminal([sys.executable, "-c", STATUS], columns).splitlines()
    assert max(map(len, shown)) <= min(columns, 99)
    heads = [line.split() for line in shown if line.startswith("band ")]
    together = [name for line in heads for name in line if name != "band"]
    assert sorted(together) == sorted(name for name, _ in show.BANDS if name != "band")
    for name in ("control", "level 0", "background"):
        assert sum(line.startswith(f"{name} ") for line in shown) == len(heads) == 2
    (now,) = [line for line in shown if line.startswith("level 0 ") and "bit/s" in line]
    assert " ".join(now.split()) == "level 0 - 500 Mbit/s - 1 Gbit/s 5 262 kB"
    (rest,) = [line for line in shown if line.startswith("level 0 ") and "6d66:" in line]
    assert " ".join(rest.split()) == "level 0 6d66:2001 32 1 PB 1 T 5 middle 46"
    blanks = [n for n, line in enumerate(shown) if line.startswith(" ")]
    assert not blanks  # nothing goes on in the next line
    assert any("waiting selectors 0" in line for line in shown)  # no line ends within a phrase


@pytest.mark.parametrize("columns", [40, 80])
def test_commands_of_a_plan_on_a_terminal(columns: int) -> None:
    code = f"from mfsd.cli.output import shell; print(shell({' '.join(COMMAND)!r}, '    '))"
    shown = on_a_terminal([sys.executable, "-c", code], columns)
    assert max(map(len, shown.splitlines())) <= columns
    assert len(shown.splitlines()) > 1
    assert shown.replace(" \\\n", " ").split() == COMMAND


NAMED: Final = r"""
from mfsd.ground import tables
name = "evil \x1b]0;title\x07 \x1b[2J [bold]" + "x" * 60
tables.write("a line " + name, tables.Line("line " + name, "bold"),
             tables.table([("name", "left"), ("n", "right")], [[name, "1"]], name), f"two\nlines {name}")
"""


@pytest.mark.parametrize("columns", [40, 99])
def test_names_that_need_folding_move_no_cursor_either(columns: int) -> None:
    shown = on_a_terminal([sys.executable, "-c", NAMED], columns)
    assert not [c for c in shown.replace("\n", "") if not c.isprintable()]
    assert shown.count("]0;title") >= 4
    assert "".join(shown.split()).count("[bold]") >= 4  # nor is anything in them markup
