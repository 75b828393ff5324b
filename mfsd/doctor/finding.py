# SPDX-License-Identifier: Apache-2.0
"""What a check returns, and what it may look at."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mfsd.daemon.config import Config


class Severity(enum.StrEnum):
    """``fail``: mfsd will not work so; ``warn``: it will, but not as one would expect; ``info``: good to know."""

    OK = "ok"
    INFO = "info"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer. ``id`` is stable (``area.check``, on devices ``device.check:name``), for scripts and searches."""

    id: str
    severity: Severity
    title: str
    detail: str = ""
    """What was seen."""
    meaning: str = ""
    """What follows from it for mfsd."""
    fix: str = ""
    """What to do; empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the checks are about. ``root`` stands before /proc and /sys; tests put a folder there."""

    devices: tuple[str, ...]
    config: Config
    root: Path = field(default=Path("/"))

    def read(self, path: str) -> str | None:
        """A small file of /proc or /sys, stripped; None when it isn't there or not for us."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None


if TYPE_CHECKING:
    Check = Callable[[Context], Iterable[Finding]]
    DeviceCheck = Callable[[Context, str], Iterable[Finding]]
