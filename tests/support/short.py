# SPDX-License-Identifier: Apache-2.0
"""Plugin of pytest for `make check`: few examples of each property; `make test` tries them all.

Used as ``-p support.short`` with tests/ on the path. Guests with emulated processors load it, too (emulated.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis

if TYPE_CHECKING:
    import pytest

EXAMPLES = 8


def pytest_configure() -> None:
    """Every hypothesis test without settings of its own."""
    hypothesis.settings.register_profile("short", max_examples=EXAMPLES, deadline=None, database=None)
    hypothesis.settings.load_profile("short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cap the examples of those that have settings of their own."""
    for item in items:
        function = getattr(item, "obj", None)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if function is not None and own is not None and own.max_examples > EXAMPLES:
            capped = hypothesis.settings(own, max_examples=EXAMPLES, deadline=None, database=None)
            function._hypothesis_internal_use_settings = capped
