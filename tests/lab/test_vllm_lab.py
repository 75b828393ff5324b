# SPDX-License-Identifier: Apache-2.0
"""The vLLM experiment without vLLM: its requests, its verdicts and its report. `make e2e-vllm` is the rest."""

from __future__ import annotations

import io
import itertools
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mfsd.lab.vllm import report
from mfsd.lab.vllm.engine import Served, prompt
from mfsd.lab.vllm.hosts import Arm
from mfsd.lab.vllm.play import (
    GAP_S,
    SIZES,
    SLACKS,
    Alone,
    Beside,
    Outcome,
    Request,
    could_alone,
    could_in_turn,
    work,
)
from mfsd.lab.vllm.suite import QUICK, Found, Plan

if TYPE_CHECKING:
    from pathlib import Path

ALONE = {64: Alone(0.4, 0.36), 192: Alone(1.2, 1.08)}


def served(ttft: float | None, *, right: bool = True) -> Request:
    done = None if ttft is None else 10.0 + ttft
    return Request("r", 64, 0.8, 0, tight=True, at=10.0, prefilled=10.1, done=done, first=7, token=7 if right else 8)


def test_requests_are_the_same_again_and_of_each_size_and_slack() -> None:
    first, again = (work(ALONE, 12, 1) for _ in range(2))
    assert first == again != work(ALONE, 12, 2)
    kinds = [(r.tokens, round(r.slo / ALONE[r.tokens].ttft, 3)) for _, r in first]
    assert {kind: kinds.count(kind) for kind in kinds} == {(t, s): 3 for t in SIZES for s in SLACKS}
    assert all(r.tight == (r.slo < ALONE[r.tokens].ttft * SLACKS[1]) for _, r in first)
    times = [at for at, _ in first]
    assert all(GAP_S[0] <= b - a <= GAP_S[1] for a, b in itertools.pairwise(times))


def test_a_request_fails_without_a_token_and_with_another_one() -> None:
    assert not served(0.5).failed
    assert served(0.5).met
    assert not served(0.9).failed
    assert not served(0.9).met
    assert served(None).failed
    assert served(0.5, right=False).failed


def asked(tokens: int, at: float, prefilled: float | None, slo: float) -> Request:
    return Request(f"r{at:g}", tokens, slo, 0, tight=True, at=at, prefilled=prefilled)


def test_who_could_be_in_time_alone_is_told_from_who_could_behind_those_before() -> None:
    loose, tight = asked(192, 0.0, 0.1, 5.0), asked(64, 0.3, 0.4, 0.8)
    assert could_alone([loose, tight], ALONE) == [True, True]
    assert could_in_turn([loose, tight], ALONE) == [True, False]  # its read is behind a second of another one
    assert could_in_turn([tight], ALONE) == [True]
    tight.slo = 1.3  # the loose one's bytes are gone after 1.1 s, and its own take a third of a second
    assert could_in_turn([loose, tight], ALONE) == [True, True]


def test_what_prefill_took_is_not_the_network_s() -> None:
    assert could_alone([asked(64, 0.0, 0.45, 0.8), asked(64, 0.0, 0.44, 0.8)], ALONE) == [False, True]
    assert (
        could_alone([asked(64, 0.0, None, 9.0)], ALONE) == could_in_turn([asked(64, 0.0, None, 9.0)], ALONE) == [False]
    )


def test_the_target_counts_those_alone_who_could_be_in_time() -> None:
    out = found(0.9, 0.5, 0.015)
    never = served(0.9)
    never.prefilled = never.at + 0.7
    out.cells[Arm.CONNECTOR, Beside.BULK_1].requests.append(never)
    met, words = report.targets(out)[0]
    assert met
    assert "10 of 10 in time that alone could be" in words


def found(plain: float, ours: float, busy: float) -> Found:
    """One bulk flow: TTFT under plain TCP, under the others, and exchanges beside KV (without: 10 ms)."""
    out = Found(Plan(), ALONE)
    for arm in Arm:
        ttft = plain if arm is Arm.PLAIN else ours
        out.cells[arm, Beside.BULK_1] = Outcome([served(ttft)] * 10, [0.01] * 20, [busy] * 20, {"cpu": 0.5})
    return out


@pytest.mark.parametrize(
    ("plain", "ours", "busy", "missed"),
    [
        (0.9, 0.5, 0.015, []),
        (0.5, 0.9, 0.015, ["beside one bulk flow", "fewer in time than plain TCP"]),
        (0.9, 0.5, 0.03, ["exchanges' p99 at most 3.00"]),
    ],
)
def test_targets_say_what_was_missed(plain: float, ours: float, busy: float, missed: list[str]) -> None:
    words = [text for met, text in report.targets(found(plain, ours, busy)) if not met]
    assert len(words) >= len(missed)
    assert all(any(part in text for text in words) for part in missed)
    assert bool(words) == bool(missed)


def test_a_killed_daemon_must_cost_no_request() -> None:
    out = found(0.9, 0.5, 0.015)
    out.killed = Outcome([served(0.5), served(None)], kills=20)
    (text,) = [text for met, text in report.targets(out) if not met]
    assert text == "1 of 32 requests failed; prefill's daemon was killed 20 times"


def test_the_report_has_everything(tmp_path: Path) -> None:
    out = found(0.9, 0.5, 0.015)
    out.killed = Outcome([served(0.5)], [], [0.02], {"cpu": 0.99, "timer_late_p99_ms": 9.0}, kills=20)
    rows, _ = report.write(tmp_path, out)
    assert [row[1] for row in rows[1:]] == [*(arm.words for arm in Arm), Arm.CONNECTOR.words]
    assert rows[-1][0] == "1 bulk flow, kill -9 x 20"
    assert "the processors were 99% busy" in rows[-1][-1]
    assert rows[1][2] == "0 of 10"
    assert rows[2][2] == "10 of 10"
    data = json.loads((tmp_path / "e2e-vllm.json").read_text())
    assert data["cells"]["connector, 1 bulk flow"]["in_time"] == 10
    assert data["cells"]["plain, 1 bulk flow"]["requests"][0]["ttft_s"] == pytest.approx(0.9)
    assert data["settings"]["objectives"] == ", ".join(f"{s:g}" for s in SLACKS)
    page = (tmp_path / "e2e-vllm.html").read_text()
    assert page.count("data:image/png") == 2
    assert {p.name for p in tmp_path.glob("*.png")} == {"e2e-vllm-in-time.png", "e2e-vllm-distributions.png"}


def test_the_short_run_is_shorter() -> None:
    assert QUICK.seconds < Plan().seconds / 2 < 450


def test_an_engine_answers_what_it_was_asked_and_what_was_cancelled_not_at_all() -> None:
    aborted: list[Any] = []
    engine = SimpleNamespace(abort_request=lambda ids, internal: aborted.append((ids, internal)))
    out = io.StringIO()
    it = Served(engine, out)
    it.ids = {"a": "a-1", "b": "b-1"}
    it.ask({"cancel": "b"})
    it.ask({"cancel": "never"})
    assert aborted == [(["b-1"], True)]
    for name in ("a", "b"):
        output = SimpleNamespace(token_ids=[5])
        it.answer(SimpleNamespace(finished=True, request_id=name, outputs=[output], kv_transfer_params={"k": 1}))
    (line,) = out.getvalue().splitlines()
    answer = json.loads(line)
    assert (answer["id"], answer["token"], answer["params"]) == ("a", 5, {"k": 1})
    assert all(3 <= token < 1003 for token in prompt(200, 7))
    assert prompt(200, 7) != prompt(200, 8)
