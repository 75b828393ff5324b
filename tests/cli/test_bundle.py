# SPDX-License-Identifier: Apache-2.0
"""mfsctl support-bundle: what is in it, from a real daemon, and that none of what must not be told is."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from support.ctl import Rig, run

from mfsd.cli.bundle import Redaction

if TYPE_CHECKING:
    from pathlib import Path

SECRETS = ("sk-live-4242", "MIIEvQIBADANBg", "customer-acme", "10.20.30.40", "fd12:3456::7", "tenant-q")


def contents(file: Path) -> dict[str, str]:
    out = {}
    with tarfile.open(file) as tar:
        for member in tar.getmembers():
            data = tar.extractfile(member)
            assert data is not None
            out[member.name.partition("/")[2]] = data.read().decode()
    return out


def test_no_secret_is_in_it_and_all_that_is_needed_is(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of requests, transfers and sessions, addresses, and what a process has in its environment."""
    monkeypatch.setenv("HF_TOKEN", "sk-live-4242")
    monkeypatch.setenv("NCCL_IB_TC", "106")
    owner = "customer-acme/req-1"
    assert rig.run("hint", "request", owner, "--ttft-left", "60s").code == 0
    ends = ("--from", "10.20.30.40:5000", "--to", "[fd12:3456::7]:6000")
    what = ("--request", owner, "--stage", "p2d", "--bytes", "1MB")
    assert (
        rig.run("hint", "transfer", "tenant-q/kv", *what, "--to", "10.20.30.40:6000", "--from", "10.20.30.41:1").code
        == 0
    )
    assert rig.run("hint", "transfer", "tenant-q/kv6", *what, "--to", ends[3], "--from", "[fd12:3456::8]:1").code == 0
    config = tmp_path / "mfsd.toml"
    config.write_text('[daemon]\nstate_dir = "/run/mfsd"\n[[peer]]\nnetwork = "10.20.30.40/32"\nrate = "1gbit"\n')
    file = tmp_path / "bundle.tar.gz"
    ran = rig.run("support-bundle", str(file), "--config", str(config), "--no-log")
    assert ran.code == 0, ran.err
    assert (file.stat().st_mode & 0o777) == 0o600
    found = contents(file)
    assert set(found) == {
        "status.json", "plan.json", "metrics.txt", "connections.json", "transfers.json", "rules.json", "config.toml",
        "doctor.json", "transports.json", "machine.json", "missing.json",
    }  # fmt: skip
    everything = "\n".join(found.values())
    assert not [s for s in SECRETS if s in everything]
    transfers = json.loads(found["transfers.json"])["transfers"]
    names = {t["id"] for t in transfers}
    assert len(names) == 2
    assert len({t["request_id"] for t in transfers}) == 1
    assert all(n.startswith("name-") for n in names)
    # The same thing has the same word everywhere.
    shown = json.loads(found["connections.json"])["connections"]
    words = {c["endpoints"] for c in shown if "address-" in c["endpoints"]}
    peer = next(line for line in found["config.toml"].splitlines() if line.startswith("network ="))
    assert peer.split('"')[1].removesuffix("/32") in " ".join(words)
    status = json.loads(found["status.json"])
    assert (status["requests"], status["transfers"]) == (1, 2)
    assert "mfsd_requests" in found["metrics.txt"]
    assert {f["check"] for f in json.loads(found["doctor.json"])} >= {"kernel.version", "host.rdma"}
    again = rig.run("support-bundle", str(file))
    assert (again.code, again.err) == (1, f"mfsctl: {file} is there already; choose another name\n")


@pytest.mark.daemon
def test_without_a_daemon_there_is_less_in_it(tmp_path: Path) -> None:
    file = tmp_path / "b.tar.gz"
    ran = run("--socket", str(tmp_path / "none"), "support-bundle", str(file), "--no-log")
    assert ran.code == 0
    assert "! without status.json: mfsd is not running" in ran.out
    found = contents(file)
    assert {"doctor.json", "machine.json"} < set(found)
    assert "status.json" not in found
    assert "not running" in json.loads(found["missing.json"])["status.json"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("password=hunter2 x", "password=[secret] x"),
        ('api_key: "hunter2"', "api_key: [secret]"),
        ("Authorization: hunter2", "Authorization: [secret]"),
        ("HF_TOKEN=sk-live-4242", "HF_TOKEN=[secret]"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\n-----END PRIVATE KEY-----", "[key or certificate]"),
        ("from 10.20.30.40:5 to 10.20.30.40", "from address-1:5 to address-1"),
        ("[fd12:3456::7]:80 fd12:3456::7/64", "[address-1]:80 address-1/64"),
        ("::ffff:10.20.30.40 10.20.30.40.5", "address-1 10.20.30.40.5"),
        ("ether 0a:1b:2c:3d:4e:5f", "ether mac-1"),
        ("listens on 127.0.0.1 and ::1", "listens on 127.0.0.1 and ::1"),
        ("version 1.2.3, 14:03:02, 6d66:2001, 6d66:", "version 1.2.3, 14:03:02, 6d66:2001, 6d66:"),
        ("on gpu-17 at gpu-170", "on this-host at gpu-170"),
    ],
)
def test_what_is_replaced(text: str, told: str) -> None:
    assert Redaction("gpu-17").text(text) == told


def test_names_are_replaced_in_text_too() -> None:
    redaction = Redaction()
    value: dict[str, Any] = {"id": "customer-acme", "other": "of customer-acme/x", "n": [1, None, True]}
    assert redaction.value(value) == {"id": "name-1", "other": "of name-1/x", "n": [1, None, True]}
    assert redaction.text("request customer-acme is late") == "request name-1 is late"
