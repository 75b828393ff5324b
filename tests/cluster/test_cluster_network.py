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
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from support.labfakes import Voice, request

from mfsd.client import Cookie
from mfsd.daemon import config as configuration
from mfsd.daemon.config_bands import dscp_of
from mfsd.datapath.bpf.yielding import missing
from mfsd.ground.model import Stage
from mfsd.lab import run as cells
from mfsd.lab.arms import ARMS, Faults
from mfsd.lab.hosts.alarm import Alarm
from mfsd.lab.hosts.machine import real_time
from mfsd.lab.hosts.net import SWITCH, Fabric, LabError, run_id, tool
from mfsd.lab.network import HIGH, LEVELS_FROM, LOW, Network, marks
from mfsd.lab.requests import requests
from mfsd.lab.results.result import RESULT
from mfsd.lab.serving.hinter import Hinter
from mfsd.lab.serving.teller import Teller
from mfsd.lab.serving.wire import ARRIVAL, Ends
from mfsd.lab.settings import PRESETS, Conduit, Settings
from mfsd.policy.registry import make_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

GOVERNED = [a for a in ARMS.values() if a.policy]
REQUEST = request(7, 0, new=1000, slo=0.3)


def marked(arm: Any) -> dict[str, int]:
    """DSCP by band of a daemon that is told the arm's marks."""
    bands = {"levels": arm.levels, "dscp": {str(k): v for k, v in marks(arm, "classes").items()}}
    return dscp_of(configuration.parse({"bands": bands, "policy": {"name": arm.policy, **arm.params}}))


@pytest.mark.parametrize("arm", GOVERNED, ids=lambda a: a.name)
def test_the_switch_tells_apart_what_its_setting_says(arm: Any) -> None:
    assert marks(arm, "fifo") == {}
    classes = marked(arm)
    assert classes["control"] == classes["level 0"] == HIGH
    assert classes["background"] == classes["scavenger"] == LOW
    assert classes["default"] == 0
    assert classes[f"level {arm.levels - 1}"] == (LOW if arm.classes is not None else 0)
    levels = marks(arm, "levels")
    assert len(set(levels.values())) == len(levels) == arm.levels + 4
    assert min(levels.values()) == levels["control"] == LEVELS_FROM


@pytest.mark.parametrize("name", ["demand-bound", "ladder", "two-class", "mfs", "mfs-nop1", "sjf", "karuna"])
def test_collectives_go_into_the_first_class(name: str) -> None:
    arm = ARMS[name]
    level = make_policy(arm.policy, arm.levels, arm.params).unannounced()[Stage.COLLECTIVE]
    assert marked(arm)[f"level {level}"] == HIGH


def test_an_arm_may_say_which_levels_are_in_which_class() -> None:
    arm = dataclasses.replace(ARMS["ladder"], classes=(2, 4))
    chosen = marks(arm, "classes")
    assert [chosen[f"level {i}"] for i in range(5)] == [HIGH, HIGH, 0, 0, LOW]
    assert (chosen["control"], chosen["default"], chosen["scavenger"]) == (HIGH, 0, LOW)
    assert marks(arm, "fifo") == {}


def test_mfs_shares_the_first_class_between_p1_and_the_collectives() -> None:
    assert marked(ARMS["mfs"])["level 1"] == HIGH
    assert marked(ARMS["ladder"])["level 1"] == 0


@pytest.mark.parametrize(("name", "early"), [("two-class", 1), ("ladder", 3), ("mfs", 3)])
def test_a_class_per_band_has_unhinted_traffic_below_the_early_levels(name: str, early: int) -> None:
    levels = marks(ARMS[name], "levels")
    order = sorted(levels, key=levels.__getitem__)
    named = [f"level {i}" for i in range(5)]
    assert order == ["control", *named[:early], "default", *named[early:], "background", "scavenger"]


def _hinter(faults: Faults) -> tuple[Hinter, Voice]:
    voice = Voice()
    return Hinter(voice, 8, faults, 0), voice


CONDUIT = Conduit(0, "p0", "d0", Stage.P2D, 0)


def test_faults_are_what_they_say() -> None:
    hinter, heard = _hinter(Faults(lost=0.2, size=2.0))
    for step in range(2000):
        hinter.send(CONDUIT, Cookie(77), REQUEST, step, 10_000)
    assert 0.75 < len(heard.said) / 2000 < 0.85
    sizes = [args[2] for args, _ in heard.of("transfer")]
    assert min(sizes) >= 5000
    assert max(sizes) <= 20_000
    assert len(set(sizes)) > 1000
    hinter, heard = _hinter(Faults(marks_lost=0.2))
    for _ in range(1000):
        hinter.collective("p0", Cookie(77))
    assert 750 < len(heard.said) < 850
    assert {(method, args) for _, method, args, _ in heard.said} == {("mark", (Cookie(77), Stage.COLLECTIVE))}
    hinter, heard = _hinter(Faults(deadline=1.5))
    hinter.request(["p0", "d0"], REQUEST, 0.3, 0.1)
    ((_, told),) = heard.of("request")
    assert told["ttft_left_s"] == pytest.approx(0.45)
    assert not heard.of("request", "d0"), "it does not speak for d0"


def test_a_host_hears_of_a_pass_only_while_it_has_bytes_of_it() -> None:
    hinter, heard = _hinter(Faults())
    hinter.batch({"p0": [REQUEST]}, "b", 0.01)
    hinter.layer("b", 1)
    hinter.sent("p0", REQUEST)
    hinter.layer("b", 2)
    hinter.computed("b")
    assert [method for _, method, _, _ in heard.said] == ["batch", "layer", "done"]
    hinter.batch({"p0": [REQUEST]}, "c", 0.01)  # nothing of it is left there
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
            with pytest.raises(LabError, match="the process of the hints has ended early"):
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


def test_an_alarm_is_finer_than_the_event_loops_own_timers() -> None:
    async def main() -> list[float]:
        alarm, took = Alarm(), []
        for _ in range(30):
            before = time.monotonic()
            late = await alarm.sleep(0.0003)
            took.append(time.monotonic() - before)
            assert took[-1] >= 0.0003
            assert 0 <= late <= took[-1]
        alarm.close()
        return took

    assert min(asyncio.run(main())) < 0.0009, "epoll_wait would have taken a millisecond"


@pytest.mark.netns
def test_frames_arrive_whole_and_in_order_and_are_recorded() -> None:
    async def main(fabric: Fabric) -> Any:
        seen: list[tuple[str, int, int]] = []
        conduits = [Conduit(0, "a", "b", Stage.P2D, 0), Conduit(1, "b", "a", Stage.KV_REUSE, 2)]
        with Ends(conduits, fabric.hosts, ["a", "b"]) as ends:
            ends.listen()
            ends.connect()
            ends.deliver[Stage.P2D, 0] = lambda key, step, _at: seen.append(("P2D", key, step))
            ends.deliver[Stage.KV_REUSE, 2] = lambda key, step, _at: seen.append(("KV_REUSE", key, step))
            (there,), (back,) = ends.of(Stage.P2D, 0, "a", "b"), ends.group(Stage.KV_REUSE, 2)
            for i in range(20):
                there.put(7, i, 300_000 + i, functools.partial(seen.append, ("written", 7, i)))
            back.put(9, 1, 5)
            assert there.queued > 5_000_000
            while len(seen) < 41 or there.queued:  # noqa: ASYNC110 - sockets have no such event
                await asyncio.sleep(0.01)
            return seen, np.array(ends.arrivals, dtype=ARRIVAL)

    with Fabric(["a", "b"]) as fabric:
        seen, rows = asyncio.run(asyncio.wait_for(main(fabric), 20))
    for what in ("P2D", "written"):
        assert [step for w, _, step in seen if w == what] == list(range(20))
    assert ("KV_REUSE", 9, 1) in seen
    assert rows["size"][rows["conduit"] == 0].sum() == sum(300_000 + i for i in range(20))
    assert set(rows["key"][rows["conduit"] == 0]) == {7}
    assert rows[rows["conduit"] == 1][["key", "size"]].tolist() == [(9, 5)]


@pytest.fixture
def small() -> Iterator[Settings]:
    """Two prefill hosts, a decode host and a store."""
    reuse = PRESETS["reuse"].settings
    yield dataclasses.replace(reuse, prefill=2, decode=1, stores=1, instances=1, warm_up=0.0, duration=3.0, load=0.3)
    assert not list(Path("/run/netns").glob(f"mfsd-{run_id()}-*"))
    assert not psutil.Process().children(), "daemons"


@pytest.mark.netns
@pytest.mark.bpf
def test_a_small_cluster_serves_its_requests_with_and_without_mfsd(small: Settings) -> None:
    wanted = requests(small)
    with Network(small) as network:
        plain, governed = (cells.run(network, dataclasses.replace(small, arm=arm))[0] for arm in ("none", "ladder"))
        namespace = f"mfsd-{run_id()}-{SWITCH}"
        stats = tool("tc", "-n", namespace, "-s", "class", "show", "dev", "p0")
        apart = cells.run(network, dataclasses.replace(small, transport="sockets"))[0]
        network.govern(dataclasses.replace(ARMS["ladder"], peers=True), dataclasses.replace(small, switch="fifo"))
        told = tomllib.loads((network.governors["p0"].directory / "mfsd.toml").read_text())
        assert told["peer"] == [{"network": f"{network.fabric.hosts['d0'].address}/32", "rate": "100mbit"}]
        assert told["device"][0]["control_unhinted"] is True
        assert told["network"]["yield"] == "off"
        if not missing():
            network.govern(ARMS["two-class-yield"], dataclasses.replace(small, switch="fifo"))
            assert not [n for g in network.governors.values() for n in g.status().notices if "yield" in n]
            told = tomllib.loads((network.governors["p0"].directory / "mfsd.toml").read_text())
            assert told["network"]["yield"] == "on"
        network.govern(ARMS["none"], small)
        with pytest.raises(KeyError):
            _ = network.targets["p0"]
    for found in (plain, governed, apart):
        assert [r.id for r in found.requests] == [r.id for r in wanted]
        for r in found.requests:
            assert r.began is not None
            assert r.computed is not None
            assert r.done is not None
            assert r.done > r.computed > r.began >= r.at
        assert found.collectives
        assert len(found.collectives) % small.steps == 0
        assert all(took > 0 for _, took, _ in found.collectives)
        assert found.fetch_waits
        assert set(found.used) == {f"{host} {way}" for host in small.hosts for way in ("in", "out")}
        assert RESULT.validate_json(RESULT.dump_json(found)) == found
    # However they were batched, all tokens have been exchanged, and in both ways of playing.
    tokens = sum(r.new for r in wanted)
    for found in (plain, governed, apart):
        moved = sum(size for _, _, size in found.collectives)
        assert moved == pytest.approx(small.steps * small.scaled.exchange(tokens), rel=0.01)
    assert plain.hints == {}
    assert governed.hints["accepted"] > len(wanted)
    assert governed.hints["rejected"] == governed.hints["dropped"] == 0
    assert governed.counters["transfers_completed"] > 0
    sent = dict(re.findall(r"class htb (1:\d+).*?Sent \d+ bytes (\d+) pkt", stats, re.DOTALL))
    assert int(sent["1:2"]) > 0, "collectives carry the first class's mark"
    assert int(sent["1:3"]) > 0, "KV reuse does not"


@pytest.mark.netns
def test_a_serving_process_that_dies_is_the_end_of_the_run(small: Settings) -> None:
    sockets = dataclasses.replace(small, transport="sockets")

    def kill(_seconds: float) -> None:
        psutil.Process().children()[-1].kill()

    with Network(sockets) as network, pytest.raises(LabError, match=r"the process of \w\d has ended early"):
        cells.run(network, sockets, kill)


@pytest.mark.netns
def test_a_cell_of_ones_own_from_the_command_line(tmp_path: Path) -> None:
    def lab(*args: str) -> subprocess.CompletedProcess[str]:
        # A process of its own, since the lab takes precedence over others.
        command = [sys.executable, "-m", "mfsd.lab", "cell", "--out", str(tmp_path), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    sizes = ("--prefill", "2", "--decode", "1", "--stores", "1", "--instances", "1", "--rate", "100mbit")
    done = lab("--arm", "none", "--model", "llama-3-8b", *sizes, "--load", "0.3", "--duration", "3")
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "cell.json").read_text())
    assert data["policies"]["none"]["0"]["requests"] > 0
    told = data["settings"]
    assert (told["model"], told["prefill"], told["rate"], told["stores"]) == ("llama-3-8b", "2", "100mbit", "1")
    (path,) = (tmp_path / "cell").glob("*.json")
    cell = RESULT.validate_json(path.read_bytes())
    assert set(cell.used) == {f"{host} {way}" for host in ("p0", "p1", "d0", "s0") for way in ("in", "out")}
    assert "fair sharing (no mfsd)" in done.stdout
    assert "data:image/png" in (tmp_path / "cell.html").read_text()
