# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a configuration, in the words of its error."""

from __future__ import annotations

from typing import Any

import pytest

from mfsd.daemon.config import ConfigError, parse


def problems(data: dict[str, Any]) -> list[str]:
    """All of them."""
    with pytest.raises(ConfigError) as e:
        parse(data)
    return e.value.problems


def only(data: dict[str, Any]) -> str:
    """The one, which is never as long as a value may be."""
    (found,) = problems(data)
    assert len(found) < 600
    return found
