# SPDX-License-Identifier: Apache-2.0
"""Marks, hints with faults, and a small cluster on real TCP with real daemons."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from mfsd.lab.cluster import cell as cells
from mfsd.lab.cluster import jobs as jobs_
from mfsd.lab.cluster import regimes
from mfsd.lab.cluster.arms import ARMS
from mfsd.lab.cluster.hinter import Faults, Hinter
from mfsd.lab.cluster.jobs import Job, Work
from mfsd.lab.cluster.lanes import Meter, Plugboard
from mfsd.lab.cluster.regimes import REGIMES, Cluster
from mfsd.lab.cluster.teller import Teller
from mfsd.lab.hosts.machine import real_time
from mfsd.lab.hosts.net import SWITCH, Fabric, LabError, run_id, tool
from mfsd.lab.hosts.network import HIGH, LEVELS_FROM, LOW, Network, marks
from mfsd.model import Stage
from mfsd.policy.registry import make_policy
from mfsd.policy.still import stage_levels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GOVERNED = [a for a in ARMS.values() if a.policy]
JOB = Job(7, 0.0, 0, 0, 0, 1000, 1000, (0,), 0.1, 0.3)


@pytest.mark.parametrize("arm", GOVERNED, ids=lambda a: a.name)
def test_the_switch_tells_apart_what_its_setting_says(arm: Any) -> None:
    assert marks(arm, "fifo") == {}
    classes = marks(arm, "classes")
    assert classes["control"] == classes["level 0"] == HIGH
    assert classes["scavenger"] == LOW
    assert classes["default"] == 0
    assert classes[f"level {arm.levels - 1}"] == (LOW if arm.classes is not None else 0)
    levels = marks(arm, "levels")
    assert len(set(levels.values())) == len(levels) == arm.levels + 3
    assert min(levels.values()) == levels["control"] == LEVELS_FROM


@pytest.mark.parametrize("name", ["ladder", "two-class", "mfs", "mfs-nop1", "sjf", "pias", "karuna"])
def test_collectives_go_into_the_first_class(name: str) -> None:
    arm = ARMS[name]
    level = stage_levels(make_policy(arm.policy, arm.levels, arm.params))[Stage.COLLECTIVE]
    assert marks(arm, "classes")[f"level {level}"] == HIGH


def test_an_arm_may_say_which_levels_are_in_which_class() -> None:
    arm = dataclasses.replace(ARMS["ladder"], classes=(2, 4))
    chosen = marks(arm, "classes")
    assert [chosen[f"level {i}"] for i in range(5)] == [HIGH, HIGH, 0, 0, LOW]
    assert (chosen["control"], chosen["default"], chosen["scavenger"]) == (HIGH, 0, LOW)
    assert marks(arm, "fifo") == {}


def test_mfs_shares_the_first_class_between_p1_and_the_collectives() -> None:
    assert marks(ARMS["mfs"], "classes")["level 1"] == HIGH
    assert marks(ARMS["ladder"], "classes")["level 1"] == 0


class Recorder:
    """Stands where a Teller does."""

    hosts = ("p0", "p1")

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def say(self, host: str, method: str, *args: Any, **kwargs: Any) -> None:
        del host
        self.said.append((method, (args, kwargs)))


def _hinter(faults: Faults) -> tuple[Hinter, Recorder]:
    recorder = Recorder()
    return Hinter(recorder, 8, faults, 0), recorder


class FakeLane:
    """As much of a lane as the hinter looks at."""

    stage, cookie = Stage.P2D, 77
    src = dst = dataclasses.make_dataclass("H", ["name"])("p0")


def test_faults_are_what_they_say() -> None:
    lane: Any = FakeLane()
    hinter, heard = _hinter(Faults(lost=0.2, size=2.0))
    for step in range(2000):
        hinter.send(lane, JOB, step, 10_000)
    assert 0.75 < len(heard.said) / 2000 < 0.85
    sizes = [args[2] for _, (args, _) in heard.said]
    assert min(sizes) >= 5000
    assert max(sizes) <= 20_000
    assert len(set(sizes)) > 1000
    hinter, heard = _hinter(Faults(marks_lost=0.2))
    for _ in range(1000):
        hinter.collective(lane)
    assert 750 < len(heard.said) < 850
    assert {name for name, _ in heard.said} == {"mark"}
    hinter, heard = _hinter(Faults(deadline=1.5))
    hinter.request(["p0", "d0"], JOB, 0.1)
    ((name, (_, kwargs)),) = heard.said
    assert name == "request"
    assert kwargs["ttft_left_s"] == pytest.approx(0.45)


def test_a_host_hears_of_a_pass_only_while_it_has_bytes_of_it() -> None:
    hinter, heard = _hinter(Faults())
    hinter.batch({"p0": [JOB]}, "b", 0.01)
    hinter.layer("b", 1)
    hinter.sent("p0", JOB)
    hinter.layer("b", 2)
    hinter.computed("b")
    assert [name for name, _ in heard.said] == ["batch", "layer", "done"]
    hinter.batch({"p0": [JOB]}, "c", 0.01)  # nothing of it is left there
    assert len(heard.said) == 3


def test_the_hinting_process_ends_with_its_owner_and_its_loss_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        with Teller({}) as mute:
            assert mute.settle()
            assert mute.stats() == {}
            assert not psutil.Process().children()
        with Teller({"p0": f"unix:{tmp_path}/nobody"}) as teller:
            teller.say("p0", "request", "r1", ttft_left_s=0.4)
            assert not teller.settle(0.1), "nobody is there to hear it"
            assert teller.stats()["connects"] == 0
            (child,) = psutil.Process().children()
            child.kill()
            child.wait(10)
            with pytest.raises(LabError, match="the hinting process is gone"):
                teller.settle(0.1)
        assert not psutil.Process().children()

    asyncio.run(main())


def test_real_time_ends_with_its_block_even_when_it_fails() -> None:
    before = os.sched_getscheduler(0)
    during = None

    def fail() -> None:
        nonlocal during
        with real_time():
            during = os.sched_getscheduler(0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert during == (os.SCHED_RR if os.geteuid() == 0 else before)
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER


@pytest.mark.netns
def test_bytes_arrive_in_order_and_are_metered() -> None:
    async def main(fabric: Fabric) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        over = asyncio.Event()

        def note(what: str, i: int) -> Callable[[float], None]:
            return lambda _at: seen.append((what, i))

        with Plugboard() as board:
            lane = board.connect(fabric.hosts["a"], fabric.hosts["b"], Stage.P2D)
            lane.meter = meter
            for i in range(20):
                lane.put(300_000, note("arrived", i), functools.partial(note("written", i), 0.0))
            lane.put(1, lambda _at: over.set())
            await asyncio.wait_for(over.wait(), 20)
            assert lane.queued == 0
        return seen

    meter = Meter()
    with Fabric(["a", "b"]) as fabric:
        seen = asyncio.run(main(fabric))
    for what in ("arrived", "written"):
        assert [i for w, i in seen if w == what] == list(range(20))
    assert sum(n for (host, way, _), n in meter.bins.items() if (host, way) == ("b", "in")) == 6_000_001
    assert sum(n for (host, way, _), n in meter.bins.items() if (host, way) == ("a", "out")) == 6_000_001


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two prefill hosts, a decode host and a store."""
    cluster = Cluster(prefill=2, decode=1, stores=1)
    regime = dataclasses.replace(REGIMES["reuse"], cluster=cluster)
    monkeypatch.setitem(regimes.REGIMES, "reuse", regime)
    monkeypatch.setattr(cells, "WARM_UP_S", 0.0)
    yield cluster
    assert not list(Path("/run/netns").glob(f"mfsd-{run_id()}-*"))
    assert not psutil.Process().children(), "daemons"


@pytest.mark.netns
@pytest.mark.bpf
def test_a_small_cluster_serves_its_requests_with_and_without_mfsd(small: Cluster) -> None:
    work = Work(2.0, load=0.3)
    wanted = jobs_.jobs(REGIMES["reuse"], work)
    with Network(small) as network:
        plain, governed = (cells.run(network, cells.Cell(arm, "reuse", work)) for arm in ("none", "ladder"))
        namespace = f"mfsd-{run_id()}-{SWITCH}"
        stats = tool("tc", "-n", namespace, "-s", "class", "show", "dev", "p0")
        network.govern(dataclasses.replace(ARMS["ladder"], peers=True), "fifo")
        told = (network.governors["p0"].directory / "mfsd.toml").read_text()
        assert f'[[peer]]\nnetwork = "{network.fabric.hosts["d0"].address}"\nrate = "100mbit"\n' in told
        network.govern(ARMS["none"], "fifo")
        with pytest.raises(KeyError):
            _ = network.targets["p0"]
    for found in (plain, governed):
        assert found["collectives"]
        assert [r["id"] for r in found["requests"]] == [j.id for j in wanted]
        assert all(
            r["done"] is not None and r["done"] > r["computed"] > r["began"] >= r["at"] for r in found["requests"]
        )
        assert len(found["collectives"]) % small.steps == 0
        assert all(took > 0 for _, took, _ in found["collectives"])
        assert found["fetch_waits_s"]
        json.dumps(found)
    assert plain["hints"] == {}
    assert governed["hints"]["accepted"] > len(wanted)
    assert governed["hints"]["rejected"] == governed["hints"]["dropped"] == 0
    assert governed["counters"]["transfers_completed"] > 0
    sent = dict(re.findall(r"class htb (1:\d+).*?Sent \d+ bytes (\d+) pkt", stats, re.DOTALL))
    assert int(sent["1:2"]) > 0, "collectives carry the first class's mark"
    assert int(sent["1:3"]) > 0, "KV reuse does not"


@pytest.mark.netns
def test_a_cell_of_ones_own_from_the_command_line(tmp_path: Path) -> None:
    def lab(*args: str) -> subprocess.CompletedProcess[str]:
        # S603: ourselves. A process of its own, since the lab takes precedence over others.
        command = [sys.executable, "-m", "mfsd.daemon", "lab", "cell", "--out", str(tmp_path), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    wrong = lab("--rate", "10parsec")
    assert wrong.returncode == 2
    assert "'10parsec' is not a rate" in wrong.stderr
    sizes = ("--prefill", "2", "--decode", "1", "--stores", "1", "--instances", "1", "--rate", "100mbit")
    right = lab("--arm", "none", "--model", "llama-3-8b", *sizes, "--load", "0.3", "--duration", "3")
    assert right.returncode == 0, right.stderr
    (cell,) = json.loads((tmp_path / "cell.json").read_text())["cells"]
    assert cell["cluster"]["model"] == "llama-3-8b"
    assert (cell["cluster"]["prefill"], cell["cluster"]["rate"]) == (2, "100mbit")
    assert cell["requests"]
    assert set(cell["used"]) <= {f"{host} {way}" for host in ("p0", "p1", "d0", "s0") for way in ("in", "out")}
