# SPDX-License-Identifier: Apache-2.0
"""What of the configuration a running daemon can change, and what needs a restart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mfsd.daemon.config import Config

RELOADABLE: Final = frozenset(
    {
        "daemon.mode",
        "daemon.tick_ms",
        "daemon.idle_tick_ms",
        "daemon.heartbeat_ms",
        "daemon.heartbeat_timeout_ms",
        "daemon.on_exit",
        "daemon.log_format",
        "daemon.log_level",
        "device.overwrite_foreign",
        "device.control_unhinted",
        "device.tiny_len",
        "bands.dscp",
    }
)
"""Keys that a running daemon can change, besides the sections below."""
RELOADABLE_SECTIONS: Final = frozenset({"policy", "limits", "rescue", "tenants", "rules", "rule"})


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys whose values differ between two configurations."""

    now: tuple[str, ...]
    """Can be changed in a running daemon."""
    restart: tuple[str, ...]
    """Need a restart."""


def changes(old: Config, new: Config) -> Changes:
    """Compare two configurations key by key."""
    now: list[str] = []
    restart: list[str] = []
    for section in type(old).model_fields:
        a, b = getattr(old, section), getattr(new, section)
        if a == b:
            continue
        if section in ("peer", "rule"):
            (now if section in RELOADABLE_SECTIONS else restart).append(section)
            continue
        if section == "device":
            _device_changes(old, new, now, restart)
            continue
        keys = a.model_dump() | b.model_dump()
        for key in keys:
            if getattr(a, key, None) != getattr(b, key, None):
                name = f"{section}.{key}"
                (now if section in RELOADABLE_SECTIONS or name in RELOADABLE else restart).append(name)
    return Changes(tuple(now), tuple(restart))


def let_go(old: Config, new: Config) -> list[str]:
    """What a running daemon no longer does because the files don't say it any more: it may have been cut off."""
    if old.daemon.mode is new.daemon.mode or "mode" in new.daemon.model_fields_set:
        return []
    why = "the files don't say it any more: is one of them cut off?"
    problem = f"daemon.mode: {new.daemon.mode.value} now, was {old.daemon.mode.value}, since {why}"
    log.warning("reload", problem=problem)
    return [problem]


def _device_changes(old: Config, new: Config, now: list[str], restart: list[str]) -> None:
    if [d.name for d in old.device] != [d.name for d in new.device]:
        restart.append("device")
        return
    for i, (a, b) in enumerate(zip(old.device, new.device, strict=True)):
        for key in type(a).model_fields:
            if getattr(a, key) != getattr(b, key):
                (now if f"device.{key}" in RELOADABLE else restart).append(f"device[{i}].{key}")


def merge(old: Config, new: Config) -> Config:
    """The configuration in force after a reload: ``new`` where a running daemon can change it, else ``old``."""
    update: dict[str, object] = {name: getattr(new, name) for name in RELOADABLE_SECTIONS}
    for section in ("daemon", "bands"):
        a, b = getattr(old, section), getattr(new, section)
        keys = [k for k in type(a).model_fields if f"{section}.{k}" in RELOADABLE]
        update[section] = a.model_copy(update={k: getattr(b, k) for k in keys})
    if [d.name for d in old.device] == [d.name for d in new.device]:
        keys = [k for k in type(old.device[0]).model_fields if f"device.{k}" in RELOADABLE] if old.device else []
        update["device"] = tuple(
            a.model_copy(update={k: getattr(b, k) for k in keys}) for a, b in zip(old.device, new.device, strict=True)
        )
    return old.model_copy(update=update)


def touches(keys: Iterable[str], prefix: str) -> bool:
    """Some of the changed keys begin so."""
    return any(key.startswith(prefix) for key in keys)
