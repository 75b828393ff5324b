# SPDX-License-Identifier: Apache-2.0
"""What works without a daemon: planning from the configuration, and restoring after one that was killed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mfsd.cli.app import DEFAULT_CONFIG
from mfsd.cli.errors import CliError, NotPermittedError
from mfsd.daemon.config import LOCK, Config, ConfigError, load, render
from mfsd.daemon.config_bands import bands_of, dscp_of, marks_in_words, policy_of, yielding_in_words
from mfsd.datapath import links, tc
from mfsd.datapath.bpf.attach import hook_users, remove_leftover
from mfsd.datapath.errors import DatapathError, NoDeviceError
from mfsd.datapath.owner import locked
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.datapath.undo.restore import NOTE_STAYS, restore_all, without_note
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from mfsd.daemon.config import DeviceConfig
    from mfsd.ground.bands import Bands


def read_config(path: str | None, *, needed: bool) -> Config:
    """The configuration; without a file at the default place and not ``needed``, the defaults. Raises CliError."""
    chosen = Path(path or DEFAULT_CONFIG)
    if path is None and not needed and not chosen.exists():
        return Config()
    try:
        return load(chosen)
    except ConfigError as e:
        hint = "" if chosen.exists() else "; give the configuration with --config"
        raise CliError(f"{e}{hint}") from None


def shown_config(path: str | None) -> str:
    """What is in force by the configuration, as `mfsd --check-config` prints it. Raises CliError."""
    return render(read_config(path, needed=False))


def plan(config: Config, device: str) -> pb.Plan:
    """Dry run on the devices of the configuration (or one of them). Raises CliError."""
    chosen = [d for d in config.device if device in ("", d.name)]
    if not chosen:
        known = ", ".join(d.name for d in config.device) or "none"
        raise CliError(
            f"no device {device!r} is configured; configured: {known}" if device else "no [[device]] is configured"
        )
    bands = bands_of(config, policy_of(config))
    marks = marks_in_words(dscp_of(config), bands)
    out = pb.Plan(devices=[_device_plan(d, bands, config.daemon.state_dir, marks) for d in chosen])
    fastest = max((d.rate for d in config.device if d.rate), default=None)
    words = yielding_in_words(config.network, bands, fastest)
    for plan in out.devices:
        plan.reasons.extend(filter(None, [words]))
    return out


def _device_plan(device: DeviceConfig, bands: Bands, state_dir: Path, marks: list[str]) -> pb.DevicePlan:
    try:
        with DeviceEnforcer(device.name, bands, device.backend, device.rate, state_dir) as enforcer:
            made = enforcer.plan()
    except PermissionError:
        raise NotPermittedError("planning asks the kernel for qdiscs; run mfsctl as root") from None
    except (DatapathError, OSError) as e:
        return pb.DevicePlan(device=device.name, refusals=[str(e)])
    return pb.DevicePlan(
        device=made.ifname,
        backend=made.backend,
        found=made.found,
        steps=[pb.PlanStep(what=s.text, command=s.command) for s in made.steps],
        refusals=made.refusals,
        undo=[f"{s.text}: {s.command}" for s in made.undo],
        reasons=made.reasons,
        marks=marks,
    )


def _take_off_classifier(name: str) -> list[str]:
    """Remove clsact filters of killed daemons, and the clsact that came with them. TCX links go by themselves."""
    try:
        with tc.TcSocket() as sock:
            index = links.by_name(sock, name).ifindex
        if any(u.filter for u in hook_users(index)):
            remove_leftover(index)
    except NoDeviceError:
        return []  # and all that hung on it
    except (DatapathError, OSError) as e:
        return [f"{name}: its classifier is still there, without effect: {e}"]
    return []


def restore(state_dir: Path, device: str, *, delete: bool = False) -> pb.RestoreReply:
    """Put back what a killed daemon has left. ``delete``: also where nobody knows what was there. Raises CliError."""
    gone: list[str] = []
    try:
        results = without_note(state_dir, device or None, delete=delete)
        if not (device and results):
            lives = locked(state_dir / LOCK, state_dir)
            for name, found in restore_all(state_dir, device or None, delete=delete, lives=lives).items():
                if found is None:
                    gone.append(name)
                else:
                    results[name] = results.get(name, []) + found
    except PermissionError as e:
        raise NotPermittedError(f"can't read {e.filename or state_dir}; run mfsctl as root") from None
    except OSError as e:
        raise CliError(f"can't look for what mfsd has left: {e}") from None
    for name, found in results.items():
        if not found:
            results[name] = _take_off_classifier(name)
    problems = [p for found in results.values() for p in found]
    if any("Operation not permitted" in p and NOTE_STAYS not in p for p in problems):
        raise NotPermittedError("putting qdiscs back needs CAP_NET_ADMIN; run mfsctl as root")
    return pb.RestoreReply(
        restored=[name for name, found in results.items() if not found], problems=problems, gone=gone
    )
