# SPDX-License-Identifier: Apache-2.0
"""The classifier through BCC: compiled on this host, for hosts without libbpf 1.x (see ``loader.Loader``).

The same C source as the libbpf object (bpf/compat.h has the differences), compiled by bcc_compile.py in a process of
its own; the maps and the program are made here, by bpf(2). Needs the distribution's python3-bpfcc and the headers of
the running kernel. Takes half a second and 150 MB for the moment of loading; afterwards there is no difference.

The unit's MemoryDenyWriteExecute= must be off for this loader: BCC's compiler writes code and runs it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from mfsd.datapath.bpf import loader, syscall
from mfsd.datapath.bpf.libbpf import check_kernel, object_path
from mfsd.datapath.bpf.loader import PROGRAM, Classifier, own_copy
from mfsd.datapath.errors import LoaderError

PACKAGE_FIX: Final = "install BCC's Python bindings: apt-get install python3-bpfcc, dnf install python3-bcc"
_COMPILE_SECONDS: Final = 120


class BccLoader:
    """Compiles once, however many devices there are. Raises LoaderError where something is missing."""

    def __init__(self, source: Path | None = None, modules: Path = Path("/lib/modules")) -> None:
        self.source = source or object_path("classifier").parent / "src" / "classifier.bpf.c"
        self._modules = modules

    def open_classifier(self, slots: int, share: Classifier | None = None) -> Classifier:
        """Load the classifier with a table of ``slots`` rows, or with the tables of ``share``. Raises LoaderError."""
        check_kernel(platform.release())
        loader.check_rows(slots, share)
        check_headers(platform.release(), self._modules)
        compiled = _compile(self.source, interpreter())
        maps = {m["name"]: m for m in compiled["maps"]}
        code = bytearray.fromhex(compiled["code"])
        fds: dict[str, int] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(_close, fds)
            for name, m in maps.items():
                if name in loader.SHARED_MAPS and share is not None:
                    fds[name] = own_copy(share.map_fds[name])
                else:
                    fds[name] = _make(m, slots if name in loader.RESIZED else m["entries"])
                for at in m["uses"]:
                    struct.pack_into("=i", code, 8 * at + 4, fds[name])
            wanted = (*loader.SHARED_MAPS, *loader.DEVICE_MAPS)
            for name in wanted:
                if name not in maps:
                    raise LoaderError(f"BPF source {self.source}", f"has no map {name}", "reinstall mfsd")
                loader.check_sizes(name, maps[name]["key_size"], maps[name]["value_size"])
            program = syscall.prog_load(syscall.SCHED_CLS, PROGRAM, bytes(code), compiled["licence"])
            undo.pop_all()
        for name in set(fds) - set(wanted):  # private to the program, which keeps them
            os.close(fds.pop(name))
        return Classifier(program, fds, rows=slots)


def _make(m: dict[str, Any], entries: int) -> int:
    try:
        return syscall.map_create(m["type"], m["name"], m["key_size"], m["value_size"], entries, m["flags"])
    except OSError as e:
        fix = "choose fewer slots, or give the service a higher memory limit and CAP_BPF"
        raise LoaderError(f"map {m['name']}", str(e), fix) from e


def _close(fds: dict[str, int]) -> None:
    for fd in fds.values():
        os.close(fd)


def check_headers(release: str, modules: Path = Path("/lib/modules")) -> None:
    """Raises LoaderError with the packages to install where the running kernel's headers are missing."""
    build = modules / release / "build"
    if (build / "include").is_dir() or Path("/sys/kernel/kheaders.tar.xz").exists():
        return
    raise LoaderError(
        "loader bcc",
        f"no headers of the running kernel: {build} does not lead to them and there is no /sys/kernel/kheaders.tar.xz",
        f"install them (Debian, Ubuntu: apt-get install linux-headers-{release}; Fedora, RHEL: dnf install "
        f"kernel-devel-{release}), or use the libbpf loader, which needs none",
    )


@functools.cache
def interpreter() -> str:
    """A Python that has BCC's bindings: this one, or the distribution's. Raises LoaderError."""
    # PyPI's package "bcc" is something else and has no BPF.
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/bin")):
        if python and _run([python, "-I", "-c", "from bcc import BPF"]).returncode == 0:
            return python
    raise LoaderError("loader bcc", "no Python here has the module bcc with a class BPF", PACKAGE_FIX)


@functools.cache
def _compile(source: Path, python: str) -> dict[str, Any]:
    """What bcc_compile.py prints. Raises LoaderError with the compiler's last words."""
    helper = Path(__file__).with_name("bcc_compile.py")
    done = _run([python, "-I", str(helper), str(source), str(source.parent), PROGRAM])
    if done.returncode == 0:
        out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return out
    log = done.stderr.strip()
    errors = [line for line in log.splitlines() if "error" in line.lower()]
    cause = errors[0] if errors else f"exit status {done.returncode}"
    fix = f"report this with the log, or use the libbpf loader (BCC under {python}, kernel {platform.release()})"
    raise LoaderError(f"compiling {source.name} with BCC", cause, fix, log)


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    # S603: an interpreter and files of ours
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=_COMPILE_SECONDS)  # noqa: S603
