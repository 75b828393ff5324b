# SPDX-License-Identifier: Apache-2.0
"""What can't be in [relay]; and files in which nearly everything is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from support.refused import only, problems

FILES = {"cert": "/c", "key": "/k", "ca": "/a"}


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("path", ["/", "/etc/", "/a\0b", "/a\nb", "/a\x1b[2Jb"], ids=ascii)
def test_paths_that_are_no_files(key: str, path: str) -> None:
    assert only({"relay": {key: path}}).endswith(": must be the path of a file, printable")


@pytest.mark.parametrize(
    "text", ["", "\0", "a\nb:80", "\x1b[2J:80", "x" * 100_000, "٣:80", "a:99999"], ids=lambda t: ascii(t[:9])
)
def test_a_wrong_address_is_told_in_one_short_line(text: str) -> None:
    for relay in ({"listen": text, "allow": ["a"]}, {"peers": [text]}):
        line = only({"relay": FILES | relay})
        assert line.isprintable()
        assert len(line) < 250
        assert 'must be "host:port"' in line


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "x" * 256], ids=lambda t: ascii(t[:9]))
def test_names_that_no_certificate_has(name: str) -> None:
    line = only({"relay": FILES | {"listen": "0.0.0.0:80", "allow": ["fine.example", name]}})
    assert line.startswith("relay.allow[1] = ")
    assert line.isprintable()


@pytest.mark.parametrize(
    "data",
    [
        {"peer": [0] * 5000},
        {"bands": {"floors": [2.0] * 5000}},
        {"no_such": 1, **{f"nor_this_{i}": 1 for i in range(5000)}},
        {"peer": [{"network": "10.0.0.0/8", "rate": f"{i + 1}gbit"} for i in range(5000)]},
        {"relay": FILES | {"peers": ["nowhere"] * 5000}},
    ],
    ids=lambda data: next(iter(data)),
)
def test_of_very_many_problems_the_first_are_told_and_the_others_counted(data: dict[str, Any]) -> None:
    told = problems(data)
    assert len(told) == 51
    assert told[-1].startswith("and 49")
