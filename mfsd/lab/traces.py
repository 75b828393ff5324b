# SPDX-License-Identifier: Apache-2.0
"""Request traces: when prompts come, how long they are, and how much of them is cached somewhere already."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MOONCAKE: Final = Path(__file__).with_name("data") / "mooncake_conversation_first4min.jsonl"
AZURE: Final = MOONCAKE.with_name("azure_conversation_first6min.csv")
"""Where they are from and under which licence: data/README.md."""
BLOCK: Final = 512
"""Tokens per hash id in Mooncake's traces."""
TICK_S: Final = 3.0
"""Their timestamps are multiples of this."""


class TraceError(ValueError):
    """A trace that can't be read; the text names the line."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a trace."""

    at: float
    """Arrival, seconds from the beginning of the trace."""
    tokens: int
    cached: tuple[int, ...]
    """Ids of the leading blocks that an earlier request has left in the cache. The last token is never cached."""

    @property
    def reused(self) -> int:
        """Tokens that need not be computed."""
        return min(len(self.cached) * BLOCK, self.tokens - 1)


def mooncake(path: Path = MOONCAKE, *, seed: int = 0) -> list[Prompt]:
    """Read a trace in Mooncake's format, in order of arrival; requests of one tick are spread evenly at random over it.

    Reuse assumes that nothing is ever evicted. Raises TraceError.
    """
    rng = random.Random(seed)  # noqa: S311 - a reproducible experiment, not a secret
    seen: set[int] = set()
    rows: list[tuple[float, int, tuple[int, ...]]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            ms, tokens, blocks = float(row["timestamp"]), int(row["input_length"]), [int(h) for h in row["hash_ids"]]
        except (ValueError, KeyError, TypeError) as e:
            raise TraceError(f"{path.name}, line {number}: {type(e).__name__} {e}") from e
        if tokens < 1 or ms < 0:
            raise TraceError(f"{path.name}, line {number}: {tokens} tokens at {ms:g} ms")
        hits = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
        rows.append((ms / 1000 + rng.uniform(0, TICK_S), tokens, tuple(blocks[:hits])))
    return [Prompt(*row) for row in sorted(rows, key=lambda r: r[0])]


def azure(path: Path = AZURE) -> list[Prompt]:
    """Read a trace in Azure's format (2023): no reuse is known. Raises TraceError."""
    out: list[Prompt] = []
    begin: datetime | None = None
    with path.open(encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                tokens = int(row["ContextTokens"])
            except (KeyError, ValueError, TypeError) as e:
                raise TraceError(f"{path.name}, line {number}: {type(e).__name__} {e}") from e
            begin = begin or at
            out.append(Prompt((at - begin).total_seconds(), max(tokens, 1), ()))
    return out


TRACES: Final[dict[str, Callable[[int], list[Prompt]]]] = {
    "mooncake": lambda seed: mooncake(seed=seed),
    "azure": lambda _seed: azure(),
}
"""By name; the argument is a seed."""
