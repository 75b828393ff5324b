# SPDX-License-Identifier: Apache-2.0
"""Fuzz all targets for some minutes, in turns; what trips one becomes part of the corpus: ``make fuzz MINUTES=10``."""

from __future__ import annotations

import hashlib
import sys
import time
import traceback

import click
from fuzz.targets import CORPUS, TARGETS, corpus, mutated
from hypothesis import HealthCheck, Phase, given, seed, settings

SLICE = 200
"""Examples of a target before the next one has its turn."""


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="For all targets together.")
@click.option("--only", multiple=True, type=click.Choice(list(TARGETS)), help="Of the targets; can be repeated.")
def main(minutes: float, only: tuple[str, ...]) -> None:
    """Say what was tried, and fail when something was tripped over."""
    until, turn = time.monotonic() + minutes * 60, int(time.time())
    names = list(only or TARGETS)
    tried, failed = dict.fromkeys(names, 0), 0
    while time.monotonic() < until and names:
        turn += 1
        for name in list(names):
            found = _some(name, turn, tried, until)
            if found is not None:
                failed += 1
                names.remove(name)
                place = CORPUS / name / f"found-{hashlib.sha256(found).hexdigest()[:12]}"
                place.write_bytes(found)
                click.echo(f"{name}: tripped over {place}", err=True)
    for name, count in tried.items():
        click.echo(f"{name:<10} {count:>9,} inputs")
    sys.exit(bool(failed))


def _some(name: str, turn: int, tried: dict[str, int], until: float) -> bytes | None:
    """Try some inputs; the smallest that trips the target, if one does."""
    last = b""

    @seed(turn)
    @settings(
        max_examples=SLICE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(raw=mutated(corpus(name)))
    def trial(raw: bytes) -> None:
        nonlocal last
        last = raw
        if time.monotonic() < until:
            tried[name] += 1
            TARGETS[name](raw)

    try:
        trial()
    except Exception:  # noqa: BLE001 - whatever it is, it is to be told
        traceback.print_exc()
        return last
    return None


if __name__ == "__main__":
    main()
