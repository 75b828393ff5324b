# SPDX-License-Identifier: Apache-2.0
"""Tests of the Debian package in fresh machines with a real systemd (`make test-deb`, `make test-systemd`).

MFSD_DEB names the package; without it nothing here is collected.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.machine import Machine, booted, install_tools
from support.namespaces import NetnsPair, joined_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUITES: Final = os.environ.get("MFSD_SUITES", "bookworm trixie").split()
"""Debian 12 and 13."""

if "MFSD_DEB" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package."""
    install_tools()
    return Path(os.environ["MFSD_DEB"])


@pytest.fixture(scope="session")
def older_deb(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier version of the package, with another default configuration."""
    tree = tmp_path_factory.mktemp("older") / "tree"
    subprocess.run(["dpkg-deb", "-R", str(deb), str(tree)], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"^Version: .*$", "Version: 0.1.9", control.read_text(), flags=re.MULTILINE))
    with (tree / "etc/mfsd/mfsd.toml").open("a") as file:
        file.write("# a line that the newer package has not\n")
    out = tree.with_name("mfsd_0.1.9_amd64.deb")
    argv = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", str(tree), str(out)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return out


@pytest.fixture(scope="module", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """Name of a Debian release."""
    return str(request.param)


@pytest.fixture(scope="module")
def network() -> Iterator[NetnsPair]:
    """The machine's network is namespace ``a``, with the device v0."""
    with joined_namespaces() as pair:
        yield pair


@pytest.fixture(scope="module")
def machine(
    suite: str, network: NetnsPair, deb: Path, older_deb: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A fresh one, with both packages in /root. The tests of a module go on where the one before ended."""
    with booted(suite, network.a, tmp_path_factory.mktemp(suite)) as machine:
        shutil.copy(deb, machine.root / "root" / "mfsd.deb")
        shutil.copy(older_deb, machine.root / "root" / "older.deb")
        yield machine


@pytest.fixture
def record(suite: str) -> Callable[[str, object], None]:
    """Takes down a figure, by name, in build/system/SUITE.json."""
    path = Path(__file__).resolve().parents[2] / "build" / "system" / f"{suite}.json"

    def put(name: str, value: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(figures | {name: value}, indent=1, sort_keys=True) + "\n")

    return put
