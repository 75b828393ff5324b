# SPDX-License-Identifier: Apache-2.0
"""The runner's end of a serving process: lines of JSON over pipes, see host.py for the other one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from typing import TYPE_CHECKING, Any, Self

from mfsd.lab.hosts.governor import environment, python
from mfsd.lab.hosts.net import LabError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Process:
    """One serving process. A context manager: leaving ends it, however far it got."""

    def __init__(self, module: str, name: str, order: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        """``order`` is its first message (JSON-able); ``env`` is added to our environment."""
        self.name = name
        # S603: our own module.
        self._process = subprocess.Popen(  # noqa: S603
            python(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment(), **(env or {})},
        )
        self.said: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._write(order)
        threading.Thread(target=self._read, daemon=True).start()

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        for line in self._process.stdout:
            message = json.loads(line)
            with self._changed:
                self.said[message["what"]] = message
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def tell(self, what: str, **more: Any) -> None:
        """Say something. Raises LabError when the process has died."""
        try:
            self._write({"what": what, **more})
        except OSError as e:
            raise LabError(f"{self.name} has ended early") from e

    def check(self) -> None:
        """Raise LabError when the process has died."""
        if self._ended:
            raise LabError(f"the process of {self.name} has ended early; its complaint is above")

    def wait(self, what: str, timeout: float) -> dict[str, Any]:
        """Wait until it has said something. Raises LabError."""
        with self._changed:
            self._changed.wait_for(lambda: what in self.said or self._ended, timeout)
        if what not in self.said:
            raise LabError(f"the process of {self.name} did not get as far as {what!r} within {timeout:g} s")
        return self.said[what]

    def close(self) -> None:
        """Kill it if need be."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
