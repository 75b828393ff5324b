# SPDX-License-Identifier: Apache-2.0
"""Start-up, version, completion and help: what needs no daemon."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from support.ctl import Rig, run

from mfsd import __version__
from mfsd.cli import app, glossary
from mfsd.daemon.config import DEFAULT_PATH, DaemonConfig
from mfsd.datapath import _abi
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path


def test_version(rig: Rig, tmp_path: Path) -> None:
    assert rig.run("version").out == f"mfsctl {__version__}\nmfsd {__version__}\n"
    assert rig.run("version", "--json").json == {"mfsctl": __version__, "mfsd": __version__}
    assert rig.run("version", "--client").out == f"mfsctl {__version__}\n"
    absent = run("--socket", str(tmp_path / "none"), "version")
    assert absent.code == 0
    assert "not running" in absent.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    ran = run("completion", shell)
    assert ran.code == 0
    assert "_MFSCTL_COMPLETE" in ran.out
    assert run("completion", "tcsh").code == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mfsctl st", {"status", "stats"}),
        ("mfsctl hint tr", {"transfer"}),
        ("mfsctl hint done ", {"transfer", "request", "batch"}),
    ],
)
def test_completions(words: str, expected: set[str]) -> None:
    env = {"_MFSCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-m", "mfsd.cli"], env=env, capture_output=True, text=True, check=True)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


def test_a_status_imports_no_more_than_it_needs(rig: Rig) -> None:
    """It is for impatient people; `make bench NAME=mfsctl` has the time."""
    heavy = [
        "rich",
        "google.protobuf.json_format",
        "mfsd.client.client",
        "mfsd.ground.model",
        "numpy",
        "prometheus_client",
    ]
    code = (
        "import sys\nfrom mfsd.cli.app import mfsctl\n"
        f"mfsctl(['--socket', {str(rig.socket)!r}, 'status'], standalone_mode=False)\n"
        f"print('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sessions 0" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("args", [("version",), ("--help",), ("status", "--help")])
def test_start_up_imports_nothing_heavy(args: tuple[str, ...]) -> None:
    """Time is not measured here: what costs it is."""
    heavy = ["numpy", "pydantic", "pyroute2", "structlog"] + ([] if args[0] == "status" else ["grpc", "rich", "google"])
    code = (
        "import sys\nfrom mfsd.cli.app import mfsctl\n"
        f"mfsctl({[*args]!r}, standalone_mode=False)\n"
        f"print('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_names_every_command() -> None:
    ran = run("--help")
    for name in app.COMMANDS:
        assert f"  {name} " in ran.out
        assert run(name, "--help").code == 0
    assert "Exit codes" in ran.out
    assert run("frobnicate").code == 2


def test_default_socket_is_the_daemons() -> None:
    assert str(DaemonConfig().socket) == app.DEFAULT_SOCKET
    assert str(DEFAULT_PATH) == app.DEFAULT_CONFIG


def test_help_stats_describes_every_number(rig: Rig) -> None:
    ran = rig.run("status", "--help-stats")
    assert not rig.tap.asked  # no daemon needed
    described: dict[Any, dict[str, str]] = {
        pb.Status: glossary.STATUS, pb.Counters: glossary.COUNTERS, pb.Device: glossary.DEVICE, pb.Band: glossary.BAND,
        pb.Peer: glossary.PEER, pb.Tenant: glossary.TENANT, pb.Yielding: glossary.YIELDING,
    }  # fmt: skip
    containers = {"devices", "counters", "bands", "stats", "peers", "tenants", "yielding"}
    for message, texts in described.items():
        assert set(texts) == {f.name for f in message.DESCRIPTOR.fields} - containers
    stats = {n.removeprefix("STAT_").lower() for n in vars(_abi) if n.startswith("STAT_")} - {"max"}
    assert set(glossary.STATS) == stats
    for texts in [*described.values(), glossary.STATS]:
        assert all(f"  {name} " in ran.out for name in texts)
    # In a pipe a number is a line.
    numbers = sum(map(len, (*described.values(), glossary.STATS)))
    assert len(ran.out.splitlines()) == numbers + 2 * len(glossary.SECTIONS) - 1
    assert rig.run("status", "--json", "--help-stats").json["counters.rescues"] == glossary.COUNTERS["rescues"]
