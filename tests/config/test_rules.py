# SPDX-License-Identifier: Apache-2.0
"""Rules in the configuration: what is refused and with which words, what they become, and those that are shipped."""

from __future__ import annotations

import os
import tomllib
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest
from support import refused

from mfsd.daemon.config import load, parse, render
from mfsd.daemon.config_rules import CONDITIONS, in_force, of_library, shipped
from mfsd.daemon.rules import state_of
from mfsd.ground.model import INF, Maker, PortRange, RuleSelector, Stage

if TYPE_CHECKING:
    from pathlib import Path

KV: dict[str, Any] = {"name": "kv", "stage": "p2d"}


def problems(*rules: dict[str, Any], **sections: Any) -> list[str]:
    return refused.problems({"rule": list(rules)} | sections)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (KV, f"rule[0]: names no connection; give one of {', '.join(CONDITIONS)}"),
        ({"stage": "p2d", "pid": 1}, "rule[0].name = (unset): required; must be a text of 1 to 64 characters"),
        ({"name": "kv", "pid": 1}, 'rule[0].stage = (unset): required; must be "kv_reuse" or "collective" or "p2d" or'),
        (KV | {"stage": "store", "pid": 1}, 'rule[0].stage = "store": must be "kv_reuse" or "collective"'),
        (KV | {"local_ports": "1-0"}, 'rule[0].local_ports = "1-0": must be a port, or a range such as "15000-17000"'),
        (KV | {"local_ports": "0"}, 'rule[0].local_ports = "0": must be a port'),
        (KV | {"remote_ports": 65536}, "rule[0].remote_ports = 65536: must be a port"),
        (KV | {"remote_ports": "1-2-3"}, 'rule[0].remote_ports = "1-2-3": must be a port'),
        (KV | {"remote_ports": "²"}, 'rule[0].remote_ports = "²": must be a port'),
        (KV | {"remote": "10.0.0.1/8"}, 'rule[0].remote = "10.0.0.1/8": must be a network, e.g. "10.1.2.0/24"'),
        (KV | {"pid": 0}, "rule[0].pid = 0: must be a whole number from 1, at most 4194304"),
        (KV | {"thread": "x" * 16}, f'rule[0].thread = "{"x" * 16}": must be a pattern of at most 15 bytes'),
        (
            KV | {"cgroup": "system.slice"},
            'rule[0].cgroup = "system.slice": must be a pattern that begins with a slash',
        ),
        (KV | {"unit": "vllm"}, 'rule[0].unit = "vllm": must be the name of a unit, e.g. "vllm.service"'),
        (KV | {"user": ""}, 'rule[0].user = "": must be the name of a user'),
        (KV | {"user": "4294967295"}, 'rule[0].user = "4294967295": must be the name of a user, or a number'),
        (KV | {"user": "9" * 25}, f'rule[0].user = "{"9" * 25}": must be the name of a user'),
        (KV | {"user": "9" * 5000}, 'rule[0].user = "999'),
        (KV | {"user": "\u0661"}, 'rule[0].user = "\u0661": must be the name of a user'),
        (KV | {"pid": 1, "deadline_ms": 0.0}, "rule[0].deadline_ms = 0.0: must be a number of milliseconds above 0"),
        (KV | {"port": 1}, "rule[0].port = 1: unknown key; "),
        (
            KV | {"unit": "a.service", "cgroup": "/b"},
            'rule[0].unit = "a.service": give unit or cgroup, not both: a unit is a cgroup',
        ),
    ],
)
def test_what_is_wrong_with_a_rule_is_said(rule: dict[str, Any], text: str) -> None:
    found = problems(rule)
    assert len(found) == 1, found
    assert found[0].startswith(text)


def test_rules_are_checked_together() -> None:
    one = KV | {"remote_ports": 80}
    assert problems(one, one | {"remote_ports": 81}) == ['rule[1].name = "kv": each name once; rule[0] has it']
    assert problems(one, one | {"name": "b"}) == ["rule[1]: has the same conditions as rule[0]; leave one of them out"]
    (text,) = problems(rules={"library": ["redis", "rediss"]})
    assert text.startswith('rules.library = ["redis", "rediss"]: there is no "rediss"; shipped: gloo, lmcache, ')
    assert problems(rules={"library": ["redis"] * 2}) == [
        'rules.library = ["redis", "redis"]: "redis" stands there twice'
    ]


def test_what_is_printed_reads_back() -> None:
    rule = KV | {"remote": "fd00::/8", "remote_ports": "1-2", "local_ports": 3, "user": "0", "deadline_ms": 1.5}
    config = parse({"rule": [rule], "rules": {"library": ["redis"]}})
    assert parse(tomllib.loads(render(config))) == config


def test_what_a_rule_becomes() -> None:
    rule = KV | {
        "remote": "10.0.0.0/8", "remote_ports": "1-2", "local_ports": 3, "pid": 7, "executable": "redis-*",
        "thread": "NCCL*", "unit": "a.service", "user": "root", "ordered": False, "deadline_ms": 20.0,
    }  # fmt: skip
    ((source, one),) = in_force(parse({"rule": [rule]}).rule, ())
    state = state_of(source, one)
    assert state.selector == RuleSelector(
        Maker(7, "redis-*", "NCCL*", "*/a.service", 0), ip_network("10.0.0.0/8"), PortRange(3, 3), PortRange(1, 2)
    )
    assert (state.source, state.stage, state.ordered, state.due_in) == ("configuration", Stage.P2D, False, 0.02)
    (plain,) = parse({"rule": [KV | {"user": str(os.getuid())}]}).rule
    assert state_of("", plain).selector == RuleSelector(Maker(uid=os.getuid()))
    assert state_of("", plain).due_in == INF
    (nobody,) = parse({"rule": [KV | {"user": "no-such-user"}]}).rule
    assert state_of("", nobody).problem == "there is no user 'no-such-user' on this host"


@pytest.mark.parametrize("name", shipped())
def test_shipped_rules_are_right_and_say_what_was_verified(name: str) -> None:
    rules = of_library(name)
    config = parse({"rules": {"library": [name]}})
    assert [r.name for _, r in in_force(config.rule, config.rules.library)] == [r.name for r in rules]
    # As rules of one's own they pass the checks across rules, too.
    assert parse(tomllib.loads(shipped()[name].read_text())).rule == rules
    text = shipped()[name].read_text()
    assert "erified" in text or "not run" in text


def test_all_shipped_rules_have_names_of_their_own() -> None:
    names = [r.name for name in shipped() for r in of_library(name)]
    assert len(set(names)) == len(names)


def test_a_drop_in_adds_rules_and_changes_those_of_the_same_name(tmp_path: Path) -> None:
    main = tmp_path / "mfsd.toml"
    main.write_text('[[rule]]\nname = "a"\nstage = "p2d"\npid = 1\n')
    (tmp_path / "conf.d").mkdir()
    more = '[[rule]]\nname = "b"\nstage = "background"\npid = 2\n[[rule]]\nname = "a"\nstage = "collective"\n'
    (tmp_path / "conf.d" / "rules.toml").write_text(more)
    assert [(r.name, r.stage, r.pid) for r in load(main).rule] == [("a", "collective", 1), ("b", "background", 2)]
