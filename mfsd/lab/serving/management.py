# SPDX-License-Identifier: Apache-2.0
"""The lab's management network: small messages between serving processes, one JSON object a line.

Unix sockets with a path cross network namespaces.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


class Management:
    """One process's part. ``on_message`` is called by the event loop, in the order in which each sender spoke."""

    def __init__(self, directory: Path, name: str, on_message: Callable[[dict[str, Any]], None]) -> None:
        self._directory, self._name, self._on_message = directory, name, on_message
        self._writers: dict[str, asyncio.StreamWriter] = {}

    async def listen(self) -> None:
        """Hear others from now on. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._hear, self._directory / self._name)

    async def join(self, others: Iterable[str]) -> None:
        """Be able to speak to others, all of which must listen. Raises OSError."""
        for other in others:
            _, self._writers[other] = await asyncio.open_unix_connection(self._directory / other)

    async def _hear(self, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            # Not at once: what fails here would be a task that nobody looks at.
            asyncio.get_running_loop().call_soon(self._on_message, json.loads(line))

    def send(self, to: str, message: dict[str, Any]) -> None:
        """Say something."""
        self._writers[to].write(json.dumps(message).encode() + b"\n")
