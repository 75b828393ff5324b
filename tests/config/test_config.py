# SPDX-License-Identifier: Apache-2.0
"""Configuration: every key's error text, all problems at once, and a resolved view that reads back to the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.refused import only, problems

from mfsd.daemon import config_bands, config_text
from mfsd.daemon.config import Config, ConfigError, DeviceConfig, PeerConfig, RuleConfig, load, parse, render
from mfsd.ground.model import Mode
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
DEVICE = {"name": "eth0"}
PEER = {"network": "fd00::/8", "rate": "1gbit"}
RULE: dict[str, Any] = {"name": "kv", "stage": "p2d", "remote_ports": 6379}
LISTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "device": (DeviceConfig, DEVICE),
    "peer": (PeerConfig, PEER),
    "rule": (RuleConfig, RULE),
}
"""Sections that may come several times: their model, and one that is right."""


def _section(name: str) -> Any:
    return LISTS[name][0] if name in LISTS else type(getattr(Config(), name))


ALL_KEYS = [
    (section, key)
    for section in ("daemon", "device", "peer", "bands", "policy", "limits", "rescue", "rules", "relay", "rule")
    for key in _section(section).model_fields
]
NUMBERS = [
    (section, key)
    for section, key in ALL_KEYS
    if section != "policy" and _section(section).model_fields[key].annotation in (int, float)
]


def with_key(section: str, key: str, value: Any) -> dict[str, Any]:
    if section in LISTS:
        return {section: [LISTS[section][1] | {key: value}]}
    return {section: {key: value}}


def test_the_defaults_are_valid_and_observe() -> None:
    config = parse({})
    assert config == Config()
    assert config.daemon.mode is Mode.OBSERVE
    assert config.policy.name == "demand-bound"


@pytest.mark.parametrize(("section", "key"), ALL_KEYS)
def test_every_key_refuses_another_type_and_says_what_is_allowed(section: str, key: str) -> None:
    wrong = {"a": 1} if key != "dscp" else 1
    text = only(with_key(section, key, wrong)) if key != "floors" else only(with_key(section, key, 3))
    where = f"{section}[0].{key}" if section in LISTS else f"{section}.{key}"
    assert text.startswith(f"{where} = ")
    allowed = text.partition(": must be ")[2]
    assert len(allowed) > 3, text


@pytest.mark.parametrize(("section", "key"), NUMBERS)
def test_every_number_has_bounds_and_names_them(section: str, key: str) -> None:
    for value in (-1, 10**16, True, float("nan"), float("inf")):
        text = only(with_key(section, key, value))
        assert re.search(r"must be a (whole )?number (from|above) [\d.]+, at most [\d.e+]+$", text), text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"daemon": {"mode": "on"}}, 'daemon.mode = "on": must be "observe" or "enforce"'),
        (
            {"daemon": {"loader": "bpf"}},
            'daemon.loader = "bpf": must be "auto" or "libbpf" or "bcc"',
        ),
        ({"daemon": {"slots": "many"}}, 'daemon.slots = "many": must be a whole number from 16, at most 1048576'),
        ({"daemon": {"tick_ms": 0.5}}, "daemon.tick_ms = 0.5: must be a number from 1, at most 1000"),
        (
            {"daemon": {"socket": "mfsd.sock"}},
            'daemon.socket = "mfsd.sock": must be an absolute path of at most 104 bytes',
        ),
        (
            {"daemon": {"socket": "/" + "x" * 104}},
            f'daemon.socket = "/{"x" * 104}": must be an absolute path of at most 104 bytes',
        ),
        (
            {"daemon": {"socket": "/" + "x" * 99}},
            (
                f'daemon.socket = "/{"x" * 99}": at most 99 bytes, so that the metrics\' socket beside it has room; '
                'choose a shorter path, or metrics.listen = "off"'
            ),
        ),
        (
            {"daemon": {"listen": "localhost"}},
            ('daemon.listen = "localhost": must be "host:port" with a loopback address; others need the tls keys'),
        ),
        (
            {"daemon": {"listen": "0.0.0.0:50551"}},
            (
                'daemon.listen = "0.0.0.0:50551": must be a loopback address; set daemon.tls_cert, tls_key and '
                "tls_client_ca to let other hosts in"
            ),
        ),
        (
            {"daemon": {"tick_ms": 200, "idle_tick_ms": 100}},
            "daemon.idle_tick_ms = 100.0: must be at least daemon.tick_ms (200)",
        ),
        (
            {"daemon": {"heartbeat_timeout_ms": 200}},
            (
                "daemon.heartbeat_timeout_ms = 200.0: must be at least three heartbeats (300), or one late tick sends "
                "all traffic to the default band"
            ),
        ),
        ({"daemon": {"heartbeat": 3}}, "daemon.heartbeat = 3: unknown key; did you mean heartbeat_ms?"),
        ({"rescue": {"zzz": 1}}, "rescue.zzz = 1: unknown key; known: enabled, stall_ms, max_per_s"),
        ({"deamon": {}}, "deamon = {}: unknown key; did you mean daemon?"),
        ({"limits": 3}, "limits = 3: must be a section: [limits]"),
        ({"device": {"name": "eth0"}}, 'device = { name = "eth0" }: must be a section: [[device]]'),
        ({"device": [3]}, "device[0] = 3: must be a section: [[device]]"),
        (
            {"device": [{}]},
            (
                "device[0].name = (unset): required; must be the name of a network device: 1 to 15 characters, no '/' "
                "and no space"
            ),
        ),
        (
            {"device": [{"name": "much-too-long-a-name"}]},
            (
                'device[0].name = "much-too-long-a-name": must be the name of a network device: 1 to 15 characters, no '
                "'/' and no space"
            ),
        ),
        (
            {"device": [DEVICE | {"rate": "fast"}]},
            'device[0].rate = "fast": must be a rate above zero as tc writes it, e.g. "10gbit" or "950mbit"',
        ),
        (
            {"peer": [PEER | {"network": "10.0.0.1/8"}]},
            'peer[0].network = "10.0.0.1/8": must be a network, e.g. "10.1.2.0/24", or one address',
        ),
        (
            {"peer": [{"network": "10.0.0.0/8"}]},
            'peer[0].rate = (unset): required; must be a rate above zero as tc writes it, e.g. "10gbit" or "950mbit"',
        ),
        (
            {"device": [DEVICE | {"rate": "0mbit"}]},
            'device[0].rate = "0mbit": must be a rate above zero as tc writes it, e.g. "10gbit" or "950mbit"',
        ),
        ({"device": [DEVICE, DEVICE]}, 'device[1].name = "eth0": each device once; device[0] has this name'),
        (
            {"device": [DEVICE | {"backend": "htb"}], "bands": {"levels": 6}},
            "bands.levels = 6: at most 5 with backend htb (device[0]), which has 8 priorities",
        ),
        (
            {"bands": {"floors": [0.1, 2.0]}},
            "bands.floors[1] = 2.0: must be a list; each element a number from 0, at most 0.9",
        ),
        (
            {"bands": {"floors": [0.5, 0.3]}},
            "bands.floors = [0.5, 0.3]: all floors together are 0.98 of the link; at most 0.9",
        ),
        (
            {"bands": {"levels": 1, "floors": [0.1, 0.1]}},
            "bands.floors = [0.1, 0.1]: at most one per level (bands.levels = 1)",
        ),
        (
            {"bands": {"dscp": {"level 9": 46}}},
            (
                'bands.dscp."level 9" = 46: no such class or band; allowed: urgent, middle, last, or by band control, '
                "level 0, level 1, level 2, level 3, level 4, default, background, scavenger"
            ),
        ),
        (
            {"bands": {"dscp": {"urgent": 46, "level 0": 8}}},
            (
                'bands.dscp = { urgent = 46, "level 0" = 8 }: classes and bands together; give either code points by '
                "class (urgent, middle, last), or one for each band that is to be marked"
            ),
        ),
        (
            {"bands": {"dscp": {"level 0": 64}}},
            'bands.dscp."level 0" = 64: must be a table; each value a whole number from 0, at most 63',
        ),
        (
            {"limits": {"default_ttl_s": 700}},
            "limits.default_ttl_s = 700.0: at most limits.max_ttl_s (600)",
        ),
        (
            {"limits": {"max_deadline_s": 1, "min_deadline_ms": 2000}},
            "limits.min_deadline_ms = 2000.0: at most limits.max_deadline_s (1 s)",
        ),
        (
            {"limits": {"max_defer_s": 1, "min_defer_ms": 2000}},
            "limits.min_defer_ms = 2000.0: at most limits.max_defer_s (1 s)",
        ),
    ],
)
def test_text(data: dict[str, Any], text: str) -> None:
    assert only(data) == text


def test_policy_is_checked_by_the_registry() -> None:
    assert only({"policy": {"name": "best"}}).startswith("policy.name = 'best': must be one of demand-bound, ")
    found = problems({"policy": {"nonsense": 3, "factor": "x"}})
    assert any(p.startswith("policy.nonsense = 3: ") for p in found)
    assert any(p.startswith("policy.factor = 'x': ") for p in found)
    assert parse({"policy": {"give_up": 0.1}}).policy.params == {"give_up": 0.1}


def test_what_is_wrong_with_a_policy_is_told_at_once_and_where_it_is_written() -> None:
    keys = {"name": "deadline-ladder", "nonsense": 3, "levels": 4, "policy": "x", "last_ms": 1.0}
    found = problems({"policy": keys, "bands": {"levels": 1}})
    assert [p.partition(": ")[0] for p in found] == [
        "policy.nonsense = 3",
        "policy.levels = 4",
        "policy.policy = 'x'",
        "policy.last_ms = 1",
        "bands.levels = 1",
    ]
    assert found[3:] == [
        "policy.last_ms = 1: must be at least first_ms (12.5)",
        "bands.levels = 1: policy 'deadline-ladder' needs at least 2 with these parameters",
    ]


def test_a_right_parameter_is_no_problem_because_another_is_wrong() -> None:
    found = problems({"policy": {"name": "deadline-ladder", "nonsense": 3, "first_ms": 1000.0, "last_ms": 8000.0}})
    assert [p.partition(" = ")[0] for p in found] == ["policy.nonsense"]


def test_policy_parameters_that_are_right_only_together() -> None:
    # Each of them alone contradicts the other's default.
    together = {"first_ms": 1000.0, "last_ms": 8000.0}
    assert parse({"policy": {"name": "deadline-ladder"} | together}).policy.params == together


def test_all_problems_at_once() -> None:
    data = {"daemon": {"slots": 1, "mode": "x"}, "device": [{"nam": "eth0"}], "bands": {"levels": 0}, "zoo": 1}
    starts = ["daemon.mode", "daemon.slots", "device[0].name", "device[0].nam", "bands.levels", "zoo"]
    found = problems(data)
    assert sorted(p.partition(" = ")[0] for p in found) == sorted(starts)


def test_problems_across_keys_come_together() -> None:
    data = {"daemon": {"listen": "10.0.0.1:1", "idle_tick_ms": 1}, "bands": {"dscp": {"x": 1}}}
    assert len(problems(data)) == 3


@pytest.mark.parametrize("listen", ["127.0.0.1:50551", "[::1]:50551", "localhost:1"])
def test_loopback_may_be_listened_on(listen: str) -> None:
    assert parse({"daemon": {"listen": listen}}).daemon.listen == listen


def test_remote_needs_certificates() -> None:
    tls = {"tls_cert": "/c.pem", "tls_key": "/k.pem", "tls_client_ca": "/ca.pem"}
    assert parse({"daemon": {"listen": "0.0.0.0:1"} | tls}).daemon.listen == "0.0.0.0:1"
    assert problems({"daemon": tls}) == ["daemon.listen = unset: must be set, because the tls keys are for it"]
    for name in tls:
        some = {key: path for key, path in tls.items() if key != name}
        one, other = problems({"daemon": {"listen": "0.0.0.0:1"} | some})
        assert one == f"daemon.{name} = unset: must be set, as the other tls keys are"
        assert other.startswith("daemon.listen = ")


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mfsd.toml"
    with pytest.raises(ConfigError, match=f"{path}: can't be read: No such file"):
        load(path)
    path.write_text("[daemon\n")
    with pytest.raises(ConfigError, match=f"{path}: is not TOML: "):
        load(path)
    path.write_text("[daemon]\nmode = enforce  # not observe\n")
    with pytest.raises(ConfigError, match=r'\(at line 2, column 8\); a text stands in quotes: mode = "enforce"$'):
        load(path)
    path.write_text("[daemon]\nslots = 1\ntick_ms = 0\n")
    with pytest.raises(ConfigError) as e:
        load(path)
    assert str(e.value).splitlines() == [f"{path}: {p}" for p in e.value.problems]
    assert len(e.value.problems) == 2


def test_render_reads_back_to_the_same_and_tells_defaults_apart(tmp_path: Path) -> None:
    path = tmp_path / "mfsd.toml"
    path.write_text(
        """
        [daemon]
        mode = "enforce"
        listen = "127.0.0.1:50551"
        [[device]]
        name = "eth0"
        rate = "9.5gbit"
        [[device]]
        name = "eth1"
        backend = "prio"
        [bands]
        floors = [0.1, 0.05]
        dscp = { "level 0" = 46, scavenger = 8 }
        [policy]
        name = "mfs"
        [limits]
        max_sessions = 3
        """
    )
    config = load(path)
    assert config.device[0].rate == Rate.parse("9.5gbit")
    text = render(config)
    assert parse(tomllib.loads(text)) == config
    assert 'mode = "enforce"\n' in text
    assert "slots = 16384  # default\n" in text
    assert "# socket_group is unset" in text
    assert 'rate = "9.5gbit"\n' in text


def test_the_example_file_is_the_defaults() -> None:
    text = (ROOT / "systemd" / "mfsd.toml").read_text()
    assert text == config_text.example(Config), "run: python -m mfsd.daemon.config > systemd/mfsd.toml"
    assert parse(tomllib.loads(text)) == Config()
    # With every key that has a default uncommented it still says the same.
    lines = [re.sub(r"^#(\w+ = .+)$", r"\1", line) for line in text.splitlines()]
    for section in ("device", "peer", "rule"):
        start = lines.index(f"#[[{section}]]")
        end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
        del lines[start:end]
    told = parse(tomllib.loads("\n".join(lines)))
    assert told == Config()
    assert told.limits.model_fields_set == set(type(told.limits).model_fields)


THREE = {"urgent": 46, "middle": 26, "last": 8}
CONTROL = {"control": 46, "level 0": 46, "level 1": 46}
REST = {"background": 8, "scavenger": 8}


@pytest.mark.parametrize(
    ("policy", "levels", "given", "marked"),
    [
        # Who is due first under the default policy goes with the collectives; the other guaranteed, and half of the
        # deferred, with the unhinted.
        ("demand-bound", 5, THREE, CONTROL | {"level 2": 46, "level 3": 26, "default": 26, "level 4": 26} | REST),
        ("demand-bound", 3, THREE, CONTROL | {"default": 26, "level 2": 26} | REST),
        ("demand-bound", 5, {"urgent": 46, "last": 8}, CONTROL | {"level 2": 46} | REST),
        ("two-class", 2, THREE, {"control": 46, "level 0": 46, "default": 26, "level 1": 26} | REST),
        ("two-class", 2, {"middle": 0}, {"default": 0, "level 1": 0}),
        ("two-class", 2, {"level 1": 8}, {"level 1": 8}),
        ("two-class", 2, {}, {}),
    ],
)
def test_marks_by_class(policy: str, levels: int, given: dict[str, int], marked: dict[str, int]) -> None:
    config = parse({"policy": {"name": policy}, "bands": {"levels": levels, "dscp": given}})
    assert config_bands.dscp_of(config) == marked


def test_marks_in_words() -> None:
    config = parse({"bands": {"dscp": THREE}})
    plan = config_bands.bands_of(config, config_bands.policy_of(config))
    assert config_bands.marks_in_words(config_bands.dscp_of(config), plan) == [
        "DSCP 46 into packets of control, level 0, level 1, level 2",
        "DSCP 26 into packets of level 3, default, level 4",
        "DSCP 8 into packets of background, scavenger",
    ]
