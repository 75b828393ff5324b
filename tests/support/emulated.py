# SPDX-License-Identifier: Apache-2.0
"""Plugin of pytest for guests with emulated processors: fewer examples, no deadlines, and a test's feature reported.

Used as ``-p support.emulated`` with tests/ on the path; natively it is not loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis

if TYPE_CHECKING:
    import pytest

EXAMPLES = 8


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and make every hypothesis test short, those with settings of their own, too."""
    config.addinivalue_line("markers", "feature(text): row of the table kernel x feature x result")
    hypothesis.settings.register_profile("emulated", max_examples=EXAMPLES, deadline=None, database=None)
    hypothesis.settings.load_profile("emulated")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Write the feature of each test into the report, and cap the examples."""
    for item in items:
        marker = item.get_closest_marker("feature")
        if marker is not None:
            item.user_properties.append(("feature", str(marker.args[0])))
        function = getattr(item, "obj", None)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if function is not None and own is not None and own.max_examples > EXAMPLES:
            capped = hypothesis.settings(own, max_examples=EXAMPLES, deadline=None, database=None)
            function._hypothesis_internal_use_settings = capped
