# SPDX-License-Identifier: Apache-2.0
"""The unit under a real systemd: ready, watched, restarted, reloaded, stopped; and what a restart does to packets.

Each test begins where the last ended, with a daemon that enforces on v0.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

import pytest
from support.waiting import wait_for
from support.wrongband import CONFIG, watched

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.machine import Machine
    from support.namespaces import NetnsPair

WRONG_S: Final = 0.050
"""Target: no byte in a wrong band for longer, when the daemon is restarted."""
SECURITY: Final = 2.5
"""Target of systemd-analyze security; less is better."""
PYTHON: Final = "/usr/bin/python3 -IS -c"
CONNECT: Final = (
    f"{PYTHON} 'import socket; socket.socket(socket.AF_UNIX).connect(\"/run/mfsd/mfsd.sock\")' && echo in || echo out"
)


def journal(machine: Machine, event: str) -> list[dict[str, str]]:
    """Entries of the daemon that begin with an event's name."""
    lines = machine.run("journalctl -u mfsd -o json --no-pager").stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    return [e for e in entries if str(e.get("MESSAGE", "")).startswith(event)]


def settled(machine: Machine) -> None:
    """The daemon runs and steers."""
    wait_for(lambda: "enforce: v0 (htb)" in machine.show("mfsd", "StatusText"), "the daemon to steer", 30)


@pytest.fixture(scope="module", autouse=True)
def _installed(machine: Machine) -> None:
    machine.run("apt-get install -y --no-install-recommends /root/mfsd.deb")
    machine.run("systemctl stop mfsd")
    machine.write("/etc/mfsd/conf.d/v0.toml", CONFIG)


def test_start_waits_until_it_is_ready(machine: Machine) -> None:
    machine.run("systemctl start mfsd")
    assert machine.run("mfsctl status --json").stdout
    assert machine.show("mfsd", "StatusText").startswith("enforce: v0 (htb)")
    assert machine.show("mfsd", "NFileDescriptorStore") == "2"


def test_how_much_it_may_do(machine: Machine, record: Callable[[str, object], None]) -> None:
    shown = machine.run("systemd-analyze security mfsd.service --no-pager").stdout
    score = float(next(line for line in shown.splitlines() if "Overall exposure" in line).split(": ")[1].split()[0])
    record("systemd-analyze security", score)
    assert score <= SECURITY
    pid = machine.show("mfsd", "MainPID")
    assert machine.run(f"stat -c %U /proc/{pid}").stdout == "mfsd\n"
    held = machine.run(f"grep -h -E 'Cap(Eff|Prm|Bnd|Amb)' /proc/{pid}/status").stdout.split()[1::2]
    assert {int(h, 16) for h in held} == {1 << 39 | 1 << 12}  # CAP_BPF, CAP_NET_ADMIN


def test_who_may_use_the_socket(machine: Machine) -> None:
    assert machine.run("stat -c '%a %U %G' /run/mfsd/mfsd.sock").stdout == "660 mfsd mfsd\n"
    machine.run("useradd -G mfsd worker; useradd stranger")
    assert machine.run(f"su worker -s /bin/sh -c '{_quoted(CONNECT)}'").stdout == "in\n"
    assert machine.run(f"su stranger -s /bin/sh -c '{_quoted(CONNECT)}'").stdout == "out\n"


def _quoted(command: str) -> str:
    return command.replace("'", "'\\''")


def test_the_journal_has_priorities_and_fields(machine: Machine) -> None:
    (entry,) = journal(machine, "enforcing")[-1:]
    assert (entry["PRIORITY"], entry["MFSD_DEVICE"], entry["MFSD_BACKEND"]) == ("6", "v0", "htb")
    assert "\x1b" not in entry["MESSAGE"]
    assert machine.run("journalctl -u mfsd -o cat MFSD_DEVICE=v0").stdout
    assert (
        machine.run("journalctl -u mfsd -o cat -p warning --no-pager | grep -v 'No entries'", check=False).stdout == ""
    )


def test_reload(machine: Machine) -> None:
    machine.write("/etc/mfsd/conf.d/90-level.toml", '[daemon]\nlog_level = "debug"\nslots = 1024\n')
    machine.run("systemctl reload mfsd")
    (entry,) = journal(machine, "reloaded")[-1:]
    assert "daemon.log_level" in entry["MFSD_CHANGED"]
    assert "daemon.slots" in entry["MFSD_NEEDS_RESTART"]
    machine.write("/etc/mfsd/conf.d/90-level.toml", "[daemon]\nslots = 1\n")
    machine.run("systemctl reload mfsd")
    (entry,) = journal(machine, "reload refused")[-1:]
    assert entry["PRIORITY"] == "4"
    assert "/etc/mfsd/conf.d/90-level.toml: daemon.slots = 1" in entry["MFSD_PROBLEMS"]
    machine.run("rm /etc/mfsd/conf.d/90-level.toml; systemctl reload mfsd")
    assert machine.show("mfsd", "ActiveState") == "active"


def test_levels_at_run_time(machine: Machine) -> None:
    for level in ("debug", "info"):
        before = len(journal(machine, "log level"))
        machine.run("systemctl kill --signal=SIGUSR2 --kill-whom=main mfsd")
        wait_for(lambda: len(journal(machine, "log level")) > before, "the change of level", 20)  # noqa: B023 - at once
        assert journal(machine, "log level")[-1]["MFSD_NOW"] == level


@pytest.mark.parametrize("how", ["restart", "crash"])
@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_a_restart_is_not_felt(
    machine: Machine, network: NetnsPair, record: Callable[[str, object], None], how: str, hook: str
) -> None:
    machine.run("systemctl stop mfsd; systemctl reset-failed mfsd")
    machine.write("/etc/mfsd/conf.d/hook.toml", f'[daemon]\nattach = "{hook}"\n')
    machine.run("systemctl start mfsd")
    settled(machine)
    pid = machine.show("mfsd", "MainPID")
    with watched(machine, network, 8.0) as seen:
        machine.run("systemctl restart mfsd" if how == "restart" else "systemctl kill --signal=KILL mfsd")
        wait_for(lambda: machine.show("mfsd", "MainPID") not in (pid, "0"), "another process", 20)
        settled(machine)
    for name in ("packets", "wrong", "wrong_s", "silent_s", "holes", "retransmitted"):
        value = getattr(seen, name)
        record(f"{how} with {hook}: {name}", round(value, 4) if isinstance(value, float) else value)
    assert seen.packets > 500
    assert seen.connects == 2  # the new daemon was told anew
    assert seen.wrong_s <= WRONG_S
    assert seen.holes == 0
    assert journal(machine, "took over")


@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_a_restart_on_a_busy_machine_is_not_felt_either(
    machine: Machine, network: NetnsPair, record: Callable[[str, object], None], hook: str
) -> None:
    """Between the two processes pass twice the seconds that classifiers wait for a sign of life otherwise."""
    machine.run("systemctl stop mfsd; systemctl reset-failed mfsd")
    machine.write("/etc/mfsd/conf.d/hook.toml", f'[daemon]\nattach = "{hook}"\n')
    machine.run("systemctl start mfsd")
    settled(machine)
    late = "/etc/systemd/system/mfsd.service.d/late.conf"
    machine.write(late, "[Service]\nExecStartPre=/bin/sleep 2\n")
    machine.run("systemctl daemon-reload")
    with watched(machine, network, 12.0) as seen:
        machine.run("systemctl restart mfsd")
        settled(machine)
    machine.run(f"rm {late}; systemctl daemon-reload")
    record(f"late restart with {hook}: wrong_s", round(seen.wrong_s, 4))
    assert seen.connects == 2
    assert seen.wrong_s <= WRONG_S
    assert seen.holes == 0


def test_a_hang_is_noticed(machine: Machine, record: Callable[[str, object], None]) -> None:
    machine.run("systemctl reset-failed mfsd")  # or the starts of these tests are too many for it
    pid, restarts = machine.show("mfsd", "MainPID"), int(machine.show("mfsd", "NRestarts"))
    begin = time.monotonic()
    machine.run(f"kill -STOP {pid}")
    wait_for(lambda: int(machine.show("mfsd", "NRestarts")) > restarts, "the watchdog", 30)
    record("seconds from a hang to the next process", round(time.monotonic() - begin, 1))
    settled(machine)
    assert machine.run("journalctl -u mfsd -o cat | grep -c 'Watchdog timeout'").stdout == "1\n"


def test_a_faulty_configuration_is_not_tried_again_and_nothing_stays_in_force(
    machine: Machine, network: NetnsPair
) -> None:
    machine.write("/etc/mfsd/conf.d/zz.toml", "zoo = 1\n")
    machine.run("systemctl kill --signal=KILL mfsd")
    wait_for(lambda: machine.show("mfsd", "ActiveState") == "failed", "the unit to fail", 20)
    assert machine.show("mfsd", "ExecMainStatus") == "78"
    assert machine.show("mfsd", "NFileDescriptorStore") == "0"
    # The classifier went with its descriptor, or is deaf. The qdiscs are put back by hand, or by the next daemon.
    assert "6d66:" in network.run(network.a, "tc qdisc show dev v0")
    machine.run("mfsctl restore --state-dir /run/mfsd")  # where the configuration says, which can't be read
    assert "6d66:" not in network.run(network.a, "tc qdisc show dev v0")
    machine.run("rm /etc/mfsd/conf.d/zz.toml; systemctl reset-failed mfsd; systemctl start mfsd")
    settled(machine)


def test_stop_puts_the_device_back(machine: Machine, network: NetnsPair) -> None:
    assert "6d66:" in network.run(network.a, "tc qdisc show dev v0")
    machine.run("systemctl stop mfsd")
    assert "6d66:" not in network.run(network.a, "tc qdisc show dev v0")
    assert machine.show("mfsd", "Result") == "success"
    assert machine.show("mfsd", "NFileDescriptorStore") == "0"
    assert not list((machine.root / "run/mfsd").glob("qdisc-*"))
