# SPDX-License-Identifier: Apache-2.0
"""Wheel build hook: generate what scripts/build.py generates before the files are collected."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuildHook(BuildHookInterface[Any]):
    """Runs scripts/build.py."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate protobuf code, the BPF object and the layouts."""
        del version, build_data
        script = Path(self.root) / "scripts" / "build.py"
        subprocess.run([sys.executable, str(script)], check=True)
