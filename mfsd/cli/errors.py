# SPDX-License-Identifier: Apache-2.0
"""Exit codes of mfsctl and the exceptions that carry them. One line per error: what is wrong, and the fix."""

from __future__ import annotations

import enum
import sys
from typing import IO, Any

import click

from mfsd.ground import tables


class Exit(enum.IntEnum):
    """What a script may rely on."""

    OK = 0
    BAD_NEWS = 1
    """The answer is bad news: not found, refused, rejected, doctor has found a failure."""
    USAGE = 2
    UNREACHABLE = 3
    """No daemon, or it does not answer."""
    PERMISSION = 4


class CliError(click.ClickException):
    """Ends the command with a message on stderr."""

    exit_code = int(Exit.BAD_NEWS)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print ``mfsctl: message``."""
        click.echo(f"mfsctl: {tables.printable(self.format_message())}", file=file or sys.stderr)


class UnreachableError(CliError):
    """No daemon behind the socket."""

    exit_code = int(Exit.UNREACHABLE)


class HangingError(UnreachableError):
    """Somebody listens there, but does not answer."""


class NotPermittedError(CliError):
    """The user may not do this."""

    exit_code = int(Exit.PERMISSION)
