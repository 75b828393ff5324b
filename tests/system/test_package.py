# SPDX-License-Identifier: Apache-2.0
"""The package in a fresh Debian: installed, configured, removed, upgraded, purged.

Each test begins where the last ended.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

from support.waiting import wait_for
from support.wrongband import CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.machine import Machine
    from support.namespaces import NetnsPair

INSTALL: Final = "apt-get install -y --no-install-recommends "
LIMIT_S: Final = 120
"""Target: from a bare machine to a shaped device and a green doctor."""


def qdiscs(machine: Machine) -> str:
    return machine.run("tc qdisc show dev v0").stdout


def test_three_commands_lead_to_a_shaped_device_and_a_green_doctor(
    machine: Machine, record: Callable[[str, object], None]
) -> None:
    begin = time.monotonic()
    machine.run(f"{INSTALL} /root/mfsd.deb", patience=LIMIT_S)
    installed = time.monotonic() - begin
    machine.run(f"cat > /etc/mfsd/conf.d/v0.toml <<'E'\n{CONFIG}\nE\nsystemctl restart mfsd")
    doctor = machine.run("mfsctl doctor --json", check=False)
    took = time.monotonic() - begin
    findings = json.loads(doctor.stdout)
    assert [f for f in findings["findings"] if f["severity"] == "fail"] == []
    assert doctor.returncode == 0
    assert "6d66:" in qdiscs(machine)
    assert took < LIMIT_S
    record("seconds to install", round(installed, 1))
    record("seconds to a green doctor", round(took, 1))


def test_what_was_installed(machine: Machine) -> None:
    # As it comes it only observes, and the file reads back to what is in force without it.
    shown = machine.run("mfsd --check-config --config /etc/mfsd/mfsd.toml | sed 's/  # default//'")
    machine.write("/root/back.toml", shown.stdout)
    assert machine.run("mfsd --check-config --config /root/back.toml").stdout == shown.stdout
    machine.run("mv /etc/mfsd/conf.d/v0.toml /root")
    assert 'mode = "observe"  # default' in machine.run("mfsd --check-config").stdout
    machine.run("mv /root/v0.toml /etc/mfsd/conf.d")
    assert machine.run("systemctl is-enabled mfsd; systemctl is-active mfsd").stdout.split() == ["enabled", "active"]
    assert machine.run("id -un mfsd; getent group mfsd | cut -d: -f1").stdout.split() == ["mfsd", "mfsd"]
    # Nothing of the machine's own Python gets in the way.
    packages = "/usr/lib/python3/dist-packages"
    machine.run(f"mkdir -p {packages}/google")
    machine.run(f"echo 'raise SystemExit(9)' | tee {packages}/google/__init__.py > {packages}/click.py")
    assert machine.run(f"PYTHONPATH={packages} mfsctl version").stdout.count("0.2.0") == 2
    machine.run(f"rm -r {packages}/google {packages}/click.py")
    # Byte code is there, so that a start takes no longer than it must.
    assert machine.run("find /usr/lib/mfsd/lib/mfsd -name '*.pyc' | head -1").stdout


def test_the_manual_and_completion(machine: Machine) -> None:
    machine.run(f"{INSTALL} man-db bash-completion")
    for page in ("1 mfsctl", "8 mfsd", "5 mfsd.toml"):
        assert machine.run(f"man --warnings {page} 2>&1 > /dev/null").stdout == ""
    assert "daemon.heartbeat_timeout_ms" in machine.run("man 5 mfsd.toml").stdout
    words = machine.run(
        ". /usr/share/bash-completion/completions/mfsctl; COMP_WORDS=(mfsctl st) COMP_CWORD=1;"
        " _mfsctl_completion mfsctl; echo ${COMPREPLY[@]}"
    )
    assert words.stdout.split() == ["status", "stats"]


def test_remove_puts_the_device_back_and_keeps_the_configuration(machine: Machine) -> None:
    machine.run("apt-get remove -y mfsd")
    assert "6d66:" not in qdiscs(machine)
    assert machine.run("ls /etc/mfsd /etc/mfsd/conf.d").stdout.split() == [
        "/etc/mfsd:", "conf.d", "mfsd.toml", "/etc/mfsd/conf.d:", "v0.toml",
    ]  # fmt: skip
    assert machine.run("test -e /usr/lib/mfsd", check=False).returncode == 1


def test_an_upgrade_hands_over(machine: Machine) -> None:
    machine.run("rm -r /etc/mfsd")
    machine.run(f"{INSTALL} -o Dpkg::Options::=--force-confmiss /root/older.deb")
    machine.run("mkdir -p /etc/mfsd/conf.d")
    machine.write("/etc/mfsd/conf.d/v0.toml", CONFIG)
    machine.run("systemctl restart mfsd")
    pid, before = machine.show("mfsd", "MainPID"), qdiscs(machine)
    assert "6d66:" in before
    machine.run(f"{INSTALL} /root/mfsd.deb")
    assert machine.show("mfsd", "MainPID") not in (pid, "0")
    assert machine.show("mfsd", "ActiveState") == "active"
    wait_for(lambda: "took over" in machine.run("journalctl -u mfsd -o cat").stdout, "the new daemon to take over", 20)
    assert "adopted=True" in machine.run("journalctl -u mfsd -o cat | grep '^enforcing' | tail -1").stdout
    assert qdiscs(machine) == before
    # An unchanged default is replaced without asking, a drop-in stays.
    assert machine.run("grep -c 'newer package' /etc/mfsd/mfsd.toml", check=False).stdout == "0\n"
    assert machine.run("cat /etc/mfsd/conf.d/v0.toml").stdout == CONFIG


def test_purge_leaves_nothing(machine: Machine, network: NetnsPair) -> None:
    machine.run("apt-get purge -y mfsd")
    assert "6d66:" not in network.run(network.a, "tc qdisc show dev v0")
    # The account stays, as policy has it: files of a number that is given to somebody else would become his.
    left = machine.run(
        # What man(1) has formatted is its own affair.
        r"find / -xdev \( -path /proc -o -path /sys -o -path /root -o -path /var/log -o -path /tmp"
        r" -o -path /var/cache/man \) -prune"
        r" -o \( -name '*mfsd*' -o -user mfsd -o -group mfsd \) -print; find /run -name '*mfsd*'"
    ).stdout.split()
    assert left == []
    assert machine.run("systemctl list-units --all 'mfsd*' --no-legend").stdout == ""
