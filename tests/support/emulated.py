# SPDX-License-Identifier: Apache-2.0
"""Plugin of pytest for guests with emulated processors: a test's feature is reported.

Used as ``-p support.short -p support.emulated`` with tests/ on the path; natively it is not loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "feature(text): row of the table kernel x feature x result")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Write the feature of each test into the report."""
    for item in items:
        marker = item.get_closest_marker("feature")
        if marker is not None:
            item.user_properties.append(("feature", str(marker.args[0])))
