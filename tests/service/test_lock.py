# SPDX-License-Identifier: Apache-2.0
"""One daemon for each state directory, whatever becomes of the file that says so."""

from __future__ import annotations

import fcntl
import os
import threading
from typing import TYPE_CHECKING

import pytest

from mfsd.daemon.config import LOCK
from mfsd.daemon.lock import StartError, lock
from mfsd.datapath.owner import locked

if TYPE_CHECKING:
    from pathlib import Path


def test_a_lock_that_is_a_link_leads_nowhere(tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / LOCK
    precious.write_text("kept")
    link.symlink_to(precious)
    with pytest.raises(StartError, match="Too many levels of symbolic links"):
        lock(tmp_path)
    assert precious.read_text() == "kept"
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(StartError, match="no regular file; remove it"):
        lock(tmp_path)
    with pytest.raises(StartError, match='precious": it is no directory'):
        lock(precious)


def test_there_is_one_also_when_somebody_has_deleted_the_file(tmp_path: Path) -> None:
    held = lock(tmp_path)
    for _ in range(2):  # the second time there is a file again, of the one that was refused
        with pytest.raises(StartError, match="another mfsd"):
            lock(tmp_path)
        (tmp_path / LOCK).unlink()
    assert locked(tmp_path / LOCK, tmp_path)
    held.close()
    assert not locked(tmp_path / LOCK, tmp_path)
    lock(tmp_path).close()


@pytest.mark.parametrize("name", [LOCK, "."])
def test_who_only_looks_keeps_nobody_out(tmp_path: Path, name: str) -> None:
    lock(tmp_path).close()
    fd = os.open(tmp_path / name, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, (fd,)).start()
    lock(tmp_path).close()
