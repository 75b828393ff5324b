# SPDX-License-Identifier: Apache-2.0
"""Rules in a running daemon: in force, explained, reloaded."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from support.daemons import Api, Running, connected
from support.privileges import DAEMON, call_with
from support.waiting import WAIT_S, wait_for

from mfsd.client import cookie_of
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import hints_pb2

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    Pair = tuple[socket.socket, socket.socket]


def rule(name: str, port: int, stage: str = "collective", **more: Any) -> dict[str, Any]:
    return {"name": name, "stage": stage, "remote_ports": port} | more


@pytest.fixture
def ruled(start: Callable[..., Running], connection: Pair) -> tuple[Running, int]:
    """A daemon with rules, and the port that they name."""
    port = connection[1].getsockname()[1]
    rules = [
        rule("exchange", port),
        rule("elsewhere", port + 1, "background", user=str(os.getuid() + 1), unit="no-such.service"),
        rule("nobody", 1, user="no-such-user"),
        {"name": "answers", "stage": "p2d", "local_ports": port, "ordered": False, "deadline_ms": 20.0},
    ]
    return start(rule=rules, rules={"library": ["redis"]}), port


@pytest.fixture
def stubs(ruled: tuple[Running, int], reach: Callable[[Running], Api]) -> Api:
    return reach(ruled[0])


def listed(stubs: Api, **request: int) -> pb.ListRulesReply:
    return stubs.control.ListRules(pb.ListRulesRequest(**request), timeout=WAIT_S)


def test_rules_are_listed_with_what_they_name(stubs: Api, ruled: tuple[Running, int]) -> None:
    port = ruled[1]
    wait_for(lambda: listed(stubs).rules[0].connections)
    rules = listed(stubs).rules
    assert [(r.name, r.source, r.connections) for r in rules] == [
        ("exchange", "configuration", 1),
        ("elsewhere", "configuration", 0),
        ("nobody", "configuration", 0),
        ("answers", "configuration", 1),
        ("redis: answers", "library redis", 0),
    ]
    assert rules[0].conditions == f"remote port {port}"
    assert rules[1].conditions == f"remote port {port + 1}, cgroup */no-such.service, user {os.getuid() + 1}"
    assert (rules[3].stage, rules[3].interleaved, rules[3].deadline_us) == (hints_pb2.STAGE_P2D, True, 20_000)
    assert rules[2].problem == "there is no user 'no-such-user' on this host"
    notices = stubs.control.GetStatus(pb.GetStatusRequest()).notices
    assert "rule 'nobody' names nothing: there is no user 'no-such-user' on this host" in notices


def test_why_a_rule_names_a_connection_or_not(stubs: Api, connection: Pair, ruled: tuple[Running, int]) -> None:
    port = ruled[1]
    wait_for(lambda: listed(stubs).rules[0].connections)
    verdicts = listed(stubs, cookie=cookie_of(connection[0])).verdicts
    told = {v.rule: list(v.failing) for v in verdicts}
    assert told["exchange"] == []
    assert told["elsewhere"] == [
        f"its remote port {port} is not {port + 1}",
        f"its user is {os.getuid()}; it must be {os.getuid() + 1}",
        "nobody knows who made it; cgroup */no-such.service means others",
    ]
    assert told["nobody"] == ["there is no user 'no-such-user' on this host"]
    both = {v.cookie for v in listed(stubs, port=port).verdicts}
    assert both == {cookie_of(connection[0]), cookie_of(connection[1])}
    with pytest.raises(grpc.RpcError) as e:
        listed(stubs, cookie=1 << 60)
    assert e.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_worker_can_not_use_the_session_of_the_rules(stubs: Api) -> None:
    stubs.session = "mfsd:rules"
    with pytest.raises(grpc.RpcError) as e:
        stubs.send(hints_pb2.Hint(request=hints_pb2.Request(id="r", ttft_left_us=1)))
    assert e.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_rules_change_with_a_reload(start: Callable[..., Running], tmp_path: Path) -> None:
    with connected() as (one, _), connected() as (two, _):
        ports = [s.getpeername()[1] for s in (one, two)]
        running = start(rule=[rule("a", ports[0]), rule("b", ports[1], "background")])

        def stage(sock: socket.socket) -> int:
            cookie = cookie_of(sock)

            def look(engine: Any) -> int:
                conn = engine.connections.by_cookie.get(cookie)
                return 0 if conn is None or not conn.marks else int(next(iter(conn.marks)).stage)

            return running.ask(look)

        wait_for(lambda: (stage(one), stage(two)) == (2, 4))
        file = tmp_path / "mfsd.toml"
        running.daemon.path = file

        def reload(text: str) -> None:
            file.write_text(f'[daemon]\nsocket = "{running.socket}"\nstate_dir = "{tmp_path}"\n{text}')
            asyncio.run_coroutine_threadsafe(running.daemon.reload(), running.loop).result(WAIT_S)

        reload(f'[[rule]]\nname = "a"\nstage = "p2d"\nremote_ports = {ports[0]}\n')
        wait_for(lambda: (stage(one), stage(two)) == (3, 0))
        assert [r.name for r in running.daemon.rules] == ["a"]
        assert running.daemon.notices()[1:] == []
        reload('[[rule]]\nname = "a"\nstage = "p2d"\n')
        assert any("names no connection" in n for n in running.daemon.notices())
        assert stage(one) == 3
        reload("")
        wait_for(lambda: (stage(one), stage(two)) == (0, 0))


def test_a_rule_by_executable_is_named_where_the_programs_of_others_are_hidden(
    start: Callable[..., Running], reach: Callable[[Running], Api]
) -> None:
    """The unit gives the daemon two capabilities, with which /proc/PID/exe of other users' processes can't be read."""
    by_program = {"name": "program", "stage": "collective", "executable": "python*"}
    running = call_with(DAEMON, lambda: start(rule=[by_program, rule("port", 7)]))
    stubs = reach(running)
    program, port = listed(stubs).rules
    assert "CAP_SYS_PTRACE" in program.problem
    assert not port.problem
    assert f"rule 'program' names nothing: {program.problem}" in stubs.control.GetStatus(pb.GetStatusRequest()).notices
