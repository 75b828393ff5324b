# SPDX-License-Identifier: Apache-2.0
"""mfsctl in the process of the test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from mfsd.cli.app import mfsctl

if TYPE_CHECKING:
    from pathlib import Path

    from support.canned import Canned


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*args: str, env: dict[str, str] | None = None) -> Ran:
    """One call of mfsctl; a crash is re-raised."""
    result = CliRunner(env=env).invoke(mfsctl, args, catch_exceptions=False)
    return Ran(result.exit_code, result.stdout, result.stderr)


@dataclass
class Rig:
    """A server and its socket."""

    canned: Canned
    socket: Path

    def run(self, *args: str) -> Ran:
        return run("--socket", str(self.socket), *args)
