# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in the file: it is refused with key and reason, or printed so that it reads back to the same."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refused import only, problems

from mfsd.daemon.config import MAX_DEVICES, Config, ConfigError, load, parse, render
from mfsd.daemon.config_files import MAX_BYTES
from mfsd.ground.model import Mode
from mfsd.ground.units import Rate

ROOT = Path(__file__).resolve().parents[2]
DEVICE = {"name": "eth0"}
PEER = {"network": "fd00::/8", "rate": "1gbit"}
FULL_WIDTH = {ord("0") + i: chr(0xFF10 + i) for i in range(10)}
ARABIC = {ord("0") + i: chr(0x660 + i) for i in range(10)}
HUGE = 10**5000
"""Which Python does not write."""


def ascii_id(value: Any) -> str:
    return "huge" if value is HUGE else ascii(value)[:30]


def nested(depth: int, *, table: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if table else [value]
    return value


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate",
    [
        "1bit",
        "0.0000001bit",
        "63.999kbit",
        "7bps",
        "10.001tbit",
        "9999999999999tbit",
        "1" + "0" * 39 + "tbit",
        "0." + "0" * 40 + "1bit",
    ],
    ids=ascii_id,
)
def test_rates_that_no_link_has(rate: str) -> None:
    for section, rest in (("device", DEVICE), ("peer", PEER)):
        text = only({section: [rest | {"rate": rate}]})
        assert text.startswith(f"{section}[0].rate = ")
        assert text.endswith(': must be a rate from 64kbit to 10tbit, e.g. "10gbit"')


def test_identifiers_have_room_for_those_that_engines_make() -> None:
    assert only({"limits": {"max_id_bytes": 44}}).startswith("limits.max_id_bytes = 44: ")  # vLLM's are 45


@pytest.mark.parametrize(
    "rate",
    [
        "inf",
        "infbit",
        "nanmbit",
        "1e3mbit",
        "1e+07tbit",
        "-5mbit",
        "10gbit".translate(FULL_WIDTH),
        "10gbit".translate(ARABIC),
        "10\N{KELVIN SIGN}bit",
        "10gb\N{LATIN SMALL LETTER DOTLESS I}t",
        "10gbit\0",
        "",
        "9" * 5000 + "bit",
        "0." + "0" * 398 + "1bit",
        math.inf,
        HUGE,
    ],
    ids=ascii_id,
)
def test_what_is_no_rate(rate: Any) -> None:
    for section, rest in (("device", DEVICE), ("peer", PEER)):
        text = only({section: [rest | {"rate": rate}]})
        assert text.startswith(f"{section}[0].rate = ")
        assert text.endswith(': must be a rate above zero as tc writes it, e.g. "10gbit" or "950mbit"')


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/", "the path of a file"),
        ("//", "the path of a file"),
        ("/.", "the path of a file"),
        ("/run/mfsd/", "the path of a file"),
        ("/run/mfsd/.", "the path of a file"),
        ("/run/..", "the path of a file"),
        ("/run/a\0b", "printable"),
        ("/run/a\nb", "printable"),
        ("/run/a\x7fb", "printable"),
        ("/run/a\u202eb", "printable"),
        ("/run/%41", "without %, ? and #"),
        ("/run/a?b", "without %, ? and #"),
        ("/run/a#b", "without %, ? and #"),
        ("", "an absolute path"),
        ("run/s", "an absolute path"),
        ("/" + "é" * 52, "an absolute path of at most 104 bytes"),
    ],
    ids=ascii_id,
)
def test_sockets(path: str, why: str) -> None:
    text = only({"daemon": {"socket": path}})
    assert text.startswith("daemon.socket = ")
    assert why in text.partition(": must be ")[2]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/", "not the root of the file system"),
        ("/run/a\0", "printable"),
        ("/" + "x" * 256, "each part of at most 255"),
        ("/x" * 2048, "less than 4096 bytes"),
        (".", "an absolute path"),
    ],
)
def test_state_directories(path: str, why: str) -> None:
    text = only({"daemon": {"state_dir": path}})
    assert text.startswith("daemon.state_dir = ")
    assert why in text.partition(": must be ")[2]


@pytest.mark.parametrize(
    ("socket", "state_dir"), [("/a/b", "/a/b"), ("/a/b", "/a/b/c/d"), ("/a/mfsd.lock", "/a")], ids=str
)
def test_a_socket_in_the_place_of_the_state_directory(socket: str, state_dir: str) -> None:
    text = only({"daemon": {"socket": socket, "state_dir": state_dir}})
    assert text.startswith(f'daemon.socket = "{socket}": must be another file than daemon.state_dir')


@pytest.mark.parametrize(
    "name", [".", "..", "a:b", "a/b", "a b", "a\tb", "", "a\0", "eth0\n", "\x1b[2J", "x" * 16, "é" * 8, "aà", "a\u00a0"]
)
def test_names_that_no_device_has(name: str) -> None:
    text = only({"device": [{"name": name}]})
    assert text.startswith("device[0].name = ")
    assert ": must be " in text


@pytest.mark.parametrize("name", ["eth0", "vlan.100", "a%d", "ö", "x" * 15])
def test_names_that_a_device_may_have(name: str) -> None:
    assert parse({"device": [{"name": name}]}).device[0].name == name


@pytest.mark.parametrize("group", ["", " ", " a", "a\0b", "a\nb", "a:b", "/etc", 0])
def test_groups(group: Any) -> None:
    assert only({"daemon": {"socket_group": group}}).startswith("daemon.socket_group = ")


@pytest.mark.parametrize(
    "listen",
    [
        "",
        ":",
        ":80",
        "[::1:80",
        "::1]:80",
        "[::1]",
        "::1:80",
        "[127.0.0.1]:80",
        "[]:80",
        "[[::1]]:80",
        "127.0.0.1:80".translate(FULL_WIDTH),
        "127.0.0.1:" + "80".translate(ARABIC),
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:+1",
        "127.0.0.1: 1",
        "127.0.0.1:1\n",
        "127.0.0.1:" + "9" * 5000,
        "local host:1",
        "localhost\0:1",
        "unix:/run/s:1",
    ],
    ids=ascii_id,
)
def test_addresses_to_listen_on(listen: str) -> None:
    for tls in ({}, {"tls_cert": "/c", "tls_key": "/k", "tls_client_ca": "/ca"}):
        text = only({"daemon": {"listen": listen} | tls})
        assert text.startswith("daemon.listen = ")
        assert '"host:port"' in text


@pytest.mark.parametrize("network", ["10.0.0.0/8".translate(ARABIC), "fe80::%eth0/64", "fe80::1%1", "x"])
def test_networks(network: str) -> None:
    assert only({"peer": [PEER | {"network": network}]}).startswith("peer[0].network = ")


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, 1e300, -1e300, HUGE, [1.0], {"a": 1}, "x" * 5000], ids=ascii_id
)
@pytest.mark.parametrize("name", ["last_ms", "margin", "first_ms", "kv", "early_levels", "no_such"])
def test_parameters_of_policies(name: str, value: Any) -> None:
    assert only({"policy": {name: value}}).startswith(f"policy.{name} = ")


def test_a_long_name_of_a_policy() -> None:
    assert only({"policy": {"name": "x" * 100_000}}).startswith("policy.name = 'xxx")


@pytest.mark.parametrize("depth", [4, 400, 100_000])
@pytest.mark.parametrize("table", [False, True])
def test_nesting(depth: int, *, table: bool) -> None:
    value = nested(depth, table=table)
    for data, where in (
        ({"daemon": {"slots": value}}, "daemon.slots"),
        ({"daemon": value}, "daemon.a" if table else "daemon"),
        ({"device": [value]}, None if table else "device[0]"),
        ({"bands": {"floors": [value]}}, "bands.floors[0]"),
        ({"policy": {"last_ms": value}}, "policy.last_ms"),
        ({"zoo": value}, "zoo"),
    ):
        for text in problems(data):
            assert len(text) < 400
            assert where is None or text.startswith(f"{where} = ")


def test_integers_of_5000_digits() -> None:
    for section, key in (("daemon", "slots"), ("daemon", "tick_ms"), ("limits", "max_transfer_bytes")):
        for value in (HUGE, -HUGE):
            text = only({section: {key: value}})
            assert text.startswith(f"{section}.{key} = (a")
            assert "digits): must be a " in text


def test_more_sections_than_there_are_devices() -> None:
    devices = [{"name": f"v{i}"} for i in range(MAX_DEVICES + 1)]
    assert only({"device": devices}) == "device = (65 sections): at most 64"
    assert len(parse({"device": devices[:-1]}).device) == MAX_DEVICES


# --- files ------------------------------------------------------------------------------------------------------------

FILES: dict[str, str | bytes] = {
    "lists in lists": "a = " + "[" * 100_000,
    "lists in lists, closed": "a = " + "[" * 50_000 + "]" * 50_000,
    "tables in tables": "a = " + "{a=" * 100_000,
    "brackets of a section": "[" * 100_000,
    "a dotted key": "a." * 100_000 + "a = 1",
    "a dotted section": "[" + "a." * 100_000 + "a]",
    "dotted and spaced": "a . " * 100_000 + "a = 1",
    "an integer": "[daemon]\nslots = " + "9" * 5000,
    "a hexadecimal integer": "[daemon]\nslots = 0x" + "f" * 5000,
    "a float": "[daemon]\ntick_ms = 1e999",
    "infinite": "[policy]\nlast_ms = inf",
    "no number": "[policy]\nmargin = nan",
    "a date": "[daemon]\nslots = 1979-05-27T07:32:00Z",
    "a NUL": '[daemon]\nsocket = "/run/\\u0000"',
    "a NUL byte": '[daemon]\nsocket = "/run/\0"',
    "a surrogate": '[daemon]\nsocket = "/run/\\ud800"',
    "not in UTF-8": b"[daemon]\nsocket = '/run/\xff'",
    "with the mark of another encoding": "\N{ZERO WIDTH NO-BREAK SPACE}[daemon]\nslots = 1",
    "too long": "#" * (MAX_BYTES + 1),
    "a very long line": f"[daemon]\nsocket_group = '{':' * 500_000}'",
    "many wrong keys": "\n".join(f"k{i} = 1" for i in range(2000)),
}


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "mfsd.toml"
    content = FILES[request.param]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("file", FILES, indirect=True)
def test_files(file: Path) -> None:
    with pytest.raises(ConfigError) as e:
        load(file)
    for line in str(e.value).splitlines():
        assert line.startswith(f"{file}: ")
        assert len(line) < 600


@pytest.mark.daemon
@pytest.mark.parametrize("file", ["tables in tables", "an integer", "infinite", "a NUL", "not in UTF-8"], indirect=True)
def test_the_command_line_has_no_traceback_for_them(file: Path) -> None:
    done = mfsd("--check-config", "--config", str(file))
    assert (done.returncode, done.stdout) == (78, b"")
    assert b"Traceback" not in done.stderr


@pytest.mark.daemon
def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    done = mfsd(b"--check-config", b"--config", os.fsencode(tmp_path) + b"/\xff.toml")
    assert done.returncode == 78
    assert b"No such file" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_mark_that_some_editors_begin_files_with(tmp_path: Path) -> None:
    file = tmp_path / "mfsd.toml"
    file.write_text('[daemon]\r\nmode = "enforce"\r\n', encoding="utf-8-sig")
    assert load(file).daemon.mode is Mode.ENFORCE


def test_two_rates_for_one_network() -> None:
    peers = [{"network": n, "rate": "1gbit"} for n in ("10.0.0.0/8", "fd00::/8", "10.0.0.0/8")]
    with pytest.raises(ConfigError) as e:
        parse({"peer": peers})
    assert str(e.value) == 'peer[2].network = "10.0.0.0/8": each network once; peer[0] has this one'


def test_an_endless_file() -> None:
    with pytest.raises(ConfigError, match="is this the right file"):
        load(Path("/dev/zero"))


def mfsd(*args: str | bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "mfsd.daemon", *args], check=False, capture_output=True, cwd=ROOT)


# --- anything ---------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.dates(), st.builds(lambda: HUGE)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [f"{s}.{k}" for s in ("daemon", "bands", "limits") for k in type(getattr(Config(), s)).model_fields]
)


@given(st.dictionaries(KEYS, VALUES, max_size=3), st.lists(VALUES, max_size=2), st.dictionaries(st.text(), VALUES))
def test_any_value_is_refused_or_reads_back(keys: dict[str, Any], devices: list[Any], policy: dict[str, Any]) -> None:
    data: dict[str, Any] = {"device": devices, "policy": policy}
    for name, value in keys.items():
        section, _, key = name.partition(".")
        data.setdefault(section, {})[key] = value
    with contextlib.suppress(ConfigError):
        config = parse(data)
        assert parse(tomllib.loads(render(config))) == config


@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused_or_reads_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(ConfigError):
        config = load(path)
        assert parse(tomllib.loads(render(config))) == config


RATES = st.floats(8000, 1.25e12) | st.integers(8000, 1_250_000_000_000).map(float)
NAMES = st.text(min_size=1, max_size=15).filter(lambda s: s.isprintable())


@settings(max_examples=300)
@given(RATES, NAMES, st.ip_addresses(), st.integers(0, 32), NAMES, st.floats(0, 0.05))
def test_what_is_accepted_is_printed_so_that_it_reads_back(
    rate: float, name: str, address: Any, prefix: int, folder: str, floor: float
) -> None:
    data = {
        "daemon": {"state_dir": f"/{folder}"},
        "device": [{"name": name, "rate": Rate(rate)}],
        "peer": [{"network": f"{address}/{address.max_prefixlen}", "rate": str(Rate(rate))}],
        "bands": {"floors": [floor], "dscp": {"level 0": prefix}},
        "policy": {"first_ms": 1 + rate / 1e13, "last_ms": 1e3 + rate / 1e10},
    }
    with contextlib.suppress(ConfigError):
        config = parse(data)
        again = parse(tomllib.loads(render(config)))
        assert again == config
        assert again.device[0].rate == again.peer[0].rate == Rate(rate)


@given(st.floats(1e-9, 1e30))
def test_rates_read_back_exactly(rate: float) -> None:
    assert Rate.parse(str(Rate(rate))) == Rate(rate)


def test_rates_in_words() -> None:
    for text in ("10gbit", "950mbit", "2.5gbit", "100kbit", "1.25kbit", "64.000000001kbit", "12bit", "10000000tbit"):
        assert str(Rate.parse(text)) == text
