# SPDX-License-Identifier: Apache-2.0
"""Finding the root of cgroup v2: on hosts, in containers, and where nobody has mounted it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mfsd.datapath.bpf import cgroup
from mfsd.datapath.errors import LoaderError

PLAIN = "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "36 35 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
HYBRID = V1 + "40 35 0:40 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 x rw\n"
PART = "35 24 0:30 /system.slice/x /mnt rw - cgroup2 cgroup2 rw\n"
ABOVE = "50 24 0:30 /../../.. /host/cgroup rw - cgroup2 cgroup2 rw\n"
SIBLING = "50 24 0:30 /../other /mnt rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "host", "place"),
    [
        (PLAIN, True, "/sys/fs/cgroup"),
        (HYBRID, True, "/sys/fs/cgroup/uni fied"),
        (PART, True, None),
        ("", True, None),
        (PLAIN, False, None),
        (PLAIN + ABOVE, False, "/host/cgroup"),
        (ABOVE + PLAIN, False, "/host/cgroup"),
        (SIBLING, False, None),
    ],
)
def test_where_it_is_mounted(mountinfo: str, host: bool, place: str | None) -> None:  # noqa: FBT001 - a table
    assert cgroup.mounted_at(mountinfo, host=host) == (None if place is None else Path(place))


@pytest.mark.bpf
@pytest.mark.parametrize("mounted", [True, False])
def test_its_root_can_be_opened_mounted_or_not(mounted: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    if not mounted:
        monkeypatch.setattr(cgroup, "mounted_at", lambda: None)
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    fd = cgroup.open_root()
    try:
        names = {path.name for path in Path(f"/proc/self/fd/{fd}").iterdir()}
        assert "cgroup.procs" in names
        assert "cgroup.type" not in names, "only the root has none"
        assert Path("/proc/self/mountinfo").read_text(encoding="utf-8") == mounts
    finally:
        os.close(fd)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="let mfsd read it"):
        cgroup.open_root(tmp_path / "nothing")
