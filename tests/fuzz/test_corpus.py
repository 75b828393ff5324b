# SPDX-License-Identifier: Apache-2.0
"""Nothing that others send, write or answer trips mfsd: the corpus, and some mutations of it. ``make fuzz``: more."""

from __future__ import annotations

import pytest
from fuzz.targets import TARGETS, corpus, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    seeds = corpus(name)
    assert len(seeds) > 2
    for seed in seeds:
        TARGETS[name](seed)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutations_of_it(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(mutated(corpus(name))))
