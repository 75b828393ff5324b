#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the datapath and end-to-end tests in guests with stock kernels, one after the other.

    run.py [--report] [--only EXPRESSION] [--tests PATH] all|6.1|6.12|7.3 ...

Leaves per kernel in build/vm/KERNEL/: result.json, and per guest junit.xml, pytest.txt, doctor.txt, dmesg.txt and
console.txt. Exits with 1 if a guest did not boot, a test failed or did not run, or was skipped for something that the
kernel has. ``--report`` then writes docs/kernels.md, once there are complete runs of all kernels.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import guest
import image
import kernels
from image import ROOT
from judge import TIERS, Run, judge, read_cases
from report import write_report

LIMIT_SECONDS: Final = 1200
"""Of one guest. The target is 720 on two cores of their own."""
WAIT_FACTOR: Final = 6
"""How much longer than natively tests wait for a condition; see tests/support/rig.py."""
PACKAGES: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "mkfs.ext4": "e2fsprogs",
}
BCC: Final = "python3-bpfcc"
BUILD: Final = ROOT / "build" / "vm"
SELECTION: Final = ("tests/bpf", "tests/enforce", "tests/vm", "tests/e2e")
"""What needs a kernel. Pure Python is the same everywhere: `make test` is enough."""
SECOND: Final = ("tests/vm/test_daemon.py", "tests/vm/test_wire.py", "tests/e2e/test_lifecycle.py")
"""About half of the time: these run in a guest of their own beside the one that has the rest, because a test keeps one
processor busy, not two."""
_SLOW: Final = "it holds the daemon to milliseconds, which emulated processors don't keep; `make test` runs it"
_NO_KERNEL: Final = "nothing in it depends on the kernel; `make test` runs it"
_LOOKS: Final = (
    "it looks for levels that last a second while eight connections keep the processor busy; `make test` runs it"
)
_LIFECYCLE: Final = "tests/e2e/test_lifecycle.py::test_"
LEFT_OUT: Final = {
    "tests/e2e/test_steering.py::test_a_transfer_rises_as_its_deadline_nears": _LOOKS,
    "tests/e2e/test_habits_who.py": _NO_KERNEL,
    "tests/e2e/test_habits_more.py": "the kinds of tests/e2e/test_habits.py again; `make test` runs it",
    "tests/e2e/test_habits_odd.py": "what it tries is done in tests/e2e/test_habits.py; `make test` runs it",
    "tests/e2e/test_habits_where.py::test_forty_thousand_transfers_are_shown_in_pages": _NO_KERNEL,
    "tests/e2e/test_habits_where.py::test_a_hint_costs_the_same_however_many_sockets_there_are": _SLOW,
    "tests/e2e/test_habits.py::test_sockets_marked_and_closed_leave_room": _SLOW,
    "tests/e2e/test_habits.py::test_one_of_five_connections_carries_all": _SLOW,
    f"{_LIFECYCLE}a_restart_does_not_stall_traffic": _SLOW,
    f"{_LIFECYCLE}reload_changes_what_can_be_changed_and_names_what_needs_a_restart": _NO_KERNEL,
    f"{_LIFECYCLE}a_second_daemon_is_refused_and_the_first_unharmed": _NO_KERNEL,
    f"{_LIFECYCLE}the_device_is_put_back_as_it_was_found[pfifo]": "tests/enforce puts back the same root",
    f"{_LIFECYCLE}the_device_is_put_back_as_it_was_found[tbf]": "tests/enforce puts back the same root",
}
"""Tests that no guest runs -> why."""


def shards(only: str, tests: tuple[str, ...]) -> list[str]:
    """Arguments of pytest for each of the guests that run side by side."""
    choice = f"-k {shlex.quote(only)} " if only else ""
    if tests or only:
        return [choice + " ".join(tests or SELECTION)]
    rest = " ".join(f"--ignore={path}" for path in SECOND)
    left_out = " ".join(f"--deselect={name}" for name in LEFT_OUT)
    first = " ".join(t for t in SELECTION if t not in SECOND)
    return [f"{left_out} {rest} {first}", f"{left_out} {' '.join(SECOND)}"]


def job(has: set[str], arguments: str) -> str:
    """What runs in a guest."""
    python = f"{sys.prefix}/bin/python"
    return f"""
cd {ROOT}
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={ROOT}:{ROOT}/tests
export MFSD_VM=1 MFSD_WAIT_FACTOR={WAIT_FACTOR} MFSD_VM_FEATURES="{" ".join(sorted(has))}"
{python} -m pytest -p no:cacheprovider -p support.short -p support.emulated -v --tb=short --durations=25 \\
    -o junit_family=xunit1 --junitxml=/results/junit.xml {arguments} > /results/pytest.txt 2>&1
status=$?
{python} -m mfsd.cli doctor > /results/doctor.txt 2>&1
exit $status
"""


def install() -> None:
    """Install what is missing of the tools."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [package for tool, package in PACKAGES.items() if shutil.which(tool, path=path) is None]
    if not Path("/usr/lib/python3/dist-packages/bcc").is_dir():
        missing.append(BCC)
    if not missing:
        return
    print(f"vm: installing Debian packages: {' '.join(missing)}", flush=True)
    if os.geteuid() != 0:
        sys.exit(f"vm: not root; run: apt-get install {' '.join(missing)}")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    quiet = ["-y", "-qq", "--no-install-recommends"]
    strict = ["-o", "APT::Update::Error-Mode=any"]
    for words in (["update", "-qq", *strict], ["install", *quiet, *missing]):
        if subprocess.run(["/usr/bin/apt-get", *words], check=False, env=env, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"vm: apt-get {words[0]} failed (see above): guests need {' '.join(missing)}")


def run_kernel(name: str, only: str, tests: tuple[str, ...]) -> Run:
    """Fetch, boot, test, judge one kernel."""
    cache = kernels.cache_dir()
    kernel = kernels.fetch(name, cache)
    has = kernel.features()
    complete = not only and not tests
    jobs = [job(has, arguments) for arguments in shards(only, tests)]
    work, to = cache / "runs" / name, BUILD / (name if complete else f"{name}-partial")
    for folder in (work, to):
        shutil.rmtree(folder, ignore_errors=True)
    image.prepare(kernel, cache)
    print(f"vm: {name}: booting {kernel.release}, {len(jobs)} guest(s)", flush=True)
    with ThreadPoolExecutor(len(jobs)) as pool:
        folders = [work / str(i) for i in range(1, len(jobs) + 1)]
        runs = [pool.submit(guest.run, kernel, j, cache, w, LIMIT_SECONDS) for j, w in zip(jobs, folders, strict=True)]
    run = Run(name, kernel.release, 0, sorted(has))
    for future, folder in zip(runs, folders, strict=True):
        _collect(run, future.result(), folder, to / folder.name)
    run.problems += judge(run.cases, has, TIERS if complete else ())
    run.save(to / "result.json")
    return run


def _collect(run: Run, outcome: guest.Outcome, work: Path, to: Path) -> None:
    """Take over one guest's results."""
    shutil.copytree(outcome.results, to)
    shutil.copy(work / "console.txt", to)
    run.seconds = max(run.seconds, round(outcome.seconds))
    junit = to / "junit.xml"
    if not outcome.booted:
        run.problems.append(f"the guest did not boot; see {to}/console.txt")
    elif not junit.exists() or outcome.status is None:
        run.problems.append(f"the tests did not end (status {outcome.status}); see {to}/pytest.txt")
    else:
        cases = read_cases(junit)
        run.cases += cases
        if outcome.status != 0 and not any(c.outcome == "failed" for c in cases):
            run.problems.append(f"pytest ended with status {outcome.status}; see {to}/pytest.txt")
    if (to / "doctor.txt").exists():
        run.doctor = (to / "doctor.txt").read_text(errors="replace").splitlines()


def main() -> int:
    """Run the kernels that are asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", default=["6.1"])
    parser.add_argument("--only", default="", help="pytest -k expression; the results are no complete run then")
    parser.add_argument("--tests", action="append", metavar="PATH", help="only these; no complete run either")
    parser.add_argument("--report", action="store_true", help="write docs/kernels.md if all kernels have results")
    args = parser.parse_args()
    names = list(kernels.KERNELS) if "all" in args.kernels else args.kernels
    unknown = [name for name in names if name not in kernels.KERNELS]
    if unknown:
        sys.exit(f"vm: no kernel {', '.join(unknown)}; there are {', '.join(kernels.KERNELS)} and all")
    install()
    failed = False
    for name in names:
        run = run_kernel(name, args.only, tuple(args.tests or ()))
        counts = {o: sum(c.outcome == o for c in run.cases) for o in ("passed", "failed", "skipped")}
        for problem in run.problems:
            print(f"vm: {name}: {problem}")
        failed |= bool(run.problems)
        verdict = "NOT GREEN" if run.problems else "green"
        print(f"vm: {name} ({run.release}): {verdict} in {run.seconds:.0f} s; details in {BUILD}")
        print(
            f"vm: {name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", flush=True
        )
    if args.report:
        write_report(BUILD, ROOT / "docs" / "kernels.md", LEFT_OUT)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
