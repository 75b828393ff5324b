# SPDX-License-Identifier: Apache-2.0
"""plan and restore where no daemon runs, on a device of a namespace; then everything against a real daemon."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.ctl import Ran, run
from support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns
NOWHERE = "/nonexistent/mfsd.sock"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "mfsd.toml"
    path.write_text(
        f'[daemon]\nsocket = "{tmp_path}/s"\nstate_dir = "{tmp_path}/state"\n'
        '[bands]\nlanes = 4\n[[device]]\nname = "v0"\nrate = "1gbit"\n'
    )
    return path


def ctl(conf: Path, *args: str) -> Ran:
    return run("--socket", str(conf.parent / "s"), *args)


def inside(pair: NetnsPair, *args: str) -> Ran:
    return pair.call(pair.a, lambda: run(*args))


def test_plan_from_the_configuration(netns_pair: NetnsPair, conf: Path) -> None:
    before = netns_pair.run(netns_pair.a, "tc qdisc show; tc class show dev v0")
    ran = inside(netns_pair, "plan", "--config", str(conf))
    assert ran.code == 0, ran.err
    assert "htb, because a rate is given (1gbit)" in ran.out
    assert "tc qdisc replace dev v0 root handle 6d66:" in ran.out
    assert "tc qdisc del dev v0 root" in ran.out
    made = inside(netns_pair, "plan", "v0", "--config", str(conf), "--json").json["devices"][0]
    assert (made["device"], made["backend"], made["refusals"]) == ("v0", "htb", [])
    assert not any(step["done"] for step in made["steps"])
    assert netns_pair.run(netns_pair.a, "tc qdisc show; tc class show dev v0") == before
    # Every command that is shown is one that a shell takes, and together they make what mfsd makes.
    commands = "\n".join(step["command"] for step in made["steps"])
    netns_pair.run(netns_pair.a, commands)
    assert "htb 6d66:" in netns_pair.run(netns_pair.a, "tc qdisc show dev v0")


def test_plan_that_is_refused(netns_pair: NetnsPair, conf: Path) -> None:
    netns_pair.run(netns_pair.a, "ip link set v0 down")
    ran = inside(netns_pair, "--socket", NOWHERE, "plan", "--config", str(conf))
    assert ran.code == 1
    assert "v0 is down" in ran.out.replace("\n", " ")
    absent = inside(netns_pair, "plan", "other", "--config", str(conf))
    assert absent.code == 1
    assert absent.err == "mfsctl: no device 'other' is configured; configured: v0\n"
    missing = inside(netns_pair, "plan", "--config", str(conf.parent / "none.toml"))
    assert missing.code == 1
    assert "--config" in missing.err


def test_nothing_to_restore(netns_pair: NetnsPair, conf: Path, tmp_path: Path) -> None:
    ran = inside(netns_pair, "--socket", NOWHERE, "restore", "--config", str(conf))
    assert ran.code == 0
    assert ran.out == "nothing to restore\n"
    named = inside(netns_pair, "restore", "v0", "--state-dir", str(tmp_path))
    assert named.code == 1
    assert "nothing to put back" in named.err


def test_notes_that_are_nowhere(netns_pair: NetnsPair, tmp_path: Path) -> None:
    ran = inside(netns_pair, "restore", "--state-dir", str(tmp_path / "none"))
    assert ran.code == 1
    assert f"--state-dir {tmp_path / 'none'}: there is no such folder" in ran.err


@contextlib.contextmanager
def daemon(pair: NetnsPair, conf: Path, *wrap: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real mfsd in namespace a; killed in the end if it still runs."""
    argv = ["ip", "netns", "exec", pair.a, *wrap, sys.executable, "-m", "mfsd.daemon", "--config", str(conf)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:

            def answers() -> bool:
                assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
                return not ctl(conf, "status").code

            wait_for(answers, "an answer")
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.bpf
def test_a_daemon_in_a_pid_namespace_of_its_own_is_alive(netns_pair: NetnsPair, conf: Path) -> None:
    """The number in its note is another process's here, or nobody's."""
    with daemon(netns_pair, conf, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"):
        assert ctl(conf, "enforce").code == 0
        ran = inside(netns_pair, "restore", "--state-dir", str(conf.parent / "state"))
        assert ran.code == 1
        assert "belongs to a running mfsd" in ran.err
        assert "htb" in netns_pair.run(netns_pair.a, "tc qdisc show dev v0 root")
    put_back = "restore", "--state-dir", str(conf.parent / "state")
    wait_for(lambda: not inside(netns_pair, *put_back).code, "its death to be noticed")
    assert "htb" not in netns_pair.run(netns_pair.a, "tc qdisc show dev v0 root")


@pytest.mark.bpf
def test_marks_by_class_follow_the_policy(netns_pair: NetnsPair, conf: Path) -> None:
    def marks() -> list[tuple[int, str]]:
        bands = ctl(conf, "status", "--json").json["devices"][0]["bands"]
        return [(b["dscp"], b["urgency"]) for b in bands if b["name"].startswith("level")]

    text = conf.read_text().replace("[bands]\n", "[bands]\ndscp = { urgent = 46, last = 8 }\n")
    conf.write_text(text + '[policy]\nname = "mfs"\n')
    words = [
        "DSCP 46 into packets of control, level 0, level 1",
        "DSCP 8 into packets of background, scavenger",
    ]
    assert inside(netns_pair, "plan", "--config", str(conf), "--json").json["devices"][0]["marks"] == words
    with daemon(netns_pair, conf) as process:
        assert ctl(conf, "plan", "--json").json["devices"][0]["marks"] == words
        assert marks() == [(46, "urgent")] * 2 + [(-1, "middle")] * 3
        conf.write_text(text + '[policy]\nname = "deadline-ladder"\n')
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: marks() == [(46, "urgent")] + [(-1, "middle")] * 4)


@pytest.mark.bpf
def test_of_a_daemon_that_hangs_nothing_is_said_to_be_restored(netns_pair: NetnsPair, conf: Path) -> None:
    elsewhere = conf.parent / "elsewhere.toml"
    elsewhere.write_text(conf.read_text().replace("/state", "/elsewhere"))
    (conf.parent / "elsewhere").mkdir()
    with daemon(netns_pair, conf) as process:
        process.send_signal(signal.SIGSTOP)
        ran = inside(netns_pair, "--socket", str(conf.parent / "s"), "restore", "--config", str(elsewhere))
        assert ran.code == 1, ran.out
        assert "does not answer, and there are no notes of it in" in ran.err
        assert "--state-dir" in ran.err
        findings = inside(netns_pair, "doctor", "--config", str(conf), "--json").json["findings"]
        assert [f["severity"] for f in findings if f["id"] == "state.socket"] == ["fail"]


@pytest.mark.bpf
def test_a_real_daemon(netns_pair: NetnsPair, conf: Path) -> None:
    found = netns_pair.run(netns_pair.a, "tc qdisc show dev v0")
    with daemon(netns_pair, conf) as process:
        assert ctl(conf, "status", "--json").json["mode"] == "MODE_OBSERVE"
        assert [d["device"] for d in ctl(conf, "plan", "--json").json["devices"]] == ["v0"]
        assert ctl(conf, "enforce").out.startswith("mode: enforce\n")
        device = ctl(conf, "status", "--json").json["devices"][0]
        assert (device["name"], device["backend"], device["attach"]) == ("v0", "htb", "tcx")
        assert "htb 6d66:" in netns_pair.run(netns_pair.a, "tc qdisc show dev v0")
        assert ctl(conf, "pause", "--json").json["paused"] is True
        assert ctl(conf, "resume", "--json").json["paused"] is False
        assert ctl(conf, "hint", "request", "r1", "--ttft-left", "60s", "--ttl", "60s").code == 0
        to = ("--from", "10.77.0.1:5000", "--to", "10.77.0.2:6000")
        sent = ctl(conf, "hint", "transfer", "t1", "--request", "r1", "--stage", "p2d", "--bytes", "10MB", *to)
        assert sent.code == 0, sent.err
        (transfer,) = ctl(conf, "transfers", "--json").json["transfers"]
        assert (transfer["id"], transfer["bytes"]) == ("t1", "10000000")
        (connection,) = ctl(conf, "connections", "--json").json["connections"]
        assert connection["endpoints"] == "10.77.0.1:5000 -> 10.77.0.2:6000"
        assert ctl(conf, "explain", "t1").code == ctl(conf, "explain", "--slot", str(transfer["slot"])).code == 0
        assert ctl(conf, "explain", "nobody").code == 1
        wrong = ctl(conf, "hint", "transfer", "t2", "--request", "r1", "--stage", "p2d", "--bytes", "0", *to)
        assert wrong.code == 1
        assert "transfer.bytes" in wrong.err
        assert ctl(conf, "hint", "cancel", "request", "r1").code == 0
        assert ctl(conf, "transfers").out == "no transfers\n"
        assert ctl(conf, "watch", "--count", "2", "--interval", "100ms").code == 0
        # A device that is not configured is not found; a doctor finds the running daemon.
        assert ctl(conf, "plan", "other").code == 1
        checked = inside(netns_pair, "doctor", "--config", str(conf), "--json")
        ids = {f["id"]: f["severity"] for f in checked.json["findings"]}
        assert (ids["state.socket"], ids["state.notes:v0"], ids["device.hooks:v0"]) == ("ok", "ok", "ok")
        # While it lives its devices are its own.
        taken = inside(netns_pair, "restore", "--state-dir", str(conf.parent / "state"))
        assert taken.code == 1
        assert "belongs to a running mfsd" in taken.err

        process.send_signal(signal.SIGKILL)
        process.wait()
        assert ctl(conf, "status").code == 3
        assert "nobody listens" in ctl(conf, "status").err
        checked = inside(netns_pair, "doctor", "--config", str(conf), "--json")
        ids = {f["id"]: f["severity"] for f in checked.json["findings"]}
        assert (ids["state.socket"], ids["state.notes:v0"]) == ("info", "warn")
    assert "htb 6d66:" in netns_pair.run(netns_pair.a, "tc qdisc show dev v0")
    back = inside(netns_pair, "--socket", str(conf.parent / "s"), "restore", "--config", str(conf))
    assert back.code == 0, back.err
    assert back.out == "v0: as it was found\n"
    assert netns_pair.run(netns_pair.a, "tc qdisc show dev v0") == found


@pytest.mark.bpf
@pytest.mark.parametrize("foreign", [False, True])
def test_a_classifier_on_clsact_goes_with_restore(netns_pair: NetnsPair, conf: Path, *, foreign: bool) -> None:
    """Unlike one on TCX it outlives its daemon. clsact stays if somebody else has a filter there."""
    conf.write_text(conf.read_text().replace("[daemon]", '[daemon]\nattach = "clsact"\nmode = "enforce"'))
    with daemon(netns_pair, conf) as process:
        if foreign:
            netns_pair.run(netns_pair.a, "tc filter add dev v0 ingress protocol ip u32 match u32 0 0 flowid 1:1")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "mfsd" in netns_pair.run(netns_pair.a, "tc filter show dev v0 egress")
    found = {f["id"]: f for f in inside(netns_pair, "doctor", "--config", str(conf), "--json").json["findings"]}
    assert "mfsctl restore" in found["device.leftover:v0"]["fix"]
    assert inside(netns_pair, "--socket", NOWHERE, "restore", "--config", str(conf)).code == 0
    assert netns_pair.run(netns_pair.a, "tc filter show dev v0 egress") == ""
    assert ("clsact" in netns_pair.run(netns_pair.a, "tc qdisc show dev v0")) == foreign


@pytest.mark.bpf
def test_restore_by_the_daemon(netns_pair: NetnsPair, conf: Path) -> None:
    found = netns_pair.run(netns_pair.a, "tc qdisc show dev v0")
    with daemon(netns_pair, conf) as process:
        socket = ("--socket", str(conf.parent / "s"))
        assert run(*socket, "enforce").code == 0
        assert run(*socket, "restore", "v0").out == "v0: as it was found\n"
        assert netns_pair.run(netns_pair.a, "tc qdisc show dev v0") == found
        assert run(*socket, "status", "--json").json["mode"] == "MODE_OBSERVE"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not (conf.parent / "s").exists()
