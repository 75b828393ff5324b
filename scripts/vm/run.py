#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the datapath and end-to-end tests in guests with stock kernels, one after the other.

    run.py [--report] [--only EXPRESSION] [--tests PATH] all|6.1|6.12|7.3 ...

Leaves per kernel in build/vm/KERNEL/: result.json, junit.xml, pytest.txt, doctor.txt, dmesg.txt, console.txt. Exits
with 1 if a guest did not boot, a test failed or did not run, or was skipped for something that the kernel has.
``--report`` then writes docs/kernels.md from all results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import guest
import kernels
from image import ROOT
from judge import TIERS, Run, judge, read_cases
from report import write_report

LIMIT_SECONDS: Final = 900
"""Of one guest. The target is 720 on two cores of their own."""
WAIT_FACTOR: Final = 6
"""How much longer than natively tests wait for a condition; see tests/e2e/rig.py."""
PACKAGES: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "mkfs.ext4": "e2fsprogs",
}
BCC: Final = "python3-bpfcc"
BUILD: Final = ROOT / "build" / "vm"
SELECTION: Final = ("tests/bpf", "tests/enforce", "tests/vm", "tests/e2e")


def job(has: set[str], only: str, tests: tuple[str, ...] = SELECTION) -> str:
    """What runs in the guest."""
    python = f"{sys.prefix}/bin/python"
    choice = f"-k '{only}'" if only else ""
    return f"""
cd {ROOT}
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={ROOT}:{ROOT}/tests/vm
export MFSD_VM=1 MFSD_WAIT_FACTOR={WAIT_FACTOR} MFSD_VM_FEATURES="{" ".join(sorted(has))}"
{python} -m pytest -p no:cacheprovider -p emulated -v --tb=short --durations=25 \\
    -o junit_family=xunit1 --junitxml=/results/junit.xml {choice} {" ".join(tests)} > /results/pytest.txt 2>&1
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
    subprocess.run(["/usr/bin/apt-get", "update", "-qq"], check=True, env=env)
    subprocess.run(["/usr/bin/apt-get", "install", *quiet, *missing], check=True, env=env, stdout=subprocess.DEVNULL)


def run_kernel(name: str, only: str, tests: tuple[str, ...]) -> Run:
    """Fetch, boot, test, judge one kernel."""
    cache = kernels.cache_dir()
    kernel = kernels.fetch(name, cache)
    has = kernel.features()
    work = cache / "runs" / name
    shutil.rmtree(work, ignore_errors=True)
    print(f"vm: {name}: booting {kernel.release}", flush=True)
    outcome = guest.run(kernel, job(has, only, tests), cache, work, LIMIT_SECONDS)
    to = BUILD / name
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(outcome.results, to)
    shutil.copy(work / "console.txt", to)
    run = Run(name, kernel.release, round(outcome.seconds), sorted(has))
    junit = to / "junit.xml"
    if not outcome.booted:
        run.problems.append(f"the guest did not boot; see {to}/console.txt")
    elif not junit.exists():
        run.problems.append(f"the tests did not end (status {outcome.status}); see {to}/pytest.txt")
    else:
        run.cases = read_cases(junit)
        run.problems += judge(run.cases, has, TIERS if tests == SELECTION and not only else ())
        if outcome.status != 0 and not run.problems:
            run.problems.append(f"pytest ended with status {outcome.status}; see {to}/pytest.txt")
    if (to / "doctor.txt").exists():
        run.doctor = (to / "doctor.txt").read_text(errors="replace").splitlines()
    run.save(to / "result.json")
    return run


def main() -> int:
    """Run the kernels that are asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", default=["6.1"])
    parser.add_argument("--only", default="", help="pytest -k expression; the results are no complete run then")
    parser.add_argument("--tests", action="append", metavar="PATH", help="only these; no complete run either")
    parser.add_argument("--report", action="store_true", help="write docs/kernels.md from the results of all kernels")
    args = parser.parse_args()
    names = list(kernels.KERNELS) if "all" in args.kernels else args.kernels
    unknown = [name for name in names if name not in kernels.KERNELS]
    if unknown:
        sys.exit(f"vm: no kernel {', '.join(unknown)}; there are {', '.join(kernels.KERNELS)} and all")
    install()
    failed = False
    for name in names:
        run = run_kernel(name, args.only, tuple(args.tests) if args.tests else SELECTION)
        counts = {o: sum(c.outcome == o for c in run.cases) for o in ("passed", "failed", "skipped")}
        for problem in run.problems:
            print(f"vm: {name}: {problem}")
        failed |= bool(run.problems)
        verdict = "NOT GREEN" if run.problems else "green"
        print(f"vm: {name} ({run.release}): {verdict} in {run.seconds:.0f} s; {BUILD / name}")
        print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", flush=True)
    if args.report:
        write_report(BUILD, ROOT / "docs" / "kernels.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
