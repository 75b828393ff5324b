# SPDX-License-Identifier: Apache-2.0
"""The second way for reads of vLLM's pull connector.

NIXL's agent is a stand-in here, which can be made to fail; the real one: scripts/vllm_handoff.py, case express, and
make e2e-vllm.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.vllm import PullConnector

from mfsd.integrations.vllm import MfsdConnector
from mfsd.integrations.vllm.express import DUE, Express, second
from mfsd.integrations.vllm.hold import LONGEST_S

if TYPE_CHECKING:
    from support.daemons import Running


@dataclass
class Settings:
    """As nixl_agent_config."""

    backends: list[str]
    capture_telemetry: bool


nixl_agent_config = Settings


@dataclass(eq=False)
class Handle:
    agent: Agent
    what: tuple[Any, ...]
    state: str = "PROC"
    released: bool = False


class Agent:
    def __init__(self, name: str = "usual", config: Settings | None = None) -> None:
        self.name, self.config = name, config
        self.backends = {"UCX": object()}
        self.registered: list[Any] = []
        self.remote: list[Any] = []
        self.prepared: dict[str, tuple[Any, ...]] = {}
        self.asked: list[Handle] = []
        self.broken = False

    def _works(self) -> None:
        if self.broken:
            raise RuntimeError("no")

    def register_memory(self, descs: Any, backends: Any = None) -> Any:
        self._works()
        del backends
        self.registered.append(descs)
        return descs

    def deregister_memory(self, descs: Any) -> None:
        self._works()
        self.registered.remove(descs)

    def add_remote_agent(self, metadata: Any) -> str:
        self._works()
        self.remote.append(metadata)
        return f"remote {metadata}"

    def remove_remote_agent(self, name: str) -> None:
        self._works()
        self.remote.remove(name.removeprefix("remote "))

    def prep_xfer_dlist(self, name: str, descs: Any) -> str:
        self._works()
        handle = f"{self.name} {name} {len(self.prepared)}"
        self.prepared[handle] = (name, descs)
        return handle

    def release_dlist_handle(self, handle: str) -> None:
        self._works()
        del self.prepared[handle]

    def make_prepped_xfer(
        self, operation: str, mine: Any, mine_ids: Any, theirs: Any, theirs_ids: Any, notif_msg: bytes = b""
    ) -> Handle:
        self._works()
        assert mine in self.prepared
        assert theirs in self.prepared
        return Handle(self, (operation, list(mine_ids), list(theirs_ids), notif_msg))

    def transfer(self, handle: Handle) -> str:
        self._works()
        assert handle.agent is self
        self.asked.append(handle)
        return "PROC"

    def check_xfer_state(self, handle: Handle) -> str:
        assert handle.agent is self
        return handle.state

    def get_xfer_telemetry(self, handle: Handle) -> Any:
        assert handle.agent is self
        return handle.what

    def release_xfer_handle(self, handle: Handle) -> None:
        assert handle.agent is self
        if handle.state == "STUCK":
            raise RuntimeError("its bytes may still come")
        handle.released = True

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        return {self.name: [b"x"]}


@dataclass
class Rig:
    """Both agents, and descriptors of here and of one prefill host."""

    usual: Agent = field(default_factory=Agent)
    other: Agent = field(default_factory=lambda: Agent("express"))

    def __post_init__(self) -> None:
        self.express = Express(self.usual, self.other)
        self.express.register_memory("kv", backends=["UCX"])
        self.mine = self.express.prep_xfer_dlist("NIXL_INIT_AGENT", "mine")
        self.name = self.express.add_remote_agent("p0")
        self.theirs = self.express.prep_xfer_dlist(self.name, "theirs")

    def due(self, **left: float) -> None:
        """Reads by these names are due in so many seconds; the prefill host has other names for them."""
        entries = {name: SimpleNamespace(remote=SimpleNamespace(request_id=f"p-{name}")) for name in left}
        self.express.hear(SimpleNamespace(reqs_to_recv=entries, **{DUE: left}), time.monotonic())

    def read(self, name: str, theirs: Any = None) -> Any:
        ours = self.theirs if theirs is None else theirs
        one = self.express.make_prepped_xfer("READ", self.mine, [1, 2], ours, [3, 4], notif_msg=f"p-{name}:1".encode())
        assert self.express.transfer(one) == "PROC"
        return one

    def ways(self, *reads: Any) -> list[str]:
        return [read.agent.name for read in reads]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_only_who_is_due_before_one_on_its_way_goes_by_the_second_agent(rig: Rig) -> None:
    rig.due(loose=7.0, tight=0.5, looser=7.5, tighter=0.2)
    loose, tight, looser = (rig.read(name) for name in ("loose", "tight", "looser"))
    assert rig.ways(loose, tight, looser) == ["usual", "express", "usual"]
    assert rig.other.asked[0].what == ("READ", [1, 2], [3, 4], b"p-tight:1")
    assert rig.express.get_xfer_telemetry(tight) == rig.other.asked[0].what
    for one in (loose, looser):
        assert rig.express.check_xfer_state(one) == "PROC"
        one.handle.state = "DONE"
        assert rig.express.check_xfer_state(one) == "DONE"
    tighter = rig.read("tighter")
    assert rig.ways(tighter) == ["usual"]
    for one in (loose, tight, looser, tighter):
        rig.express.release_xfer_handle(one)
    assert all(h.released for h in (*rig.usual.asked, *rig.other.asked))
    assert not any(rig.express._going.values())


def test_reads_from_another_host_are_in_nobody_s_way(rig: Rig) -> None:
    theirs = rig.express.prep_xfer_dlist(rig.express.add_remote_agent("p1"), "theirs")
    rig.due(loose=7.0, tight=0.5)
    assert rig.ways(rig.read("loose"), rig.read("tight", theirs)) == ["usual", "usual"]


def test_who_can_t_be_cancelled_is_still_on_its_way(rig: Rig) -> None:
    rig.due(loose=7.0, tight=0.5)
    loose = rig.read("loose")
    loose.handle.state = "STUCK"
    with pytest.raises(RuntimeError, match="may still come"):
        rig.express.release_xfer_handle(loose)
    assert rig.ways(rig.read("tight")) == ["express"]


def test_nobody_s_due_time_is_later_than_its_blocks_are_kept(rig: Rig) -> None:
    rig.due(patient=600.0)
    for name in ("patient", "unknown"):
        assert rig.read(name).due <= time.monotonic() + LONGEST_S


def test_what_is_undone_is_undone_with_both(rig: Rig) -> None:
    rig.due(loose=7.0)
    rig.express.release_xfer_handle(rig.read("loose"))
    for handle in (rig.mine, rig.theirs):
        rig.express.release_dlist_handle(handle)
    rig.express.remove_remote_agent(rig.name)
    rig.express.deregister_memory("kv")
    for agent in (rig.usual, rig.other):
        assert not agent.prepared
        assert not agent.remote
        assert not agent.registered
    assert rig.express.get_new_notifs() == {"usual": [b"x"]}


@pytest.mark.parametrize("when", ["memory", "peer", "descriptors", "read"])
def test_if_the_second_one_fails_all_goes_the_usual_way(when: str, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.due(loose=7.0, tight=0.5, next=0.4)
    rig.read("loose")
    before = rig.read("tight")
    assert rig.ways(before) == ["express"]
    rig.other.broken = True
    theirs = rig.theirs
    if when == "memory":
        rig.express.register_memory("more")
    elif when == "peer":
        rig.express.add_remote_agent("p2")
    elif when == "descriptors":
        theirs = rig.express.prep_xfer_dlist(rig.name, "more")
    assert rig.ways(rig.read("next", theirs)) == ["usual"]
    assert "no second way any more" in caplog.text
    before.handle.state = "DONE"  # what has begun may end
    assert rig.express.check_xfer_state(before) == "DONE"
    rig.express.release_dlist_handle(theirs)


def test_a_read_that_the_second_one_can_t_begin_goes_the_usual_way(rig: Rig) -> None:
    rig.due(loose=7.0, tight=0.5, next=0.4)
    rig.read("loose")
    tight = rig.express.make_prepped_xfer("READ", rig.mine, [1, 2], rig.theirs, [3, 4], notif_msg=b"p-tight:1")
    assert rig.ways(tight) == ["express"]
    failed = tight.handle
    rig.other.broken = True
    assert rig.express.transfer(tight) == "PROC"
    assert rig.ways(tight) == ["usual"]
    assert rig.usual.asked[-1].what == ("READ", [1, 2], [3, 4], b"p-tight:1")
    assert failed.released
    assert rig.ways(rig.read("next")) == ["usual"]
    rig.express.release_xfer_handle(tight)
    assert tight not in rig.express._going[rig.theirs]


def test_if_one_fails_on_its_second_way_the_next_ones_go_the_usual_way(rig: Rig) -> None:
    rig.due(loose=7.0, tight=0.5, next=0.4)
    rig.read("loose")
    tight = rig.read("tight")
    tight.handle.state = "ERR"
    assert (
        rig.express.check_xfer_state(tight) == "ERR"
    )  # what has begun may still write: its blocks are vLLM's to see to
    assert rig.ways(tight, rig.read("next")) == ["express", "usual"]


class Pulls(PullConnector):
    """Both sides in one, as NIXL's pull connector has them."""

    def __init__(self, extra: dict[str, Any], role: str = "kv_consumer") -> None:
        super().__init__(extra)
        self._vllm_config.kv_transfer_config.kv_role = role
        self.connector_worker = SimpleNamespace(nixl_wrapper=Agent())

    def register_kv_caches(self, kv_caches: Any) -> None:
        self.connector_worker.nixl_wrapper.register_memory(kv_caches)

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        del forward_context


class Pull(MfsdConnector, Pulls):
    def expect(self, name: str, left_s: float) -> None:
        self.loads(name, left_s, SimpleNamespace(remote=SimpleNamespace(request_id=f"p-{name}")))

    def step(self) -> None:
        self._connector_metadata = self.build_connector_meta(SimpleNamespace(scheduled_new_reqs=[]))
        self.start_load_kv(None)


class Pushes(Pull):
    mfsd_push = True


def test_workers_hear_from_the_scheduler_when_reads_are_due(running: Running) -> None:
    pull = Pull({"mfsd_target": running.target, "mfsd_express": True})
    with contextlib.closing(SimpleNamespace(close=pull.shutdown)):
        usual = pull.connector_worker.nixl_wrapper
        pull.register_kv_caches("kv")
        express = pull.connector_worker.nixl_wrapper
        assert isinstance(express, Express)
        assert express._other is not usual
        assert express._other.config == Settings(["UCX"], capture_telemetry=True)
        assert usual.registered == express._other.registered == ["kv"]
        pull.expect("loose", 6.0)
        pull.expect("tight", 0.5)
        pull.step()
        mine, theirs = (express.prep_xfer_dlist(name, name) for name in ("NIXL_INIT_AGENT", "p"))
        loose, tight = (
            express.make_prepped_xfer("READ", mine, [1], theirs, [1], notif_msg=f"p-{name}:1".encode())
            for name in ("loose", "tight")
        )
        assert loose.due - tight.due == pytest.approx(5.5, abs=0.2)


@pytest.mark.parametrize(
    ("kind", "extra", "role"),
    [
        (Pull, {}, "kv_consumer"),
        (Pushes, {"mfsd_express": True}, "kv_consumer"),
        (Pull, {"mfsd_express": True}, "kv_producer"),
    ],
)
def test_the_agent_is_left_alone_where_it_is_not_wanted_or_nothing_is_read(
    running: Running, kind: type[Pull], extra: dict[str, Any], role: str
) -> None:
    pull = kind({"mfsd_target": running.target} | extra, role)
    with contextlib.closing(SimpleNamespace(close=pull.shutdown)):
        pull.register_kv_caches("kv")
        pull.expect("one", 1.0)
        pull.step()
        assert isinstance(pull.connector_worker.nixl_wrapper, Agent)


def test_an_agent_of_its_kind_with_a_name_of_its_own() -> None:
    one, other = second(Agent()), second(Agent())
    assert isinstance(one, Agent)
    assert one.name != other.name
