# SPDX-License-Identifier: Apache-2.0
"""The site is built, strictly, and has what the code knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mfsd.cli.app import COMMANDS
from mfsd.ground.metrics import METRICS
from mfsd.v1 import control_pb2, hints_pb2

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site() -> Path:
    """MkDocs fails for a link or an anchor that leads nowhere, and for a page that is not in the navigation."""
    argv = [sys.executable, str(ROOT / "scripts" / "pages.py")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build" / "site"


def page(site: Path, name: str) -> str:
    return (site / name).read_text()


def test_it_has_what_the_code_knows(site: Path) -> None:
    metrics = page(site, "reference/metrics.html")
    assert not [m.full_name for m in METRICS if m.full_name not in metrics]
    commands = page(site, "reference/mfsctl.html")
    assert not [name for name in COMMANDS if f"mfsctl {name}" not in commands]
    configuration = page(site, "reference/mfsd.toml.html")
    assert "daemon.heartbeat_timeout_ms" in configuration
    for name, module in (("hints", hints_pb2), ("control", control_pb2)):
        text = page(site, f"reference/api-{name}.html")
        for message in module.DESCRIPTOR.message_types_by_name.values():
            assert message.name in text
            assert not [f.name for f in message.fields if f"<code>{f.name}</code>" not in text], message.name
    # Comments of the .proto are on the page: that of the field and that of the file.
    hints = page(site, "reference/api-hints.html")
    assert "At most 256." in hints
    assert "A hint is a claim, not an order" in hints
    assert "RDMA (RoCE, InfiniBand), NVLink and GPUDirect bypass qdiscs" in page(site, "limits.html")


def test_pictures_and_pages_of_the_root_are_on_it(site: Path) -> None:
    assert 'src="pictures/bands.svg"' in page(site, "concepts.html")
    assert (site / "pictures" / "promotion.svg").exists()
    assert "Reporting" in page(site, "reporting.html")
    assert 'href="operating.html"' in page(site, "index.html")
