# SPDX-License-Identifier: Apache-2.0
"""Build hook: generate what scripts/build.py generates before the files are collected.

In a tree unpacked from an sdist nothing is to be done: all files are of one time there, so none is out of date.
"""

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
