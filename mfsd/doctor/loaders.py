# SPDX-License-Identifier: Apache-2.0
"""How the classifier gets into the kernel: libraries, privileges, and whether it really loads."""

from __future__ import annotations

import ctypes
import platform
import resource
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mfsd.datapath.bpf.bcc import check_headers, interpreter
from mfsd.datapath.bpf.libbpf import LibbpfLoader, library
from mfsd.datapath.bpf.teller import Teller
from mfsd.datapath.bpf.yielding import Yielding
from mfsd.datapath.errors import DatapathError, LoaderError
from mfsd.doctor.finding import Finding, Severity
from mfsd.host.privileges import CAP_SYS_PTRACE, effective

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.doctor.finding import Check, Context

CAPABILITIES: Final = {
    12: ("CAP_NET_ADMIN", "hooks and qdiscs can't be changed"),
    39: ("CAP_BPF", "the classifier can't be loaded"),
    CAP_SYS_PTRACE: (
        "CAP_SYS_PTRACE",
        "rules by executable and, for connections older than the daemon, selectors by process name its own user's only",
    ),
}
"""Bit (include/uapi/linux/capability.h) -> name, and what is missing without it."""
YIELDING: Final = {38: ("CAP_PERFMON", "deferred connections don't yield in the network")}
"""The same with network.yield."""
_NEEDED: Final = (12, 39)
_ALL: Final = 21
"""CAP_SYS_ADMIN stands in for..."""
_STOOD_IN_FOR: Final = (38, 39)
_TRIAL_ROWS: Final = 16
_LISTED: Final = (
    "new connections of a selector are found a quarter of a second late, their first bytes are default traffic, and "
    "each look costs more the more sockets the host has"
)


def capabilities(context: Context) -> Iterator[Finding]:
    """Of this process, which may have others than the daemon."""
    mask = effective(context.read("proc/self/status") or "")
    if mask is None:
        return
    wanted = CAPABILITIES if context.config.network.mode == "off" else CAPABILITIES | YIELDING
    missing = [bit for bit in wanted if not mask >> bit & 1 and not (bit in _STOOD_IN_FOR and mask >> _ALL & 1)]
    have = ", ".join(name for bit, (name, _) in wanted.items() if bit not in missing) or "none of them"
    lost = "; ".join(f"without {wanted[b][0]} {wanted[b][1]}" for b in missing)
    if any(b in missing for b in _NEEDED):
        yield Finding(
            "privileges.capabilities",
            Severity.WARN,
            "This process may not do what the daemon must",
            f"has {have}",
            f"{lost}. The daemon has capabilities of its own, but checks that need them are left out here",
            "run mfsctl doctor as root; give the daemon AmbientCapabilities=CAP_BPF CAP_NET_ADMIN",
        )
    elif missing:
        yield Finding(
            "privileges.capabilities", Severity.INFO, "CAP_BPF and CAP_NET_ADMIN are there", f"has {have}", lost
        )
    else:
        yield Finding("privileges.capabilities", Severity.OK, "All capabilities of use are there", f"has {have}")


def memlock(_: Context) -> Iterator[Finding]:
    """Matters for old kernels only."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Finding(
        "privileges.memlock",
        Severity.OK,
        "Locked memory is not limited for BPF",
        "unlimited" if soft == resource.RLIM_INFINITY else f"RLIMIT_MEMLOCK = {soft} bytes",
        "since 5.11 maps count against the memory control group, not against this limit",
    )


def libbpf(_: Context) -> Iterator[Finding]:
    """The default loader."""
    try:
        lib = library()
    except LoaderError as e:
        other = find_bcc() is not None
        yield Finding(
            "loader.libbpf",
            Severity.WARN if other else Severity.FAIL,
            "libbpf 1.x is missing",
            str(e),
            "only the BCC loader is left" if other else "nothing is left to load the classifier with",
            "apt-get install libbpf1 (Debian 12, Ubuntu 24.04 and later)",
        )
        return
    lib.libbpf_version_string.restype = ctypes.c_char_p
    text = lib.libbpf_version_string().decode()
    yield Finding("loader.libbpf", Severity.OK, "libbpf is there", text, "1.0 is the oldest that works")


def find_bcc() -> str | None:
    """The Python that has BCC's bindings, this one or the distribution's; None if none has."""
    try:
        return interpreter()
    except LoaderError:
        return None


def bcc(_: Context) -> Iterator[Finding]:
    """The second loader: its bindings, and the headers that it compiles against."""
    python = find_bcc()
    if python is None:
        yield Finding(
            "loader.bcc",
            Severity.INFO,
            "BCC is not installed",
            "no Python here has a module bcc with a class BPF",
            'needed only for daemon.loader = "bcc", or where libbpf 1.x is missing; it wants kernel headers, too',
            f"apt-get install python3-bpfcc linux-headers-{platform.release()}",
        )
        return
    try:
        check_headers(platform.release())
    except LoaderError as e:
        yield Finding(
            "loader.bcc",
            Severity.INFO,
            "BCC is there, but not the headers that it compiles against",
            f"bindings of {python}; {e.cause}",
            'daemon.loader = "bcc" would not work; libbpf needs no headers',
            e.fix,
        )
    else:
        yield Finding("loader.bcc", Severity.OK, "BCC and kernel headers are there", f"bindings of {python}")


def _may_load(context: Context) -> bool:
    """CAP_BPF (or CAP_SYS_ADMIN) and CAP_NET_ADMIN are there."""
    mask = effective(context.read("proc/self/status") or "") or 0
    return bool((mask >> 39 & 1 or mask >> _ALL & 1) and mask >> 12 & 1)


def _trial(
    context: Context, part: Callable[[Classifier], AbstractContextManager[object]], refused: Finding, done: Finding
) -> Iterator[Finding]:
    """What follows from loading a part of the kernel side, and taking it off again; nothing where that can't be."""
    if not _may_load(context):
        return
    try:
        with LibbpfLoader().open_classifier(_TRIAL_ROWS) as known, part(known):
            pass
    except (DatapathError, OSError) as e:
        yield replace(refused, detail=str(e))
    else:
        yield done


def classifier(context: Context) -> Iterator[Finding]:
    """Load it, attach it nowhere, and unload it: the verifier's own word."""
    number = "loader.classifier"
    refused = Finding(
        number,
        Severity.FAIL,
        "The classifier does not load",
        meaning="mfsd can neither observe nor enforce",
        fix="see the detail; kernel.* and privileges.* may tell why",
    )
    seen = "the kernel's verifier accepts it (tried and unloaded again)"
    return _trial(context, nullcontext, refused, Finding(number, Severity.OK, "The classifier loads", seen))


def sockets(context: Context) -> Iterator[Finding]:
    """Whether the kernel tells of connections; hooked in for a moment, with no slots and no rules."""
    number, wanted = "loader.sockets", context.config.daemon.sockets
    if wanted == "listing":
        yield Finding(
            number,
            Severity.INFO,
            "Connections are listed by inet_diag, as configured",
            f'daemon.sockets = "{wanted}"',
            _LISTED,
            'daemon.sockets = "auto" lets the kernel tell of them where it can',
        )
        return
    refused = Finding(
        number,
        Severity.FAIL if wanted == "kernel" else Severity.WARN,
        "The kernel does not tell of connections: they are listed by inet_diag",
        meaning='mfsd does not start with daemon.sockets = "kernel"' if wanted == "kernel" else _LISTED,
        fix="mount cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup/unified), in a container the host's; use Linux 6.1",
    )
    seen = "its programs hang on the root of cgroup v2 (tried and taken off again)"
    yield from _trial(context, Teller, refused, Finding(number, Severity.OK, "The kernel tells of connections", seen))


def yields(context: Context) -> Iterator[Finding]:
    """Whether deferred connections can yield in the network; registered for a moment, for nobody."""
    number, wanted = "loader.yield", context.config.network.mode
    if wanted == "off":
        yield Finding(
            number,
            Severity.INFO,
            "Levels hold on this host's links only, as configured",
            'network.yield = "off"',
            "deferred traffic fills the queues of switches without priorities, and urgent traffic waits there",
            'network.yield = "auto" lets deferred connections yield there (docs/network.md)',
        )
        return
    refused = Finding(
        number,
        Severity.FAIL if wanted == "on" else Severity.WARN,
        "Deferred connections do not yield in the network",
        meaning='mfsd does not start with network.yield = "on"'
        if wanted == "on"
        else "levels hold on this host's links",
        fix="see the detail: it takes CAP_PERFMON, BTF, Linux 6.4 and cubic in the kernel",
    )
    seen = "the congestion control loads and registers (tried and taken off again)"
    done = Finding(number, Severity.OK, "Deferred connections yield in the network", seen)
    yield from _trial(context, Yielding, refused, done)


CHECKS: Final[tuple[Check, ...]] = (capabilities, memlock, libbpf, bcc, classifier, sockets, yields)
