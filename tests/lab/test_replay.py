# SPDX-License-Identifier: Apache-2.0
"""mfsd-lab replay: worked cases on the fluid link, and what it says of records that it can't use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from mfsd.ground import recording
from mfsd.lab import replay
from mfsd.lab.app import main

if TYPE_CHECKING:
    from pathlib import Path

RATE = 1e6


def hint(number: int, stage: int, size: int, due: float | None, *, at: float = 0.0, **more: Any) -> dict[str, Any]:
    out = {"t": at, "hint": number, "id": f"t{number}", "session": "w", "request": f"r{number}", "stage": stage,
           "bytes": size, "left": size, "due": due, "compute": 0.0, "device": 0}  # fmt: skip
    return out | more


def written(path: Path, *events: dict[str, Any], rate: float = RATE) -> Path:
    with recording.Writer(path, 1 << 20) as writer:
        writer.write([recording.head("0.2.0", "fair", {}, 5, {"eth0": rate}), *map(recording.line, events)])
    return path


@pytest.fixture
def incident(tmp_path: Path) -> Path:
    """One MB due in a second and a half beside five that have time: shared fairly, the first takes two seconds."""
    return written(
        tmp_path / "incident",
        hint(0, 3, 1_000_000, 1.5),
        hint(1, 3, 5_000_000, 100.0),
        {"t": 0.0, "level": 0, "to": 0},
        {"t": 2.1, "end": 0, "delivered": True},
        {"t": 6.0, "end": 1, "delivered": True},
    )


def test_another_policy_would_have_met_a_deadline(incident: Path) -> None:
    record = recording.read(incident)
    happened, fair, srpt = (
        replay.as_recorded(record),
        replay.under(record, "fair", {}),
        replay.under(record, "srpt", {}),
    )
    assert [m.in_time for m in (happened, fair, srpt)] == [1, 1, 2]
    assert fair.took == {0: pytest.approx(2.0), 1: pytest.approx(6.0)}
    # The default band's floor is a tenth, and nobody is in it; the other level has its floor of one per cent.
    assert srpt.took[0] == pytest.approx(1.0, rel=0.02)
    assert replay.differing(fair, srpt) == [("w", "r0")]
    assert fair.late["w", "r0"] == pytest.approx(0.5)
    words = replay.difference(fair, srpt)
    assert words[0] == ("Of 2 requests with a deadline 1 differ: 1 are in time under srpt only, 0 under fair only.")
    assert words[1].startswith("w r0: 500 ms late under fair, ")
    assert words[-1] == "Of 2 transfers 1 end sooner under srpt, 0 later."


def test_compute_follows_stage_1_and_requests_are_as_late_as_their_latest_transfer(tmp_path: Path) -> None:
    file = written(
        tmp_path / "r",
        hint(0, 1, 1_000_000, 1.4, compute=0.5),
        hint(1, 2, 500_000, None, at=2.0),
        hint(2, 3, 1_000_000, 0.5, at=3.0, request="r0"),
        hint(3, 4, 1_000_000, None, at=3.0),
    )
    record = recording.read(file)
    made = replay.under(record, "fair", {})
    assert len(record.transfers) - len(replay.used(record)) == 1  # background
    assert made.took == {0: pytest.approx(1.0), 1: pytest.approx(0.5), 2: pytest.approx(1.0)}
    assert made.late == {("w", "r0"): pytest.approx(0.5)}  # 0.1 s by stage 1, 0.5 s by stage 3
    (_, row) = replay.rows([made])
    assert row == ["fair", "0", "1", "0", "1 s", "1 s", "500 ms", "500 ms", "1 s", "1 s"]
    happened = replay.as_recorded(record)
    assert happened.late == {("w", "r0"): math.inf}
    assert math.isnan(happened.took[0])


def test_what_the_record_ends_before_is_neither_in_time_nor_late(tmp_path: Path) -> None:
    file = written(
        tmp_path / "r",
        hint(0, 3, 1000, 50.0),
        hint(1, 3, 1000, 1.0, request="r0"),
        hint(2, 3, 1000, 50.0),
        hint(3, 3, 1000, 50.0, request="r2"),
        hint(4, 3, 1000, 50.0),
        hint(5, 3, 1000, 2.0),
        {"t": 0.5, "end": 1, "delivered": True},
        {"t": 3.0, "end": 3, "delivered": False},
        {"t": 4.0, "end": 4, "delivered": True},
    )
    happened = replay.as_recorded(recording.read(file))
    assert math.isnan(happened.late["w", "r0"])  # the other one of it was in time
    assert happened.late["w", "r2"] == math.inf  # cut off
    assert happened.late["w", "r4"] == pytest.approx(-46.0)
    assert happened.late["w", "r5"] == math.inf  # past its deadline and not over
    assert replay.rows([happened])[1][:4] == ["as recorded", "1", "2", "1"]


def lab(*words: str) -> tuple[int, str]:
    ran = CliRunner().invoke(main, ["replay", *words])
    return ran.exit_code, ran.output


def test_the_command(incident: Path, tmp_path: Path) -> None:
    code, out = lab(str(incident), "--policy", "srpt", "--policy", "demand-bound")
    assert code == 0, out
    lines = [line.split() for line in out.splitlines()]
    assert ["as", "recorded", "1", "1", "0"] in [line[:5] for line in lines]
    assert ["fair", "simulated", "1", "1", "0"] in [line[:5] for line in lines]
    assert ["srpt", "2", "0", "0"] in [line[:4] for line in lines]
    assert ["demand-bound", "2", "0", "0"] in [line[:4] for line in lines]
    assert "1 are in time under srpt only, 0 under fair simulated only" in out
    # Twice as fast, and fair sharing meets it, too.
    assert "Of 2 requests with a deadline 0 differ" in lab(str(incident), "--policy", "srpt", "--rate", "16mbit")[1]
    unknown = written(tmp_path / "unknown", hint(0, 3, 1, 1.0), rate=0.0)
    assert lab(str(unknown), "--policy", "edf") == (
        1,
        "mfsd-lab: the record does not know the rate of eth0; give one with --rate\n",
    )
    lost = written(tmp_path / "lost", hint(0, 3, 1, 1.0), {"t": 1.0, "lost": 7})
    assert "! 7 events are missing" in lab(str(lost), "--policy", "edf")[1]
    code, out = lab(str(tmp_path / "none"), "--policy", "edf")
    assert code == 1
    assert "No such file" in out
