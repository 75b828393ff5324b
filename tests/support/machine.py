# SPDX-License-Identifier: Apache-2.0
"""A fresh Debian with a real systemd as its first process, in systemd-nspawn, on this machine's kernel.

Root file systems are made once by mmdebstrap and kept (MFSD_VM_CACHE, or /var/lib/mfsd-vm): the least that Debian calls
a system, with what the package depends on lying in apt's cache, not installed, because the machine has no way out. Each
machine is unpacked anew. Its network is a namespace that the caller made.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CACHE: Final = Path(os.environ.get("MFSD_VM_CACHE") or "/var/lib/mfsd-vm") / "roots"
INSTALLED: Final = ("systemd", "systemd-sysv", "dbus", "ca-certificates", "iproute2", "kmod")
"""What a Debian has that an operator logs in to; no python3."""
AT_HAND: Final = ("python3", "libbpf1", "libstdc++6", "zlib1g", "bash-completion", "man-db")
LAYOUT: Final = "1"
"""Raise it when what is in a root changes."""
CGROUP: Final = Path("/sys/fs/cgroup")
BOOT_S: Final = 60
TOOLS: Final = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container"}


def install_tools() -> None:
    """Debian packages that are missing."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        argv = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        subprocess.run(argv, check=True, env=env, stdout=subprocess.DEVNULL)


def root_of(suite: str) -> Path:
    """The packed root file system of a Debian suite; made if it is not there."""
    tar = CACHE / f"{suite}-{LAYOUT}.tar"
    if tar.exists():
        return tar
    CACHE.mkdir(parents=True, exist_ok=True)
    part = tar.with_suffix(".part.tar")
    fetch = f'chroot "$1" apt-get install -y -qq --no-install-recommends --download-only {" ".join(AT_HAND)}'
    argv = [
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(INSTALLED)}",
        # The lists stay, and so do the packages that are only at hand.
        "--skip=cleanup/apt,cleanup/reproducible", f"--customize-hook={fetch}",
        suite, str(part), "http://deb.debian.org/debian",
    ]  # fmt: skip
    subprocess.run(argv, check=True)
    part.rename(tar)
    return tar


@dataclass
class Machine:
    """A running one."""

    root: Path
    leader: int
    """Process id of its systemd, seen from outside."""

    def run(self, command: str, *, check: bool = True, patience: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root."""
        argv = ["nsenter", "-t", str(self.leader), "-a", "bash", "-c", command]
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=patience, env=env)
        assert not check or done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def start(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a program as root."""
        return subprocess.Popen(
            ["nsenter", "-t", str(self.leader), "-a", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run(f"systemctl show -P {name} {unit}").stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file of it."""
        to = self.root / path.lstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)


@contextlib.contextmanager
def booted(suite: str, netns: str, folder: Path) -> Iterator[Machine]:
    """A machine of its own, whose network is the namespace ``netns``; gone afterwards, whatever runs in it."""
    root = folder / "root"
    root.mkdir()
    subprocess.run(["tar", "-C", str(root), "-xf", str(root_of(suite))], check=True)
    name = f"mfsd-{secrets.token_hex(4)}"
    # Its cgroups lie below one of ours, in the unified hierarchy, which nspawn looks for at the usual place.
    unified = CGROUP / "unified" if (CGROUP / "unified").is_dir() else CGROUP
    group = unified / name
    group.mkdir()
    argv = [
        "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", f"--machine={name}",
        f"--directory={root}", f"--network-namespace-path=/run/netns/{netns}", "--capability=all",
        "--system-call-filter=bpf", "--console=pipe", "--link-journal=no",
    ]  # fmt: skip
    # In the host's cgroup namespace, as on a host: the kernel tells of connections at the root of the hierarchy.
    script = (
        f'echo $$ > {group}/cgroup.procs && mount -t cgroup2 cgroup2 {CGROUP} && SYSTEMD_NSPAWN_USE_CGNS=0 exec "$@"'
    )
    with (folder / "console.txt").open("w") as console:
        nspawn = subprocess.Popen(
            ["unshare", "-m", "bash", "-c", script, "-", *argv],
            stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield _wait(Machine(root, 0), nspawn)
        finally:
            _end(nspawn, group)
            shutil.rmtree(root, ignore_errors=True)


def _wait(machine: Machine, nspawn: subprocess.Popen[bytes]) -> Machine:
    end = time.monotonic() + BOOT_S
    while time.monotonic() < end:
        assert nspawn.poll() is None, "systemd-nspawn ended; see console.txt"
        children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                machine.leader = int(child)
                state = machine.run("systemctl is-system-running --wait", check=False).stdout.strip()
                if state in ("running", "degraded"):
                    # nspawn shows another boot_id than the kernel's, but not to units with a /proc of their own.
                    machine.run("umount /proc/sys/kernel/random/boot_id", check=False)
                    return machine
        time.sleep(0.1)
    raise AssertionError("systemd did not come up")


def _end(nspawn: subprocess.Popen[bytes], group: Path) -> None:
    nspawn.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        nspawn.wait(20)
    with contextlib.suppress(FileNotFoundError):
        (group / "cgroup.kill").write_text("1")
    nspawn.kill()
    nspawn.wait()
    for _ in range(100):
        for inner in sorted(group.rglob("*"), key=lambda p: -len(p.parts)):
            if inner.is_dir():
                with contextlib.suppress(OSError):
                    inner.rmdir()
        with contextlib.suppress(OSError):
            group.rmdir()
        if not group.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"processes are left in {group}")
