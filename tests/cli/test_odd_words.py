# SPDX-License-Identifier: Apache-2.0
"""What nobody should type, and names that nobody should choose."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
from support.ctl import MFSCTL, ROOT, run
from support.waiting import wait_for

if TYPE_CHECKING:
    from support.ctl import Rig

HUGE: Final = "9" * 25
ENDLESS: Final = "9" * 400
TRANSFER: Final = ("hint", "transfer", "t", "--stage", "background", "--cookie", "5")
REQUEST: Final = ("hint", "request", "r")


@pytest.mark.parametrize(
    "args",
    [
        ("hint", "mark", "--stage", "p2d", "--cookie", HUGE),
        ("hint", "mark", "--stage", "p2d", "--pid", HUGE),
        ("hint", "progress", "b", HUGE),
        ("hint", "batch", "b", "--layers", HUGE),
        ("hint", "batch", "b", "--current-layer", HUGE),
        ("hint", "batch", "b", "--layer-compute", f"{ENDLESS}h"),
        (*REQUEST, "--ttft-left", f"{ENDLESS}h"),
        (*REQUEST, "--ttft-left", f"{HUGE}h"),
        (*REQUEST, "--ttft-left", f"-{HUGE}h"),
        (*REQUEST, "--ttft-left", "1s", "--ttl", f"{HUGE}h"),
        (*TRANSFER, "--bytes", ENDLESS),
        (*TRANSFER, "--bytes", f"{HUGE}TiB"),
        (*TRANSFER, "--bytes=-5"),
        (*TRANSFER, "--bytes", "5", "--layer", HUGE),
        ("explain", "--slot", HUGE),
        ("explain", "--cookie", HUGE),
        ("rules", "--cookie", HUGE),
        ("connections", "--limit", HUGE),
        ("transfers", "--limit", HUGE),
    ],
    ids=lambda args: " ".join(args)[:40],
)
def test_numbers_that_the_api_can_not_say(rig: Rig, args: tuple[str, ...]) -> None:
    ran = rig.run(*args)
    assert (ran.code, ran.out) == (2, "")
    assert "99" in ran.err or "-5" in ran.err
    assert not rig.tap.asked


ODD: Final = "\x1b]0;title\x07\x9b2J\u202eabc\x7f\ufeff\U000e0041"


def test_names_that_would_move_the_cursor(rig: Rig) -> None:
    """In whatever form they are printed: those of sessions, requests and transfers are anybody's."""
    announced: list[tuple[str, ...]] = [
        ("request", ODD, "--ttft-left", "60s"),
        ("transfer", f"t{ODD}", "--stage", "p2d", "--bytes", "5", "--request", ODD, "--to", "10.9.9.9:5"),
    ]
    for words in announced:
        assert rig.run("hint", *words, "--session", ODD).code == 0
    wait_for(lambda: rig.run("status", "--json").json["notices"], "the notice of a selector that matches nothing")
    questions: list[tuple[str, ...]] = [
        ("status",), ("transfers",), ("trace", ODD), ("explain", f"t{ODD}"), ("pause",), ("resume",), ("observe",),
        ("trace", "none" + ODD), ("hint", "transfer", ODD, "--stage", "p2d", "--bytes", "5", "--to", "10.9.9.9:5"),
    ]  # fmt: skip
    for words in questions:
        for ran in (rig.run(*words), rig.run(*words, "--json")):
            assert [line for line in (ran.out + ran.err).splitlines() if not line.isprintable()] == []
    shown = rig.run("transfers", "--json")
    assert json.loads(shown.out)["transfers"][0]["id"] == f"t{ODD}"


@pytest.mark.parametrize(
    ("words", "shown"),
    [(("transfers",), b"\n?  "), (("transfers", "--json"), rb'"id": "\u00fc", '), (("trace", "r"), b"\n?  ")],
)
def test_a_terminal_that_has_not_all_characters(rig: Rig, words: tuple[str, ...], shown: bytes) -> None:
    assert rig.run("hint", "request", "r", "--ttft-left", "60s").code == 0
    named = ("--request", "r", "--to", "10.9.9.9:5")
    assert rig.run("hint", "transfer", "ü", "--stage", "p2d", "--bytes", "5", *named).code == 0
    done = subprocess.run(
        [*MFSCTL, "--socket", str(rig.socket), *words],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert shown in done.stdout


def test_a_device_that_nobody_has_moves_no_cursor() -> None:
    shown = run("doctor", "--device", ODD).out
    assert "There is no device" in shown
    assert [c for c in shown if not c.isprintable() and c != "\n"] == []
