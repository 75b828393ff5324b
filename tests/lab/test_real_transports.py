# SPDX-License-Identifier: Apache-2.0
"""The lab over gloo and Mooncake's transfer engine: everything but these, which are an extra."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import Any

import numpy as np
import pytest
from support.labfakes import Voice, request

from mfsd.client import tuple_of
from mfsd.ground.model import Stage
from mfsd.lab.arms import Faults
from mfsd.lab.hosts.net import Host
from mfsd.lab.serving.driver import Part
from mfsd.lab.serving.forward import Inbox, Log
from mfsd.lab.serving.hinter import Hinter
from mfsd.lab.serving.mooncake import PORTS, SLICE, Memory, Watch
from mfsd.lab.serving.real import Real, RealSide
from mfsd.lab.settings import PRESETS

SETTINGS = dataclasses.replace(PRESETS["real"].settings, arm="ladder", steps=4)
SCALED = SETTINGS.scaled
WORK = [request(0, 0, new=60_000), request(1, 1, new=300)]


def test_regions_lie_side_by_side_and_every_slice_is_watched() -> None:
    memory = Memory.of(WORK, SCALED)
    large, small = (SCALED.kv(r.tokens) for r in WORK)
    assert large > 2 * SLICE > SLICE > small
    assert memory.total == 4 * (large + small)
    assert memory.offset(0, 3) + large == memory.offset(1, 0)
    marks = memory.marks(0)
    assert marks[0] == SLICE - 1
    assert marks[-1] == 4 * large - 1
    assert len(marks) == 4 * -(-large // SLICE)
    assert memory.marks(1).tolist() == [4 * large + small * (i + 1) - 1 for i in range(4)]


def test_a_request_is_complete_when_its_last_slice_is_there_wherever_that_lies() -> None:
    memory = Memory.of(WORK, SCALED)
    data = np.zeros(memory.total, dtype=np.uint8)
    watch = Watch(memory, data)
    watch.expect(0)
    data[memory.offset(1, 0) :] = 1  # nobody has asked for it yet
    hole = memory.offset(0, 1)
    data[:hole] = data[hole + SLICE : memory.offset(1, 0)] = 1
    ((number, before, complete),) = watch.look()
    assert (number, complete) == (0, False)
    data[hole : hole + SLICE] = 1
    watch.expect(1)
    found = {number: (size, complete) for number, size, complete in watch.look()}
    assert found[1] == (memory.total - memory.offset(1, 0), True)
    assert found[0][1]
    assert before + found[0][0] == pytest.approx(memory.offset(1, 0), abs=1)
    assert watch.look() == []


class Side(RealSide):
    """A rank whose transports move nothing: a read or write ends when the test says so."""

    def __init__(self, voice: Voice) -> None:
        hosts = {name: Host(name, name, f"10.0.0.{i}") for i, name in enumerate(SETTINGS.hosts, 1)}
        super().__init__(Part("p0", None, SETTINGS, hosts, {}, WORK), Log())  # type: ignore[arg-type]  # no directory
        self.moved: list[tuple[str, str, int, int]] = []
        self.gates: list[threading.Event] = []
        self.hinter = Hinter(voice, 4, Faults(), 0)
        self.group: Any = self
        self.totals = [170]

    async def total(self, number: int) -> int:
        self.asked = number
        return self.totals.pop(0)

    def _move(self, *what: Any) -> None:
        self.moved.append(what)
        self.gates.append(threading.Event())
        assert self.gates[-1].wait(10)

    def read(self, holder: str, size: int) -> None:
        self._move("read", holder, 0, size)

    def write(self, decode: str, offset: int, size: int) -> None:
        self._move("write", decode, offset, size)


async def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


def test_cached_kv_is_read_two_steps_at_a_time_announced_beforehand_and_done_in_any_order() -> None:
    async def main() -> None:
        voice = Voice(("p0", "s0"))
        side = Side(voice)
        transport = Real(side, side.hinter)
        assert voice.of("mark") == [((tuple_of("10.0.0.2", 0), Stage.COLLECTIVE), {})]
        cached = request(0, 0, held={"s0": 3000})
        transport.fetch(cached)
        store = tuple_of("10.0.0.1", 0, "10.0.0.4", PORTS)
        told = voice.of("transfer", "s0")
        assert [(args[1], args[2], k["layer"]) for args, k in told] == [(store, SCALED.kv(3000), i) for i in range(4)]
        await until(lambda: len(side.moved) == 2)
        await asyncio.sleep(0.02)
        assert side.moved == [("read", "s0", 0, SCALED.kv(3000))] * 2, "two at a time"
        second = asyncio.create_task(transport.fetched(cached, 1))
        first = asyncio.create_task(transport.fetched(cached, 0))
        side.gates[1].set()
        await until(second.done)
        await asyncio.sleep(0.02)
        assert not first.done(), "a later step does not stand for this one"
        side.gates[0].set()
        await until(first.done)
        await until(lambda: len(side.gates) == 4)
        for gate in side.gates:
            gate.set()
        for step in (2, 3):
            await transport.fetched(cached, step)
        await until(lambda: len(voice.of("done", "s0")) == 5)
        done = [k for _, k in voice.of("done", "s0")]
        assert [k.get("transfer") for k in done[:2]] == [told[1][0][0], told[0][0][0]], "in the order in which they end"
        assert done[-1] == {"request": "r0"}

    asyncio.run(main())


def test_kv_is_written_to_the_regions_of_its_steps() -> None:
    async def main() -> None:
        voice = Voice(("p0", "s0"))
        side = Side(voice)
        transport, memory = Real(side, side.hinter), Memory.of(WORK, SCALED)
        for step in range(4):
            transport.hand_over(WORK[0], step)
        await until(lambda: len(side.gates) == 4)
        assert sorted(offset for _, _, offset, _ in side.moved) == [memory.offset(0, step) for step in range(4)]
        assert {(what, where, size) for what, where, _, size in side.moved} == {("write", "d0", SCALED.kv(60_000))}
        for gate in side.gates:
            gate.set()
        await until(lambda: len(voice.of("done")) == 5)
        assert {args[1] for args, _ in voice.of("transfer")} == {tuple_of("10.0.0.3", PORTS)}
        assert side.log.conduit[0] in {c.number for c in SETTINGS.conduits() if (c.src, c.dst) == ("p0", "d0")}

    asyncio.run(main())


def test_a_pass_begins_when_any_rank_has_tokens() -> None:
    async def main() -> None:
        side = Side(Voice(()))
        transport, inbox = Real(side, side.hinter), Inbox(100)
        inbox.put(request(5, 0, new=70))
        batch, tokens = await transport.agree(inbox)
        assert ([r.id for r in batch], tokens) == ([5], 170)
        side.totals = [0, 0, 30]
        assert await transport.agree(inbox) == ([], 30), "another rank's"

    asyncio.run(main())
