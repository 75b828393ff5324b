# SPDX-License-Identifier: Apache-2.0
"""The daemon's command line."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import structlog

import mfsd
from mfsd.api.server import ServerError
from mfsd.daemon import config as configuration
from mfsd.daemon import config_files
from mfsd.daemon.daemon import Daemon
from mfsd.daemon.lock import StartError
from mfsd.daemon.memory import keep_freed
from mfsd.daemon.turns import keep_turns_short
from mfsd.datapath.errors import DatapathError
from mfsd.ground import logs
from mfsd.relay.incoming import RelayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.daemon.config import Config
    from mfsd.daemon.predecessor import Predecessor

EX_CONFIG: Final = 78
"""sysexits.h; systemd shows it as CONFIG, and the unit does not restart on it."""

PATIENT: Final = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
"""Signals that wait for their handlers, while there are none (__main__.py)."""

log = structlog.get_logger(__name__)


async def _serve(config: Config, path: Path | None, predecessor: Predecessor | None) -> None:
    daemon = Daemon(config, path, predecessor)
    handlers = {
        signal.SIGTERM: daemon.stop,
        signal.SIGINT: daemon.stop,
        signal.SIGHUP: daemon.reload_soon,
        signal.SIGUSR1: daemon.hand_over,
        signal.SIGUSR2: daemon.change_verbosity,
    }
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_rarely(logs.Seldom()))
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PATIENT)
        await daemon.run()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, PATIENT)


def _rarely(seldom: logs.Seldom) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What goes wrong on the event loop, once in a while: without descriptors, each accept that fails says so."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if seldom(str(context.get("message"))):
            loop.default_exception_handler(context)

    return handle


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Configuration file; conf.d/*.toml beside it are read, too.  [default: {configuration.DEFAULT_PATH}]",
)
@click.option("--check-config", is_flag=True, help="Check the configuration, print it with its defaults, and exit.")
@click.version_option(mfsd.__version__, message="mfsd %(version)s")
@click.pass_obj
def main(predecessor: Predecessor | None, path: Path | None, check_config: bool) -> None:  # noqa: FBT001 - click's way
    """Shape this host's traffic so that LLM requests meet their deadlines.

    SIGHUP reads the configuration again, SIGTERM puts the qdiscs back and ends, SIGUSR1 ends and leaves them to the
    next mfsd, SIGUSR2 logs everything until it comes again.
    """
    if path is None and any(f.exists() for f in config_files.files(configuration.DEFAULT_PATH)):
        path = configuration.DEFAULT_PATH
    try:
        config = configuration.load(path) if path is not None else configuration.parse({})
    except configuration.ConfigError as e:
        # A file's name need not be text.
        click.echo(str(e).encode(errors="backslashreplace"), err=True)
        sys.exit(EX_CONFIG)
    if check_config:
        click.echo(configuration.render(config), nl=False)
        return
    logs.configure(config.daemon.log_format, config.daemon.log_level)
    faulthandler.enable()  # on an abort, which is what a watchdog does, the log shows where every thread was
    keep_freed()
    keep_turns_short()
    try:
        asyncio.run(_serve(config, path, predecessor))
    except (StartError, ServerError, RelayError, DatapathError, OSError) as e:
        log.critical("can't start", reason=str(e))
        sys.exit(1)
