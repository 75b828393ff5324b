# SPDX-License-Identifier: Apache-2.0
"""Wrappers of transports and of process groups, with a real daemon and real sockets.

The transports below the wrappers are stand-ins here that only note what they were asked; gloo, NIXL and Mooncake
themselves: tests/lab, where they are installed.
"""

from __future__ import annotations

import itertools
import socket
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import WAIT_S

from mfsd.client import Client, cookie_of
from mfsd.ground.model import Stage
from mfsd.integrations.mooncake import HintedEngine, HintedStore, Owner
from mfsd.integrations.nixl import HintedAgent, Peer, with_request
from mfsd.integrations.torch import mark_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.daemons import Running


MB = 1_000_000


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(target=running.target) as one:
        one.request("r", ttft_left_s=60)
        yield one


def transfers(running: Running, client: Client) -> list[tuple[str, Stage, float, bool]]:
    """(selector, stage, size, handed over) of all that is announced."""
    assert client.flush(WAIT_S)

    def read(e: Any) -> list[tuple[str, Stage, float, bool]]:
        out = []
        for s in e.books.sessions.values():
            for t in s.transfers.values():
                x = t.stream.selector
                where = f"{x.src}:{x.sport} -> {x.dst}:{x.dport}"
                out.append((where, t.stage, float(e.books.transfers.get(t, "size")), t.handed_over))
        return out

    return running.ask(read)


# --- torch ------------------------------------------------------------------------------------------------------------


def test_what_a_group_connects_is_marked_and_nothing_else(running: Running, client: Client) -> None:
    kept: list[socket.socket] = []

    def connect() -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            kept.append(socket.create_connection(server.getsockname()))
            kept.append(server.accept()[0])
        return "a group"

    connect()
    before = [cookie_of(s) for s in kept]
    assert mark_group(connect, client=client) == "a group"
    group = [cookie_of(s) for s in kept[2:]]
    mark_group(connect, client=client, stage=Stage.BACKGROUND)
    assert client.flush(WAIT_S)

    marks = running.marks()
    assert {c for c, stage in marks.items() if stage is Stage.COLLECTIVE} == set(group)
    assert not set(before) & set(marks)
    assert list(marks.values()).count(Stage.BACKGROUND) == 2
    for one in kept:
        one.close()


def test_a_group_that_fails_to_be_made_fails_as_it_does_without_us(client: Client) -> None:
    def fail() -> None:
        raise ConnectionError("no peers")

    with pytest.raises(ConnectionError, match="no peers"):
        mark_group(fail, client=client)


# --- NIXL -------------------------------------------------------------------------------------------------------------


class Descriptors(list[tuple[int, int, int]]):
    def descCount(self) -> int:  # noqa: N802 - as NIXL has it
        return len(self)


class Agent:
    name = "me"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.state = "PROC"

    def initialize_xfer(self, *args: Any, **_: Any) -> object:
        self.calls.append(f"initialize {args[0]}")
        return object()

    def transfer(self, _handle: object) -> str:
        self.calls.append("transfer")
        return "PROC"

    def check_xfer_state(self, _handle: object) -> str:
        return self.state

    def release_xfer_handle(self, _handle: object) -> None:
        self.calls.append("release")


def test_nixl_transfers_are_announced_before_they_start(running: Running, client: Client) -> None:
    inner = Agent()
    agent = HintedAgent(inner, client, {"p": Peer("127.0.0.1", (20000, 20099))})
    assert agent.name == "me"
    mine = Descriptors([(0, MB, 0), (MB, MB, 0)])
    with_request("r", stage=Stage.P2D)
    read = agent.initialize_xfer("READ", mine, mine, "p")
    assert transfers(running, client) == []
    agent.transfer(read)
    where = "127.0.0.1:20000-20099 -> 127.0.0.1:0-65535"
    assert transfers(running, client) == [(where, Stage.P2D, 2.0 * MB, False)]
    assert agent.check_xfer_state(read) == "PROC"
    assert not transfers(running, client)[0][3]
    inner.state = "DONE"
    agent.check_xfer_state(read)
    assert all(handed for *_, handed in transfers(running, client))
    with_request()
    write = agent.initialize_xfer("WRITE", mine, mine, "p")
    agent.transfer(write)
    assert ("127.0.0.1:0-65535 -> 127.0.0.1:20000-20099", Stage.BACKGROUND, 2.0 * MB, False) in transfers(
        running, client
    )
    agent.release_xfer_handle(write)
    assert not any(stage is Stage.BACKGROUND for _, stage, *_ in transfers(running, client))
    agent.transfer(agent.initialize_xfer("WRITE", mine, mine, "nobody that we know"))
    agent.transfer(agent.initialize_xfer("WRITE", None, None, "p"))  # what can't be measured is not announced
    assert inner.calls.count("transfer") == 4


# --- Mooncake ---------------------------------------------------------------------------------------------------------


class Engine:
    def __init__(self) -> None:
        self.result = 0
        self.seen: list[Any] = []

    def get_rpc_port(self) -> int:
        return 15001

    def transfer_sync_write(self, *args: Any) -> int:
        self.seen.append(args)
        return self.result

    batch_transfer_sync_write = transfer_sync_read = batch_transfer_sync_read = transfer_sync_write


def test_mooncake_transfers_are_announced_and_ended(
    running: Running, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Engine()
    engine = HintedEngine(inner, client)
    assert engine.get_rpc_port() == 15001
    during: list[Any] = []
    plain = Engine.transfer_sync_write

    def watched(self: Engine, *args: Any) -> int:
        during.extend(transfers(running, client))
        return plain(self, *args)

    for name in ("transfer_sync_write", "batch_transfer_sync_read"):
        monkeypatch.setattr(Engine, name, watched)
    assert engine.transfer_sync_write("127.0.0.1:15001", 1, 2, MB, mfsd=Owner("r", Stage.P2D)) == 0
    assert during == [("127.0.0.1:0-65535 -> 127.0.0.1:15000-17000", Stage.P2D, float(MB), False)]
    during.clear()
    inner.result = -1
    assert engine.batch_transfer_sync_read("127.0.0.1:15001", [1], [2], [MB, MB]) == -1
    assert during[-1] == ("127.0.0.1:15000-17000 -> 127.0.0.1:0-65535", Stage.BACKGROUND, 2.0 * MB, False)
    assert not any(stage is Stage.BACKGROUND for _, stage, *_ in transfers(running, client))  # it failed: cancelled
    assert inner.seen == [("127.0.0.1:15001", 1, 2, MB), ("127.0.0.1:15001", [1], [2], [MB, MB])]


class Store:
    def __init__(self, during: Callable[[], Any]) -> None:
        self.during = during
        self.seen: list[Any] = []

    def get(self, key: str) -> bytes:
        if key == "broken":
            raise ValueError(key)
        self.seen = self.during()
        return b"x"

    def get_replica_desc(self, key: str) -> list[Any]:
        del key
        return [Replica()]


class Replica:
    transport_endpoint, size = "127.0.0.1:17001", MB

    def is_memory_replica(self) -> bool:
        return True

    def get_memory_descriptor(self) -> Any:
        return self

    @property
    def buffer_descriptor(self) -> Any:
        return self


def test_blocks_of_a_store_are_stage_1_of_who_asks(running: Running, client: Client) -> None:
    inner = Store(lambda: transfers(running, client))
    store = HintedStore(inner, client, (17001, 17999))
    assert store.get("block") == b"x"
    assert inner.seen == []
    assert store.get("block", mfsd=Owner("r", Stage.KV_REUSE)) == b"x"
    assert inner.seen == [("127.0.0.1:17001-17999 -> 127.0.0.1:0-65535", Stage.KV_REUSE, float(MB), False)]
    assert all(handed for *_, handed in transfers(running, client))
    with pytest.raises(ValueError, match="broken"):
        store.get("broken", mfsd=Owner("r", Stage.KV_REUSE))


# --- no daemon --------------------------------------------------------------------------------------------------------


def test_without_a_daemon_everything_works_as_before() -> None:
    inner = Engine()
    with Client(target="unix:/nowhere/mfsd.sock") as nobody:
        for _ in itertools.repeat(None, 3):
            assert HintedEngine(inner, nobody).transfer_sync_write("no such host:1", 1, 2, MB) == 0
            assert HintedStore(Store(list), nobody).get("block", mfsd=Owner("never announced", Stage.P2D)) == b"x"
        agent = HintedAgent(Agent(), nobody, {"p": Peer("no such host")})
        agent.transfer(agent.initialize_xfer("READ", Descriptors([(0, 1, 0)]), None, "p"))
        assert mark_group(lambda: 7, client=nobody) == 7
