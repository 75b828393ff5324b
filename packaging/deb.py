#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build the Debian package; docs/operating.md has the reasons.

    deb.py             dist/mfsd_VERSION_amd64.deb, for Debian 12 and 13
    deb.py --lock      write packaging/wheels.lock anew from pyproject.toml and scripts/constraints.txt

The package carries its Python modules under /usr/lib/mfsd: those that any Python can import in lib/, those compiled for
one version in cp311/ and cp313/. The same commit gives the same file: versions and hashes are locked, dates are the
commit's.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from email.utils import formatdate
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGING: Final = ROOT / "packaging"
LOCK: Final = PACKAGING / "wheels.lock"
CONSTRAINTS: Final = ROOT / "scripts" / "constraints.txt"
BUILD: Final = ROOT / "build" / "deb"
PYTHONS: Final = ("3.11", "3.13")
"""Of Debian 12 and 13."""
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
"""Debian 12 has glibc 2.36."""
TOOLS: Final = {
    "/usr/bin/dpkg-buildpackage": "dpkg-dev",
    "/usr/bin/dh": "debhelper",
    "/usr/bin/go-md2man": "go-md2man",
}
UNUSED: Final = ("**/tests", "**/test", "**/*.pyi", "**/*.h", "**/*.a", "**/*.proto", "**/*.pxd", "**/*.pyx")
"""What nothing imports."""
LARGE: Final = 1 << 16
"""Files of at least so many bytes are kept once where both Pythons have the same (numpy's OpenBLAS)."""


def run(*argv: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a tool; show what it said if it failed."""
    done = subprocess.run([str(a) for a in argv], cwd=cwd, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"deb: {' '.join(str(a) for a in argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def install_tools() -> None:
    """Debian packages that are missing."""
    missing = [package for tool, package in TOOLS.items() if not Path(tool).exists()]
    if not missing:
        return
    if os.geteuid() != 0:
        sys.exit(f"deb: not root; run: apt-get install {' '.join(missing)}")
    print(f"deb: installing Debian packages: {' '.join(missing)}", flush=True)
    run("apt-get", "update", "-qq")
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)


# --- wheels -----------------------------------------------------------------------------------------------------------


def for_python(python: str) -> list[str]:
    """Options of pip that choose wheels for another interpreter than its own."""
    short = "cp" + python.replace(".", "")
    platforms = [word for p in PLATFORMS for word in ("--platform", p)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python,
            "--abi", short, "--abi", "abi3", "--abi", "none", *platforms]  # fmt: skip


def pip(*argv: str | Path) -> str:
    """Pip of this environment."""
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *argv)


def lock() -> None:
    """Resolve what the daemon needs for both Pythons, and write down versions and hashes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"].get("daemon", [])]
    hashes: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for python in PYTHONS:
            to = Path(folder) / python
            pip("download", "-d", to, "-c", CONSTRAINTS, *for_python(python), *[str(Requirement(w)) for w in wanted])
            for wheel in sorted(to.iterdir()):
                name, version, *_ = parse_wheel_filename(wheel.name)
                hashes.setdefault(f"{name}=={version}", set()).add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    lines = ["# Wheels in the Debian package, for Python 3.11 and 3.13 on amd64. Made by packaging/deb.py --lock."]
    for pinned in sorted(hashes):
        lines += [f"{pinned} \\", *[f"    --hash=sha256:{h} \\" for h in sorted(hashes[pinned])]]
        lines[-1] = lines[-1].removesuffix(" \\")
    LOCK.write_text("\n".join(lines) + "\n")
    print(f"deb: {len(hashes)} packages -> {LOCK.relative_to(ROOT)}")


def unpack(wheel: Path, target: Path) -> None:
    """Several wheels share the folder google/, which pip install --target would replace each time."""
    with zipfile.ZipFile(wheel) as archive:
        members = [
            m for m in archive.namelist() if ".data/" not in m.partition("/")[0] + "/" and not m.endswith("RECORD")
        ]
        archive.extractall(target, members)


def collect(tree: Path) -> None:
    """Unpack the wheels: lib/ for any Python, cp311/ and cp313/ for one."""
    with tempfile.TemporaryDirectory() as folder:
        for python in PYTHONS:
            to = Path(folder) / python
            pip("download", "-d", to, "--no-deps", "--require-hashes", "-r", LOCK, *for_python(python))
            short = "cp" + python.replace(".", "")
            for wheel in sorted(to.iterdir()):
                *_, tags = parse_wheel_filename(wheel.name)
                own = all(t.abi == short for t in tags)
                target = tree / (short if own else "lib")
                if not own and python != PYTHONS[0]:
                    continue  # unpacked already
                unpack(wheel, target)
    for part in sorted(tree.iterdir()):
        for path in [p for pattern in UNUSED for p in part.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    _share(tree)


def _share(tree: Path) -> None:
    """Keep large files once that are the same for both Pythons."""
    first, *others = sorted(tree.glob("cp*"))
    for path in (p for other in others for p in sorted(other.rglob("*"))):
        twin = first / Path(*path.relative_to(tree).parts[1:])
        if not path.is_file() or path.stat().st_size < LARGE or not twin.is_file():
            continue
        if path.read_bytes() == twin.read_bytes():
            path.unlink()
            path.symlink_to(os.path.relpath(twin, path.parent))


# --- the package ------------------------------------------------------------------------------------------------------


def version_and_date() -> tuple[str, int]:
    """0.2.0 for the commit that is tagged so, else a version that is older than that and newer than earlier ones'."""
    base = re.search(r'__version__ = "(.*)"', (ROOT / "mfsd" / "__init__.py").read_text())
    if base is None:
        sys.exit("deb: no version in mfsd/__init__.py")
    known = os.environ.get("MFSD_DEB_VERSION")
    if not (ROOT / ".git").exists():
        return known or base[1], int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    date, commit = run("git", "log", "-1", "--format=%ct %h", cwd=ROOT).split()
    tags = run("git", "tag", "--points-at", "HEAD", cwd=ROOT).split()
    stamp = time.strftime("%Y%m%d.%H%M%S", time.gmtime(int(date)))
    return known or (base[1] if f"v{base[1]}" in tags else f"{base[1]}~{stamp}.g{commit}"), int(date)


def stage(version: str, date: int) -> Path:
    """A source tree for dpkg-buildpackage with everything in it."""
    source = BUILD / "source"
    shutil.rmtree(BUILD, ignore_errors=True)
    source.mkdir(parents=True)
    tree = source / "tree"
    tree.mkdir()
    collect(tree)
    env = os.environ | {"SOURCE_DATE_EPOCH": str(date), "PYTHONPATH": str(ROOT)}
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", BUILD, ROOT, env=env)
    (wheel,) = BUILD.glob("mfsd-*.whl")
    unpack(wheel, tree / "lib")
    shutil.rmtree(tree / "lib/mfsd/lab")  # which needs a dozen packages more
    for what in ("man", "completions"):
        run(sys.executable, ROOT / "scripts" / "reference.py", what, source / what, env=env)
    debian = source / "debian"
    shutil.copytree(PACKAGING / "debian", debian)
    shutil.copy(ROOT / "systemd" / "mfsd.toml", source / "mfsd.toml")
    shutil.copy(ROOT / "systemd" / "mfsd.service", debian / "mfsd.service")
    shutil.copy(ROOT / "systemd" / "sysusers.conf", debian / "mfsd.sysusers")
    shutil.copy(ROOT / "systemd" / "tmpfiles.conf", debian / "mfsd.tmpfiles")
    maintainer = re.search(r"^Maintainer: (.*)$", (debian / "control").read_text(), re.MULTILINE)
    if maintainer is None:
        sys.exit("deb: no maintainer in debian/control")
    (debian / "changelog").write_text(
        f"mfsd ({version}) unstable; urgency=medium\n\n  * See /usr/share/doc/mfsd/CHANGELOG.md.gz.\n\n"
        f" -- {maintainer[1]}  {formatdate(date)}\n"
    )
    shutil.copy(ROOT / "CHANGELOG.md", source)
    for path in sorted(source.rglob("*")):
        os.utime(path, (date, date), follow_symlinks=False)
    return source


def build() -> Path:
    """The package, in dist/."""
    version, date = version_and_date()
    source = stage(version, date)
    env = os.environ | {
        "SOURCE_DATE_EPOCH": str(date),
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
        "DEB_BUILD_OPTIONS": "nocheck",
    }
    run("dpkg-buildpackage", "-us", "-uc", "-b", "-d", cwd=source, env=env)
    (made,) = BUILD.glob("mfsd_*.deb")
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    for old in dist.glob("mfsd_*.deb"):
        old.unlink()
    to = dist / made.name
    shutil.move(made, to)
    digest = hashlib.sha256(to.read_bytes()).hexdigest()
    print(f"deb: {to.relative_to(ROOT)}, {to.stat().st_size / 1e6:.1f} MB, sha256 {digest}")
    return to


def main(argv: list[str]) -> None:
    """See the module."""
    if argv == ["--lock"]:
        lock()
        return
    install_tools()
    build()


if __name__ == "__main__":
    main(sys.argv[1:])
