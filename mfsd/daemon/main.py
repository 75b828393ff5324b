# SPDX-License-Identifier: Apache-2.0
"""The daemon's command line."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import resource
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import structlog

import mfsd
from mfsd.api.places import ServerError
from mfsd.daemon import config as configuration
from mfsd.daemon import config_files
from mfsd.daemon.daemon import Daemon
from mfsd.daemon.lock import StartError
from mfsd.daemon.memory import keep_freed
from mfsd.daemon.turns import collect, keep_turns_short
from mfsd.datapath.errors import DatapathError
from mfsd.ground import logs
from mfsd.relay.incoming import RelayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.daemon.config import Config
    from mfsd.daemon.predecessor import Predecessor

PATIENT: Final = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
"""Signals that wait for their handlers, while there are none (__main__.py)."""

NO_THREAD: Final = "can't start new thread"
"""What Python says, in a RuntimeError."""

LEAST: Final = (
    (resource.RLIMIT_NOFILE, 64, "open files", "LimitNOFILE= in the unit, ulimit -Hn"),
    (resource.RLIMIT_AS, 1 << 30, "bytes of address space", "LimitAS= in the unit, ulimit -v"),
    (resource.RLIMIT_DATA, 400 << 20, "bytes of data", "LimitDATA= in the unit, ulimit -d"),
)
"""What a daemon needs: with less, gRPC ends the process without a word that means anything."""

WORKERS: Final = 4
"""Threads for what blocks: the care for devices, and now and then an answer."""

log = structlog.get_logger(__name__)


def workers() -> ThreadPoolExecutor:
    """Threads that are there from the first on: when there are none to be had, devices must be put back all the same.

    Raises RuntimeError.
    """
    pool, all_there = ThreadPoolExecutor(WORKERS, thread_name_prefix="mfsd-work"), threading.Barrier(WORKERS)
    try:
        for _ in range(WORKERS):
            pool.submit(all_there.wait)
    except RuntimeError:
        all_there.abort()
        raise
    return pool


class _Loop(asyncio.SelectorEventLoop):
    async def shutdown_default_executor(self, *_: float | None) -> None:
        """Nothing: the process waits for its threads when it ends.

        asyncio would start one more to wait for them, and wait for that without end where it is there, but has no
        memory to begin with.
        """


async def _serve(config: Config, path: Path | None, predecessor: Predecessor | None, over: threading.Event) -> None:
    """Run a daemon; ``over`` is set when it has ended as it should."""
    asyncio.get_running_loop().set_default_executor(workers())
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
    collecting = loop.create_task(collect(lambda: daemon.engine.idle))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PATIENT)
        await daemon.run()
        over.set()
    finally:
        collecting.cancel()
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
    if path is None and config_files.there(configuration.DEFAULT_PATH):
        path = configuration.DEFAULT_PATH
    try:
        config = configuration.load(path) if path is not None else configuration.parse({})
    except configuration.ConfigError as e:
        # A file's name need not be text.
        click.echo(str(e).encode(errors="backslashreplace"), err=True)
        sys.exit(os.EX_CONFIG)  # systemd shows it as CONFIG, and the unit does not restart on it
    if check_config:
        try:
            click.echo(configuration.render(config), nl=False)
        except OSError as e:
            sys.exit(f"mfsd: {e}")
        return
    _take_enough()
    _see_processes()
    faulthandler.enable(logs.STDERR)  # on an abort, which is what a watchdog does, the log shows where every thread was
    keep_freed()
    keep_turns_short()
    over = threading.Event()
    try:
        logs.configure(config.daemon.log_format, config.daemon.log_level)
        with asyncio.Runner(loop_factory=_Loop) as runner:
            runner.run(_serve(config, path, predecessor, over))
    except (StartError, ServerError, RelayError, DatapathError, OSError) as e:
        log.critical("can't start", reason=str(e))
        sys.exit(1)
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, RuntimeError) and str(e) != NO_THREAD:
            raise
        if not over.is_set():  # else only asyncio's end of its own threads wanted one more
            more = "allow it more (TasksMax=, MemoryMax= in the unit, ulimit)"
            sys.exit(f"mfsd: can't start: {str(e) or 'no memory'}: {more}")


def _take_enough() -> None:
    """Have as many descriptors as may be: the soft limit is for programs that use select(2) (systemd.exec(5)).

    Exits where something is too little to run with.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for what, needs, name, where in LEAST:
        have = resource.getrlimit(what)[0]
        if have != resource.RLIM_INFINITY and have < needs:
            much = f"it may have {have} {name}, and needs {needs} at least"
            sys.exit(f"mfsd: can't start: {much}: allow it more ({where})")


def _see_processes() -> None:
    """Exits where /proc has nobody, or those of another pid namespace: workers would be taken for somebody else."""
    try:
        mine = str(Path("/proc/self").readlink()) == str(os.getpid())
    except OSError:
        mine = False
    if not mine:
        there = "/proc is not there, or that of another pid namespace, and tells no worker from another"
        sys.exit(f"mfsd: can't start: {there}: mount this one's (mount -t proc proc /proc)")
