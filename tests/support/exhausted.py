# SPDX-License-Identifier: Apache-2.0
"""A process that has no descriptors left."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def no_descriptors(free: int) -> Iterator[None]:
    """All descriptors are taken but ``free``; meanwhile, open() and socket() get EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    source = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
    taken: list[int] = [source]
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(source))
        for _ in range(free):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
