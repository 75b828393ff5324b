# SPDX-License-Identifier: Apache-2.0
"""Boot a kernel under qemu's software emulation, run a job in it, and bring back what it left in its results folder.

No KVM: where /dev/kvm exists inside a virtual machine, stock guests were seen to hang under it.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from image import base_disk, build_initrd, kernel_disk, pack_checkout
from wire import Wire

if TYPE_CHECKING:
    from pathlib import Path

    from kernels import Kernel

CPUS: Final = 1
"""Two guests run at a time. With two processors each, they spent half of two cores on waiting for each other's."""
MEMORY: Final = "2G"
BOOT_SECONDS: Final = 240
"""Generous: 10 s on an idle machine."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a guest. ``status`` is the job's, None if it did not end."""

    booted: bool
    status: int | None
    seconds: float
    results: Path


def run(kernel: Kernel, job: str, cache: Path, work: Path, limit: float) -> Outcome:
    """Run ``job`` (a bash script) in a guest of its own, for at most ``limit`` seconds. The guest is gone afterwards.

    ``cache`` keeps the images; ``work`` gets the console's log and the results and should be empty.
    """
    work.mkdir(parents=True, exist_ok=True)
    results = work / "results"
    results.mkdir()
    (results / "job.sh").write_text(job)
    pack_checkout(results / "checkout.tar", work / "checkout")
    disks = [base_disk(cache), kernel_disk(kernel, cache)]
    initrd = build_initrd(kernel, work)
    console = work / "console.txt"
    begin = time.monotonic()
    with console.open("wb") as log, Wire(work) as wire:
        argv = _qemu(kernel, disks, initrd, results, wire)
        qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(qemu, results, begin, limit)
        finally:
            qemu.kill()
            qemu.wait()
    status = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        status = int((results / "status").read_text())
    return Outcome((results / "booted").exists(), status, time.monotonic() - begin, results)


def _wait(qemu: subprocess.Popen[bytes], results: Path, begin: float, limit: float) -> None:
    """Until it has powered off, or has not booted in time, or the limit is reached."""
    while qemu.poll() is None:
        gone = time.monotonic() - begin
        if gone > limit:
            print(f"vm: stopped after {limit:.0f} s", flush=True)
            return
        if gone > BOOT_SECONDS and not (results / "booted").exists():
            print(f"vm: not booted after {BOOT_SECONDS} s", flush=True)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            qemu.wait(1)


def _qemu(kernel: Kernel, disks: list[Path], initrd: Path, results: Path, wire: Wire) -> list[str]:
    # snapshot: the guest's writes go to a temporary file, the images stay as they are.
    drives = [w for d in disks for w in ("-drive", f"file={d},format=raw,if=virtio,snapshot=on,cache=unsafe")]
    cards = [
        word
        for i, path in enumerate(wire.paths)
        for word in (
            "-netdev", f"stream,id=wire{i},server=off,addr.type=unix,addr.path={path}",
            "-device", f"virtio-net-pci,netdev=wire{i},mac=52:54:00:6d:66:0{i},romfile=",
        )
    ]  # fmt: skip
    command_line = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=auto nokaslr net.ifnames=0"
    return [
        "nice", "-n", "10",
        "qemu-system-x86_64",
        "-machine", "q35", "-accel", "tcg,thread=multi", "-smp", str(CPUS), "-m", MEMORY,
        # Not affected by Meltdown: with page table isolation a system call costs five times as much under emulation.
        # No AVX, which is slow to emulate, too.
        "-cpu", "EPYC,-avx,-avx2,-f16c,-fma",
        "-kernel", str(kernel.vmlinuz), "-initrd", str(initrd), "-append", command_line,
        *drives,
        "-virtfs", f"local,path={results},mount_tag=results,security_model=none",
        "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
        *cards,
        "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
    ]  # fmt: skip
