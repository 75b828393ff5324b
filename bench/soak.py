# SPDX-License-Identifier: Apache-2.0
"""Everything that can happen to a host, at random, for a long time: ``make soak MINUTES=60``, as root.

On a link of 200 Mbit/s between two namespaces an honest user's collective runs all the time, beside hostile users that
come and go (bench/parts/workers.py, and the hostile hints of bench/hostile.py), a device that appears, is renamed and
disappears, and a daemon that is killed (SIGKILL), told to end or told to hand over at random moments, after which the
next one starts, or mfsctl restores first. Whenever nobody governs the device, it must be as it was found.

Figures: restores that were exact, of how many; the honest user's longest wait; what the daemons took (resident memory
at most, descriptors at most, the growth of the longest-lived); what is left at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

import click
import psutil

from bench import hostile
from bench.common import Figure, write
from bench.parts import workers
from bench.parts.host import THERE, configure, namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HONEST_S: Final = 20.0
"""Length of one run of the honest user, each of which starts anew."""
WARM_S: Final = 10.0
"""After which a daemon's memory should not grow any more."""


def tool(*words: str) -> str:
    """Run a program; what it printed."""
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout


@dataclass(slots=True)
class Soak:
    """What is going on, and what has been seen."""

    a: str
    folder: Path
    command: Sequence[str]
    """Of a daemon."""
    chance: random.Random
    process: subprocess.Popen[bytes] | None = None
    found: str = ""
    """The device before any daemon."""
    restores: int = 0
    exact: int = 0
    kills: int = 0
    rss_mb: float = 0.0
    descriptors: int = 0
    growth_mb: float = 0.0
    waits: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _warm: float = 0.0
    _born: float = 0.0

    @property
    def target(self) -> str:
        """Where the daemon listens."""
        return f"unix:{self.folder}/mfsd.sock"

    def shown(self) -> str:
        """The device as tc shows it, counters aside."""
        text = "".join(tool("tc", "-n", self.a, "-d", what, "show", "dev", "v0") for what in ("qdisc", "class"))
        return re.sub(r"direct_packets_stat \d+", "", text)

    def start(self) -> None:
        """Start a daemon."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(["ip", "netns", "exec", self.a, *self.command], stdout=log, stderr=log)
        self._born, self._warm = time.monotonic(), 0.0

    def open_to_all(self) -> None:
        """Let every user reach the sockets, once they are there."""
        for name in ("", "mfsd.sock", "mfsd.sock.id"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).chmod(0o777)

    def look(self) -> None:
        """Take down what the daemon takes."""
        if self.process is None or self.process.poll() is not None:
            return
        with contextlib.suppress(psutil.Error):
            daemon = psutil.Process(self.process.pid)
            rss = daemon.memory_info().rss / 1e6
            self.rss_mb = max(self.rss_mb, rss)
            self.descriptors = max(self.descriptors, daemon.num_fds())
            if time.monotonic() > self._born + WARM_S:
                self._warm = self._warm or rss
                self.growth_mb = max(self.growth_mb, rss - self._warm)

    def end(self) -> None:
        """End the daemon in one of three ways, and see that the device comes back."""
        process, self.process = self.process, None
        if process is None:
            return
        how = self.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1))
        self.kills += how is signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            code = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.problems.append(f"a daemon did not end within a minute of {how.name}")
            process.kill()
            code = process.wait()
        if how is not signal.SIGKILL and code not in (0, -how):
            self.problems.append(f"ended with {code} on {how.name}")
        if how is signal.SIGTERM or self.chance.random() < 0.5:
            self.restored(already=how is signal.SIGTERM)

    def restored(self, *, already: bool) -> None:
        """Restore, unless the daemon has done so at its end; the device must be as it was found."""
        if not already:
            words = ["ip", "netns", "exec", self.a, sys.executable, "-m", "mfsd.cli"]
            words += ["--socket", f"{self.folder}/mfsd.sock", "restore", "--state-dir", str(self.folder)]
            done = subprocess.run(words, check=False, capture_output=True, text=True)
            if done.returncode:
                self.problems.append(f"mfsctl restore: {(done.stdout + done.stderr).strip()[:300]}")
        self.restores += 1
        now = self.shown()
        if now == self.found:
            self.exact += 1
        else:
            self.problems.append(f"the device is not as it was found: {now[:300]}")

    def churn(self) -> None:
        """Let the second device come, change its name, or go."""
        what = self.chance.choice(("add", "rename", "back", "delete"))
        words = {
            "add": "link add w0 type veth peer name w1",
            "rename": "link set w0 name w9",
            "back": "link set w9 name w0",
            "delete": f"link delete {self.chance.choice(('w0', 'w9'))}",
        }[what]
        tool("ip", "-n", self.a, *words.split())
        tool("ip", "-n", self.a, "link", "set", "w0", "up")


def attacked(soak: Soak, until: float) -> subprocess.Popen[str] | None:
    """Start a hostile process for some seconds."""
    seconds = min(soak.chance.uniform(3, 15), until - time.monotonic())
    if seconds < 1:
        return None
    if soak.chance.random() < 0.5:
        kind = soak.chance.choice(list(workers.HOSTILE))
        words = [kind, soak.a, THERE, soak.target, str(seconds), "0"]
        command = [sys.executable, "-m", "bench.parts.workers", *words]
    else:
        code = "import sys, bench.soak as s; s.hints(*sys.argv[1:])"
        command = [sys.executable, "-c", code, soak.target, soak.chance.choice(hostile.ATTACKS), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)


def hints(target: str, attack: str, seconds: str) -> None:
    """Be a process that sends hostile hints, as another user."""
    hostile.run(target, attack, time.time() + float(seconds), SimpleNamespace(value=0))


@contextlib.contextmanager
def made(seed: int) -> Iterator[tuple[Soak, str]]:
    """A host, and its peer's namespace."""
    with namespaces() as (a, b), tempfile.TemporaryDirectory(prefix="mfsd-soak-", dir="/tmp") as name:
        folder = Path(name)
        command = configure(folder, hostile.QUIET, f"{hostile.LINK_MBIT}mbit", ("v0", "w0"))
        folder.chmod(0o777)
        tool("tc", "-n", a, "qdisc", "add", "dev", "v0", "root", "handle", "9:", "pfifo", "limit", "777")
        soak = Soak(a, folder, command, random.Random(seed))
        soak.found = soak.shown()
        try:
            yield soak, b
        finally:
            if soak.process is not None:
                soak.process.kill()
                soak.process.wait()


def run(soak: Soak, until: float) -> None:
    """Let things happen until then."""
    rate = hostile.WANTS * hostile.LINK_MBIT * 1e6 / 8
    rivals: list[subprocess.Popen[str]] = []
    soak.start()
    while time.monotonic() < until:
        seconds = min(HONEST_S, max(until - time.monotonic(), 2.0))
        with workers.started("honest", soak.a, THERE, soak.target, seconds, rate) as honest:
            while honest.poll() is None:
                time.sleep(soak.chance.uniform(0.1, 1.0))
                soak.open_to_all()
                soak.look()
                rivals = [r for r in rivals if r.poll() is None]
                if len(rivals) < 3:
                    rival = attacked(soak, until)
                    rivals += [] if rival is None else [rival]
                if soak.chance.random() < 0.1:
                    soak.churn()
                if soak.chance.random() < 0.07 or (soak.process is not None and soak.process.poll() is not None):
                    soak.end()
                    time.sleep(soak.chance.uniform(0, 0.5))
                    soak.start()
            said = json.loads((honest.stdout.read() if honest.stdout is not None else "") or "{}")
            if said:
                soak.waits.append(said["longest_s"])
                soak.shares.append(said["bytes"] / said["seconds"] / rate)
            else:
                soak.problems.append("the honest user has failed")
    for rival in rivals:
        rival.kill()
        rival.wait()


def left(soak: Soak) -> list[str]:
    """What should not be there any more."""
    out = [f"a note: {p.name}" for p in soak.folder.iterdir() if p.name.startswith("qdisc-")]
    return out + left_programs()


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="How long.")
@click.option("--seed", default=None, type=int, help="Of what happens; else another one each time.")
def main(minutes: float, seed: int | None) -> None:
    """Run, and write build/bench/soak.json."""
    if os.geteuid() != 0:
        raise click.UsageError("it makes network namespaces and needs root")
    seed = random.getrandbits(32) if seed is None else seed
    before = left_programs()
    with made(seed) as (soak, b), workers.started("sink", b, THERE):
        run(soak, time.monotonic() + minutes * 60)
        soak.end()
        soak.restored(already=False)
        if "Traceback" in (soak.folder / "log").read_text():
            soak.problems.append("a traceback in the log")
        time.sleep(1.0)
        rest = [x for x in left(soak) if x not in before]
    figures = [
        Figure("seed", seed, "1"),
        Figure("minutes", minutes, "min"),
        Figure("killed", soak.kills, "1"),
        Figure("restores", soak.restores, "1"),
        Figure.against(
            "restores_exact_ratio", soak.exact / max(soak.restores, 1), "ratio", target=1.0, want="at least"
        ),
        Figure("honest_share_least", min(soak.shares, default=0.0), "ratio"),
        Figure("honest_longest_wait_ms", max(soak.waits, default=0.0) * 1000, "ms"),
        Figure.against("rss_mb", soak.rss_mb, "MB", target=200, want="at most"),
        Figure("rss_growth_mb", soak.growth_mb, "MB"),
        Figure("descriptors", soak.descriptors, "1"),
        Figure.against("left", len(rest), "1", target=0, want="at most"),
        Figure.against("problems", len(soak.problems), "1", target=0, want="at most"),
    ]
    write("soak", figures)
    for problem in [*dict.fromkeys(soak.problems), *rest]:
        click.echo(problem)


def left_programs() -> list[str]:
    """Programs of ours that are loaded already, as ``left`` words them."""
    shown = json.loads(tool("bpftool", "-j", "prog", "list") or "[]")
    return [f"a program: {p['name']}" for p in shown if str(p.get("name", "")).startswith("mfsd")]


if __name__ == "__main__":
    main()
