# SPDX-License-Identifier: Apache-2.0
"""The kernel: version, BPF, qdiscs, socket diagnostics."""

from __future__ import annotations

import ctypes
import errno
import gzip
import os
import platform
import re
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Final

from mfsd.datapath import tc
from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.attach import TCX_EGRESS
from mfsd.datapath.bpf.libbpf import OLDEST_KERNEL
from mfsd.datapath.errors import LoaderError
from mfsd.datapath.facts import kernel_has
from mfsd.doctor.finding import Finding, Severity
from mfsd.host.sockets import DiagError, SocketResolver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.doctor.finding import Check, Context

TCX_KERNEL: Final = (6, 6)
CLONE_NEWNET: Final = 0x40000000
LO: Final = 1

QDISCS: Final = {
    "htb": "backend htb (a rate is given)",
    "ets": "backend prio (line rate), with floors",
    "prio": "backend prio without floors, where there is no ets",
    "tbf": "backend prio (ets) with a rate",
    "drr": "lanes with backend prio",
    "clsact": "hooking in without TCX",
    "fq": "pacing below other bands",
    "mq": "what multi-queue devices have by default",
}
"""Qdisc -> what mfsd, or the machine, uses it for."""
_OPTIONS: Final = {"clsact": "NET_SCH_INGRESS", "mq": "NET_SCHED"}
_MODULES: Final = {"clsact": "sch_ingress"}
_ESSENTIAL: Final = ("htb", "ets", "prio")
"""One of them must be there (mfsd/datapath/qdisc/plan.py)."""


def release() -> tuple[int, int]:
    """(major, minor) of the running kernel; (0, 0) when its name is strange."""
    m = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(m[1]), int(m[2])) if m else (0, 0)


def version(_: Context) -> Iterator[Finding]:
    """Old enough for nothing to work, or too old for the better hook."""
    seen = f"{platform.system()} {platform.release()} {platform.machine()}"
    if release() < OLDEST_KERNEL:
        yield Finding(
            "kernel.version",
            Severity.FAIL,
            "The kernel is too old",
            seen,
            "the classifier reads the coarse monotonic clock (bpf_ktime_get_coarse_ns), which came with 5.11",
            "use a kernel of 5.11 or later; 6.6 or later is better (TCX)",
        )
    else:
        yield Finding("kernel.version", Severity.OK, "The kernel is new enough", seen, "5.11 is the oldest that works")


def tcx(_: Context) -> Iterator[Finding]:
    """The better of the two hooks."""
    try:
        syscall.prog_query(LO, TCX_EGRESS)
        has = True
    except LoaderError:
        has = release() >= TCX_KERNEL
    except OSError as e:
        has = e.errno == errno.EPERM and release() >= TCX_KERNEL
    if has:
        yield Finding(
            "kernel.tcx",
            Severity.OK,
            "The kernel has TCX",
            meaning="the classifier hangs at the head of the egress chain and goes by itself when the daemon dies",
        )
    else:
        yield Finding(
            "kernel.tcx",
            Severity.INFO,
            "The kernel has no TCX",
            f"{platform.release()}; TCX came with 6.6",
            "the classifier hangs on clsact instead, which works as well; after a crash it stays there without effect "
            "until the daemon starts again or `mfsctl restore` is run",
        )


def btf(context: Context) -> Iterator[Finding]:
    """Not needed, but other tools want it."""
    if (context.root / "sys/kernel/btf/vmlinux").exists():
        yield Finding("kernel.btf", Severity.OK, "The kernel describes its types (BTF)", "/sys/kernel/btf/vmlinux")
    else:
        yield Finding(
            "kernel.btf",
            Severity.INFO,
            "The kernel does not describe its types (no BTF)",
            "no /sys/kernel/btf/vmlinux",
            "mfsd's classifier uses stable interfaces only and works without; tracing tools may not",
        )


def jit(context: Context) -> Iterator[Finding]:
    """Interpreted BPF costs several times as much per packet."""
    value = context.read("proc/sys/net/core/bpf_jit_enable")
    if value is None:
        yield Finding(
            "kernel.jit",
            Severity.INFO,
            "Can't see whether BPF is compiled",
            "net.core.bpf_jit_enable is not readable here",
            "it is visible to root in the initial network namespace only; kernels of distributions compile",
        )
    elif value == "0":
        yield Finding(
            "kernel.jit",
            Severity.WARN,
            "BPF programs are interpreted",
            "net.core.bpf_jit_enable = 0",
            "the classifier takes several times as long for each packet",
            "sysctl -w net.core.bpf_jit_enable=1",
        )
    else:
        yield Finding("kernel.jit", Severity.OK, "BPF programs are compiled", f"net.core.bpf_jit_enable = {value}")


def config_text(context: Context) -> str | None:
    """The kernel's build configuration, from where distributions keep it."""
    packed = context.root / "proc/config.gz"
    try:
        return gzip.decompress(packed.read_bytes()).decode()
    except (OSError, EOFError):
        return context.read(f"boot/config-{platform.release()}") or context.read(
            f"lib/modules/{platform.release()}/config"
        )


def option(text: str, name: str) -> str:
    """Value of CONFIG_<name>: "y", "m", or "" where it is not set."""
    m = re.search(rf"^CONFIG_{name}=([ym])$", text, re.MULTILINE)
    return m[1] if m else ""


def loadable(module: str) -> bool:
    """Module exists and modprobe would load it; nothing is loaded."""
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if modprobe is None:
        return False
    done = subprocess.run(  # noqa: S603 - a fixed program with names from the tables above
        [modprobe, "--dry-run", "--quiet", module], check=False, capture_output=True, timeout=10
    )
    return done.returncode == 0


def has_qdisc(kind: str, config: str | None) -> bool | None:
    """Whether the kernel has a qdisc, loading no module where its configuration is known; None: can't tell."""
    if config is not None:
        value = option(config, _OPTIONS.get(kind, f"NET_SCH_{kind.upper()}"))
        return value == "y" or (value == "m" and loadable(_MODULES.get(kind, f"sch_{kind}")))
    return _probe(kind)


def _probe(kind: str) -> bool | None:
    """Ask the kernel from a network namespace that exists for this question only."""
    answer: list[bool] = []

    def ask() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) == 0:  # ends with the thread
            with tc.TcSocket() as sock:
                answer.append(kernel_has(sock, kind))

    thread = threading.Thread(target=ask, name="doctor-probe")
    thread.start()
    thread.join()
    return answer[0] if answer else None


def qdiscs(context: Context) -> Iterator[Finding]:
    """One of htb, ets and prio must be there."""
    config = config_text(context)
    known = {kind: has_qdisc(kind, config) for kind in QDISCS}
    words = {True: "yes", False: "no", None: "unknown"}
    seen = ", ".join(f"{kind} {words[has]}" for kind, has in known.items())
    lacking = "; ".join(f"no {k}: {use} is not to be had" for k, use in QDISCS.items() if known[k] is False and use)
    if all(known[k] is False for k in _ESSENTIAL):
        yield Finding(
            "kernel.qdiscs",
            Severity.FAIL,
            "The kernel has none of htb, ets and prio",
            seen,
            "mfsd can observe, but not enforce",
            "use a kernel with CONFIG_NET_SCH_HTB, CONFIG_NET_SCH_ETS or CONFIG_NET_SCH_PRIO (Debian: "
            "linux-image-amd64, not -cloud), or install linux-modules-extra",
        )
    elif all(known[k] is None for k in _ESSENTIAL):
        yield Finding(
            "kernel.qdiscs",
            Severity.INFO,
            "Can't tell which qdiscs the kernel has",
            seen,
            "there is no kernel configuration to read, and asking the kernel needs privileges",
            "run mfsctl doctor as root",
        )
    else:
        yield Finding("kernel.qdiscs", Severity.OK, "The kernel can enforce", seen, lacking)


def diag(_: Context) -> Iterator[Finding]:
    """Without inet_diag no selector finds its socket."""
    try:
        with SocketResolver():
            pass
    except DiagError as e:
        yield Finding(
            "kernel.inet_diag",
            Severity.FAIL,
            "Sockets can't be looked up",
            str(e),
            "selectors by tuple, range or process find nothing; the progress of transfers stays unknown",
            "modprobe tcp_diag (CONFIG_INET_DIAG, CONFIG_INET_TCP_DIAG)",
        )
    else:
        yield Finding("kernel.inet_diag", Severity.OK, "Sockets can be looked up", "inet_diag answers")


def lockdown(context: Context) -> Iterator[Finding]:
    """Confidentiality lockdown forbids what BPF needs."""
    value = context.read("sys/kernel/security/lockdown")
    if value is not None and "[confidentiality]" in value:
        yield Finding(
            "kernel.lockdown",
            Severity.WARN,
            "The kernel is locked down (confidentiality)",
            value,
            "some uses of BPF are forbidden; whether the classifier loads is said by loader.classifier",
            "boot with lockdown=integrity if it does not",
        )


CHECKS: Final[tuple[Check, ...]] = (version, tcx, btf, jit, qdiscs, diag, lockdown)
