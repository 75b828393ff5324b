# SPDX-License-Identifier: Apache-2.0
"""Headers of bpf/ that are plain arithmetic, compiled for this machine."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Final

BPF: Final = Path(__file__).parents[2] / "bpf"
BEFORE: Final = "#include <stddef.h>\n#define __always_inline inline\n"


def library(source: str, folder: Path) -> ctypes.CDLL:
    """C that includes such headers, as a library that is made in a folder."""
    (folder / "native.c").write_text(BEFORE + source)
    argv = ["clang", "-shared", "-fPIC", "-O1", f"-I{BPF}", "-Wno-unused-function", "-o", "native.so", "native.c"]
    done = subprocess.run(argv, cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "native.so"))
