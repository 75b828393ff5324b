# SPDX-License-Identifier: Apache-2.0
"""NCCL's profiler plugin, called as NCCL calls it by a program in C, with its helper and a real daemon.

NCCL itself needs a GPU: this was never run on one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil
import pytest
from support.waiting import wait_for

from mfsd.ground.model import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemons import Running

    from mfsd.engine.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")

DRIVER = r"""
#define _GNU_SOURCE
#include "abi.h"
#include <arpa/inet.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int pair(int *far)  /* a TCP connection to ourselves */
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof(at);
	int server = socket(AF_INET, SOCK_STREAM, 0), near = socket(AF_INET, SOCK_STREAM, 0);
	bind(server, (struct sockaddr *)&at, sizeof(at));
	listen(server, 1);
	getsockname(server, (struct sockaddr *)&at, &size);
	connect(near, (struct sockaddr *)&at, sizeof(at));
	*far = accept(server, NULL, NULL);
	close(server);
	return near;
}

static void tell(const char *what, int fd)
{
	unsigned long long cookie = 0;
	socklen_t size = sizeof(cookie);
	getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size);
	printf("%s %llu\n", what, cookie);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	(void)argc;
	void *library = dlopen(argv[1], RTLD_NOW);
	struct table_v5 *table = library ? dlsym(library, argv[2]) : NULL;
	struct table_v4 *old = (struct table_v4 *)table;
	int v4 = !strcmp(argv[2], "ncclProfiler_v4"), mask = -1, far[3], near, line;
	void *comm = NULL, *coll = NULL, *op = NULL, *unknown = NULL;

	if (!table)
		return fprintf(stderr, "%s\n", dlerror()), 1;
	near = pair(&far[0]);
	tell("before", near);
	if (v4 ? old->init(&comm, &mask, "tp", 7, 2, 4, 0, NULL) : table->init(&comm, 7, &mask, "tp", 2, 4, 0, NULL))
		return 2;
	printf("mask %d\n", mask);
	near = pair(&far[1]);
	tell("near", near);
	tell("far", far[1]);
	struct event event = {.type = EVENT_COLL, .coll = {1, "AllReduce", 0, 0, 1 << 20, 0, "ncclFloat16"}};
	struct event step = {.type = EVENT_PROXY_OP, .proxy_op = {getpid(), 0, 1, 4, 1 << 20, 1}};
	struct event elsewhere = {.type = EVENT_PROXY_OP, .proxy_op = {1, 0, 1, 4, 1 << 20, 1}};
	while ((line = getchar()) != EOF) {
		switch (line) {
		case 'b':  /* the host's part is over before the network's begins */
			table->start_event(comm, &coll, &event);
			step.parent = elsewhere.parent = coll;
			table->stop_event(coll);
			table->start_event(comm, &unknown, &elsewhere);
			table->start_event(comm, &op, &step);
			printf("begun %d %d %d\n", coll != NULL, op != NULL, unknown != NULL);
			break;
		case 'e':
			table->record_event_state(op, 3, NULL);
			table->stop_event(op);
			table->stop_event(NULL);
			printf("ended\n");
			break;
		case 'n': {  /* a connection that comes late, named by a network plugin */
			near = pair(&far[2]);
			struct socket_event sock = {NET_SOCKET_EVENT, {near, 0, 1}};
			struct event net = {.type = EVENT_NET_PLUGIN, .net = {NET_SOCKET_V1, &sock}};
			table->start_event(comm, &unknown, &net);
			tell("late", near);
			break;
		}
		case 'f':
			printf("finalized %d\n", table->finalize(comm));
			break;
		}
		fflush(stdout);
	}
	return 0;
}
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The plugin and the driver."""
    compiler = shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is not installed")
    folder = tmp_path_factory.mktemp("nccl")
    plugin, driver = folder / "libnccl-profiler-mfsd.so", folder / "driver"
    source = folder / "driver.c"
    source.write_text(DRIVER)
    for words in (
        ["-fPIC", "-fvisibility=hidden", "-shared", "-o", plugin, ROOT / "nccl/profiler.c"],
        ["-I", ROOT / "nccl", "-o", driver, source],
    ):
        done = subprocess.run([compiler, *FLAGS, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return plugin, driver


class Driver:
    def __init__(self, plugin: Path, driver: Path, version: int, target: str, python: str = sys.executable) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "MFSD_NCCL_PYTHON": python, "MFSD_TARGET": target}
        self.process = subprocess.Popen(
            [driver, plugin, f"ncclProfiler_v{version}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )
        self.before, self.mask, self.near, self.far = (int(self.line().split()[1]) for _ in range(4))

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def line(self) -> str:
        return self._pipe(self.process.stdout).readline().decode()

    def do(self, what: str) -> str:
        pipe = self._pipe(self.process.stdin)
        pipe.write(what.encode())
        pipe.flush()
        return self.line().strip()

    def close(self) -> int:
        self._pipe(self.process.stdin).close()
        self._pipe(self.process.stdout).close()
        return self.process.wait()


@pytest.fixture(params=[4, 5, 6, 7])
def driver(request: pytest.FixtureRequest, programs: tuple[Path, Path], running: Running) -> Iterator[Driver]:
    one = Driver(*programs, request.param, running.target)
    yield one
    assert one.close() == 0
    wait_for(lambda: not running.marks())


def sizes(running: Running) -> list[tuple[Stage, float, bool]]:
    def read(e: Engine) -> list[tuple[Stage, float, bool]]:
        found = [t for s in e.books.sessions.values() for t in s.transfers.values()]
        return [(t.stage, float(e.books.transfers.get(t, "size")), t.handed_over) for t in found]

    return running.ask(read)


def test_a_communicators_connections_are_marked_and_its_collectives_told(driver: Driver, running: Running) -> None:
    assert driver.mask & (1 << 1 | 1 << 2 | 1 << 3) == 1 << 1 | 1 << 2 | 1 << 3
    assert driver.do("b") == "begun 1 1 0"  # the operation of another process is none of ours
    wait_for(lambda: set(running.marks()) == {driver.near, driver.far})
    assert set(running.marks().values()) == {Stage.COLLECTIVE}
    assert driver.before not in running.marks()
    assert driver.do("e") == "ended"
    driver.do("b")
    # AllReduce of 2 MiB among 4 ranks sends 2 * 3/4 of it, spread over two connections.
    share = 3 * (1 << 20) // 2
    wait_for(lambda: [s for s in sizes(running) if not s[2]] == [(Stage.COLLECTIVE, share, False)] * 2)
    driver.do("e")
    wait_for(lambda: all(done for _, _, done in sizes(running)))
    late = int(driver.do("n").split()[1])
    wait_for(lambda: running.marks().get(late) is Stage.COLLECTIVE)
    assert driver.do("f") == "finalized 0"
    wait_for(lambda: not running.marks())


def test_a_helper_that_is_gone_or_never_was_costs_nothing(programs: tuple[Path, Path], running: Running) -> None:
    for python, kills in (("/nonexistent/python", False), ("false", False), (sys.executable, True)):
        one = Driver(*programs, 5, running.target, python)
        if kills:
            (helper,) = psutil.Process(one.process.pid).children()
            helper.send_signal(signal.SIGKILL)
            wait_for(lambda helper=helper: helper.status() == psutil.STATUS_ZOMBIE)  # type: ignore[misc]
        if one.mask:
            while psutil.Process(one.process.pid).children():  # it is reaped when it is missed
                assert one.do("b") == "begun 1 1 0"
                assert one.do("e") == "ended"
        assert one.do("f") == "finalized 0"
        assert one.close() == 0
