# SPDX-License-Identifier: Apache-2.0
"""What an inference worker installs: mfsd[client] brings grpcio and protobuf, and works with them alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.daemons import Running

from mfsd import WHEEL

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.daemon

ROOT: Final = Path(__file__).resolve().parents[2]
BROUGHT: Final = ("grpcio", "protobuf", "typing_extensions")
"""The last is grpcio's own."""
WORKER: Final = """
import sys
from mfsd.client import Client, Cookie, Stage, Transfer
with Client("worker", sys.argv[1]) as client:
    client.request("r", ttft_left_s=60.0)
    client.transfers(Transfer(f"t{i}", Cookie(5), 1000, Stage.P2D, "r") for i in range(20))
    print(client.flush(20), client.stats.accepted, client.stats.rejected)
print(sorted({"click", "google.rpc", "numpy", "psutil", "pydantic", "rich", "structlog"} & set(sys.modules)))
"""


def run(*argv: str | Path) -> str:
    done = subprocess.run([*map(str, argv)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def repack(name: str, where: Path) -> None:
    """The wheel that an installed distribution was: the test needs no index."""
    installed = distribution(name)
    tag = next(line for line in (installed.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: "))
    path = where / f"{name}-{installed.version}-{tag.removeprefix('Tag: ')}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in installed.files or ():
            if file.parts[0] != ".." and "__pycache__" not in file.parts:
                wheel.write(file.locate(), str(file))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A fresh virtual environment with mfsd[client]; the path of one of its programs."""
    folder = tmp_path_factory.mktemp("package")
    wheels = folder / "wheels"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels)
    (wheel,) = wheels.iterdir()
    assert wheel.name == WHEEL
    assert wheel.stat().st_size < 1_100_000
    for name in BROUGHT:
        repack(name, wheels)
    run(sys.executable, "-m", "venv", folder / "venv")
    run(folder / "venv/bin/pip", "install", "-q", "--no-index", "--find-links", wheels, "mfsd[client]")
    return lambda name: folder / "venv/bin" / name


def test_it_brings_two_packages(environment: Callable[..., Path]) -> None:
    listed = {p["name"] for p in json.loads(run(environment("pip"), "list", "--format", "json"))}
    assert listed - {"pip", "setuptools"} == {"mfsd", *BROUGHT}


def test_a_worker_needs_no_more(environment: Callable[..., Path], tmp_path: Path) -> None:
    daemon = Running(tmp_path)
    try:
        done = subprocess.run(
            [environment("python"), "-c", WORKER, daemon.target],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
    finally:
        daemon.stop()
    assert done.stdout.splitlines() == ["True 21 0", "[]"]
    assert done.stderr == ""


@pytest.mark.parametrize("program", ["mfsd", "mfsctl"])
def test_the_daemons_programs_say_what_is_missing(
    environment: Callable[..., Path], program: str, tmp_path: Path
) -> None:
    done = subprocess.run([environment(program), "--help"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}: No module named ")
    # Its file: the name may be somebody else's in a package index.
    assert line.endswith(f"pip install '{WHEEL}[daemon]'")


def test_wheel_and_sdist_carry_what_is_compiled_and_are_the_same_again(tmp_path: Path) -> None:
    """An sdist is enough for a wheel where there is no clang; and a build elsewhere gives the same bytes."""
    copy = tmp_path / "elsewhere" / "mfsd"
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    env = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    bare = env | {"PATH": str(Path(sys.executable).parent)}
    made: list[bytes] = []
    for here, where in ((ROOT, tmp_path / "a"), (copy, tmp_path / "b")):
        build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(where)]
        subprocess.run(build, cwd=here, env=env, check=True, capture_output=True)
        (wheel,) = where.glob("*.whl")
        made.append(wheel.read_bytes())
    assert made[0] == made[1]
    compiled = {f"mfsd/datapath/_bpf/{s.name.replace('.c', '.o')}" for s in (ROOT / "bpf").glob("*.bpf.c")}
    needed = compiled | {"mfsd/datapath/_abi.py", "mfsd/v1/hints_pb2.py", "mfsd/v1/control_pb2_grpc.py"}
    assert compiled
    with zipfile.ZipFile(wheel) as archive:
        assert needed <= set(archive.namelist())
    (sdist,) = (tmp_path / "a").glob("*.tar.gz")
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", sdist, "-C", tmp_path / "unpacked"], check=True)
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert all((folder / name).exists() for name in needed)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "c")]
    subprocess.run(build, cwd=folder, env=bare, check=True, capture_output=True)
    (again,) = (tmp_path / "c").glob("*.whl")
    with zipfile.ZipFile(again) as archive, zipfile.ZipFile(wheel) as first:
        assert all(archive.read(name) == first.read(name) for name in needed)
