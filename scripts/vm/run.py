#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the datapath and end-to-end tests in guests with stock kernels, one kernel after the other.

    run.py [--report] [--batch NAME] [--guests N] [--only EXPRESSION] [--tests PATH] all|6.1|6.12|7.3 ...

The tests are dealt into batches, each of which has a guest of its own and is judged by itself: what has run stays when
another is cut short, and can be run again alone. Leaves in build/vm/KERNEL/BATCH/: result.json, junit.xml, pytest.txt,
doctor.txt, dmesg.txt and console.txt. Exits with 1 if a guest did not boot, a test failed or did not run, or was
skipped for something that the kernel has. ``--report`` then writes docs/kernels.md from all that is in build/vm.
"""

from __future__ import annotations

import argparse
import datetime as dt
import fcntl
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
from judge import Run, judge, read_cases
from report import write_report

LIMIT_SECONDS: Final = 2400
"""Of one guest; none needs half of it on an idle machine."""
WAIT_FACTOR: Final = 6
"""How much longer than natively tests wait for a condition; see tests/support/waiting.py."""
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
BATCHES: Final = {
    "yield": ("tests/bpf/test_yielding.py", "tests/bpf/test_yielding_way.py", "tests/e2e/test_network.py"),
    "daemon": ("tests/vm/test_daemon.py", "tests/vm/test_wire.py"),
    "qdiscs": ("tests/vm/test_bcc.py", "tests/vm/test_mq.py", "tests/vm/test_prio.py", "tests/vm/test_roots.py"),
    "bpf": ("tests/bpf",),
    "enforce": ("tests/enforce",),
    "habits": ("tests/e2e/test_habits.py", "tests/e2e/test_habits_fallback.py", "tests/e2e/test_habits_where.py"),
    "rest": ("tests/vm", "tests/e2e"),
}
"""Name -> files, or folders of which it has the files that no other batch names."""
_SLOW: Final = "it holds the daemon to milliseconds, which emulated processors don't keep; `make test` runs it"
_SLOW_POLICY: Final = (
    "it holds the policy to what the link carries, which emulated processors don't fill; `make test` runs it"
)
_NO_KERNEL: Final = "nothing in it depends on the kernel; `make test` runs it"
_LOOKS: Final = (
    "it looks for levels that last a second while eight connections keep the processor busy; `make test` runs it"
)
_LIFECYCLE: Final = "tests/e2e/test_lifecycle.py::test_"
LEFT_OUT: Final = {
    "tests/bpf/test_path.py": _NO_KERNEL,
    "tests/bpf/test_peer_clock.py": _NO_KERNEL,
    "tests/e2e/test_steering.py::test_a_transfer_rises_as_its_deadline_nears": _LOOKS,
    "tests/e2e/test_habits_who.py": _NO_KERNEL,
    "tests/e2e/test_noharm.py": _SLOW_POLICY,
    "tests/e2e/test_peers.py": _SLOW_POLICY,
    "tests/e2e/test_relay.py": _NO_KERNEL,
    "tests/e2e/test_tenants.py": _NO_KERNEL,
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


def arguments(batch: str) -> str:
    """Of pytest, for a batch."""
    chosen = BATCHES[batch]
    others = [path for name, paths in BATCHES.items() if name != batch for path in paths if path not in chosen]
    files = [path for path in others if path.endswith(".py")]
    left_out = [f"--ignore={name}" if name.endswith(".py") else f"--deselect={name}" for name in LEFT_OUT]
    return " ".join([*left_out, *(f"--ignore={path}" for path in files), *chosen])


def job(has: set[str], chosen: str) -> str:
    """What runs in a guest."""
    python = f"{sys.prefix}/bin/python"
    return f"""
cd {ROOT}
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={ROOT}:{ROOT}/tests
export MFSD_VM=1 MFSD_WAIT_FACTOR={WAIT_FACTOR} MFSD_VM_FEATURES="{" ".join(sorted(has))}"
{python} -m pytest -p no:cacheprovider -p support.short -p support.emulated -v --tb=short --durations=25 \\
    -o junit_family=xunit1 --junitxml=/results/junit.xml {chosen} > /results/pytest.txt 2>&1
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


def run_kernel(name: str, jobs: dict[str, str], guests: int) -> list[Run]:
    """Fetch a kernel, then boot, test and judge a guest for each of the jobs (name -> arguments of pytest)."""
    cache = kernels.cache_dir()
    kernel = kernels.fetch(name, cache)
    has = kernel.features()
    image.prepare(kernel, cache)
    print(f"vm: {name}: {kernel.release}, {', '.join(jobs)}; guests at a time: {guests}", flush=True)

    def one(batch: str, chosen: str) -> Run:
        work, to = cache / "runs" / name / batch, BUILD / name / batch
        for folder in (work, to):
            shutil.rmtree(folder, ignore_errors=True)
        run = Run(name, kernel.release, 0, sorted(has), batch, _commit(), f"{dt.datetime.now(dt.UTC):%F}")
        _collect(run, guest.run(kernel, job(has, chosen), cache, work, LIMIT_SECONDS), work, to)
        run.problems += judge(run.cases, has)
        run.save(to / "result.json")
        shutil.rmtree(work)
        _tell(run, to)
        return run

    with ThreadPoolExecutor(guests) as pool:
        return list(pool.map(one, jobs, jobs.values()))


def _tell(run: Run, to: Path) -> None:
    where = f"vm: {run.kernel} {run.batch}"
    for problem in run.problems:
        print(f"{where}: {problem}")
    verdict = "NOT GREEN" if run.problems else "green"
    counts = ", ".join(f"{run.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
    print(f"{where} ({run.release}): {verdict} in {run.seconds:.0f} s; {counts}; details in {to}", flush=True)


def _commit() -> str:
    """Of the checkout, with a + if there is more in it; empty where there is no history."""
    argv = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    return subprocess.run(argv, check=False, capture_output=True, text=True).stdout.strip()


def _collect(run: Run, outcome: guest.Outcome, work: Path, to: Path) -> None:
    """Take over one guest's results."""
    shutil.copytree(outcome.results, to)
    shutil.copy(work / "console.txt", to)
    run.seconds = round(outcome.seconds)
    junit = to / "junit.xml"
    if not outcome.booted:
        run.problems.append(f"the guest did not boot; see {to}/console.txt")
    elif not junit.exists() or outcome.status is None:
        run.problems.append(f"the tests did not end (status {outcome.status}); see {to}/pytest.txt")
    else:
        run.cases = read_cases(junit)
        if outcome.status != 0 and not run.count("failed"):
            run.problems.append(f"pytest ended with status {outcome.status}; see {to}/pytest.txt")
    if (to / "doctor.txt").exists():
        run.doctor = (to / "doctor.txt").read_text(errors="replace").splitlines()


def main() -> int:
    """Run the kernels that are asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", default=["6.1"])
    parser.add_argument("--batch", action="append", choices=BATCHES, help="only this one (may be repeated)")
    parser.add_argument("--guests", type=int, default=2, metavar="N", help="at a time (default: %(default)s)")
    parser.add_argument("--only", default="", help="pytest -k expression: in one guest, apart from the batches")
    parser.add_argument("--tests", action="append", metavar="PATH", help="only these: in one guest, apart, too")
    parser.add_argument("--report", action="store_true", help="write docs/kernels.md")
    args = parser.parse_args()
    names = list(kernels.KERNELS) if "all" in args.kernels else args.kernels
    unknown = [name for name in names if name not in kernels.KERNELS]
    if unknown:
        sys.exit(f"vm: no kernel {', '.join(unknown)}; there are {', '.join(kernels.KERNELS)} and all")
    install()
    jobs = {batch: arguments(batch) for batch in args.batch or BATCHES}
    if args.only or args.tests:
        choice = f"-k {shlex.quote(args.only)} " if args.only else ""
        jobs = {"apart": choice + " ".join(args.tests or SELECTION)}
    cache = kernels.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:  # two runs would make, and remove, the same images
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"vm: waiting for another run, which has {cache}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [run for name in names for run in run_kernel(name, jobs, args.guests)]
    if args.report:
        write_report(BUILD, ROOT / "docs" / "kernels.md", BATCHES, LEFT_OUT)
    return 1 if any(run.problems for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
