# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alerts ask for metrics that there are, and show all of them."""

from __future__ import annotations

import re
from typing import Final

from support.prometheus import DASHBOARD, FOLDER

from mfsd.ground.metrics import METRICS

NAMES: Final = {
    m.full_name + suffix
    for m in METRICS
    for suffix in (("_bucket", "_count", "_sum") if m.kind == "histogram" else ("",))
}


def asked(text: str) -> set[str]:
    return set(re.findall(r"\bmfsd_[a-z_]+\b", text))


def expressions() -> list[str]:
    return [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]


def test_they_ask_for_what_there_is() -> None:
    in_dashboard, in_rules = asked(" ".join(expressions())), asked((FOLDER / "rules.yml").read_text())
    assert in_dashboard <= NAMES
    assert in_rules <= NAMES


def test_the_dashboard_shows_every_metric_but_one_that_another_replaces() -> None:
    shown = asked(" ".join(expressions()))
    missing = {m.full_name for m in METRICS if not any(name.startswith(m.full_name) for name in shown)}
    assert missing == {"mfsd_transfer_slack_seconds"}  # that of requests is the one that counts


def test_panels_are_told_apart_and_lie_side_by_side() -> None:
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    assert len({p["title"] for p in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for p in panels:
        g = p["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not cells & covered, p["title"]
        assert g["x"] + g["w"] <= 24
        covered |= cells
