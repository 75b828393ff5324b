# SPDX-License-Identifier: Apache-2.0
"""What programs do with clients besides hinting: forks, signals' handlers, ends of processes, callbacks that fail."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Event, EventKind, Stage, tuple_of
from mfsd.client.link import SLICE
from mfsd.ground.model import RequestHint

if TYPE_CHECKING:
    from support.daemons import Running

NOWHERE = tuple_of("10.255.255.1", 1)
BEGINNING = """
import asyncio, atexit, logging, os, signal, sys, threading, time
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from mfsd.client import Client, Stage, tuple_of
target = sys.argv[1]
"""


def run(program: str, target: str, *, daemon: Running | None = None) -> str:
    """What a program prints; fails unless it ends well, in time, and without a complaint of the interpreter's."""
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + program, target],
        capture_output=True, text=True, check=False, timeout=3 * WAIT_S,
        env={"GRPC_VERBOSITY": "NONE", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    if daemon is not None:  # it has ended, and what it said with it
        wait_for(lambda: not daemon.ask(lambda e: e.books.sessions))
    return done.stdout


FORKED = """
def worker():
    hints.request("lost", ttft_left_s=60.0)
    hints.request("lost too", ttft_left_s=60.0)
    print([e for e in asyncio.run(events())])
    with Client("child", target) as own:
        own.request("heard", ttft_left_s=60.0)
        print(own.flush(20))
    hints.close()

async def events():
    return [e async for e in hints.events()]

hints = Client("parent", target)
assert hints.flush(20)
"""
STILL = """
print(hints.flush(20))
hints.request("still", ttft_left_s=60.0)
print(hints.flush(20), hints.stats.accepted)
"""
FORKS = {
    "os.fork": """
pid = os.fork()
if pid == 0:
    worker()
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
""",
    "multiprocessing": """
import multiprocessing
process = multiprocessing.get_context("fork").Process(target=worker)
process.start()
process.join()
assert process.exitcode == 0
""",
}


@pytest.mark.daemon
@pytest.mark.parametrize("how", FORKS)
def test_a_forked_worker_makes_its_own_and_is_told_when_it_uses_its_parents(running: Running, how: str) -> None:
    """As servers do that load the application before they fork."""
    end = (
        'print(hints.flush(20))\nhints.request("still", ttft_left_s=60.0)\nprint(hints.flush(20), hints.stats.accepted)'
    )
    told, *rest = run(FORKED + FORKS[how] + end, running.target, daemon=running).splitlines()
    assert told.startswith("no hints are sent by process ")
    assert told.endswith("its client is that of its parent; make one here")
    assert rest == ["[]", "True", "True", "True 1"]


HANDLER = """
hints = Client("worker", target)
called = 0

def handler(number, frame):
    global called
    called += 1
    hints.request(f"from the handler {called % 10}", ttft_left_s=60.0)
    hints.advice("10.0.0.1")
    hints.stats

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while called < 1000:
    for i in range(100):
        hints.request(f"r{i}", ttft_left_s=60.0)
        hints.advice("10.0.0.1")
signal.signal(signal.SIGALRM, lambda *_: hints.close(0))
while hints._link is not None:
    hints.request("r", ttft_left_s=60.0)
signal.setitimer(signal.ITIMER_REAL, 0)
print("done")
"""


@pytest.mark.daemon
@pytest.mark.parametrize("there", [True, False])
def test_a_signals_handler_may_hint_and_close(running: Running, *, there: bool) -> None:
    assert run(HANDLER, running.target if there else "unix:/nowhere/mfsd.sock") == "done\n"


ENDS = {
    "atexit": """
hints = Client("worker", target)
def last():
    hints.request("r", ttft_left_s=1.0)
    hints.flush(0.1)
    hints.advice("10.0.0.1")
    hints.close()
atexit.register(last)
""",
    "a client made at the end": """
def last():
    with Client("worker", target) as hints:
        hints.request("r", ttft_left_s=1.0)
atexit.register(last)
""",
    "deleted": """
class Worker:
    def __init__(self):
        self.hints, self.me = Client("worker", target), self
        self.hints.request("r", ttft_left_s=1.0)
    def __del__(self):
        self.hints.cancel(request="r")
        self.hints.advice("10.0.0.1")
        self.hints.close()
worker = Worker()
""",
    "threads that hint on": """
hints = Client("worker", target)
def hint():
    while True:
        hints.request("r", ttft_left_s=1.0)
        hints.advice("10.0.0.1")
for _ in range(4):
    threading.Thread(target=hint, daemon=True).start()
time.sleep(0.2)
""",
    "listeners": """
async def main():
    hints = Client("worker", target)
    async def listen():
        async for _ in hints.events():
            pass
    first, second = asyncio.create_task(listen()), asyncio.create_task(listen())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
asyncio.run(main())
""",
    "once for each request": """
for i in range(20):
    with Client(target=target) as hints:
        hints.request(f"r{i}", ttft_left_s=1.0)
time.sleep(0.5)
assert threading.active_count() == 1, threading.enumerate()
""",
}


@pytest.mark.daemon
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("how", ENDS)
def test_programs_end_as_they_would(running: Running, how: str, *, there: bool) -> None:
    if there:
        assert run(ENDS[how], running.target, daemon=running) == ""
    else:
        assert run(ENDS[how], "unix:/nowhere/mfsd.sock") == ""


def expire(client: Client, name: str) -> None:
    """Say something of which the daemon will tell that it has expired, or can't be in time."""
    client.request(name, ttft_left_s=0.01, ttl_s=0.01)
    client.transfer(name, NOWHERE, 1, stage=Stage.P2D, request=name, ttl_s=0.01)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_a_callback_may_raise_whatever_it_likes(running: Running, error: type[BaseException]) -> None:
    heard: list[str] = []

    def callback(event: Event) -> None:
        heard.append(event.transfer_id)
        raise error

    with Client(target=running.target, on_event=callback, on_rejected=lambda _: callback_of_rejections()) as client:

        def callback_of_rejections() -> None:
            raise error

        expire(client, "a")
        wait_for(lambda: "a" in heard)
        client.transfer("b", NOWHERE, 1, stage=Stage.P2D, request="unknown")  # which is rejected
        expire(client, "c")
        wait_for(lambda: "c" in heard)
        assert client.flush(WAIT_S)
        assert client.stats.rejected == 1


def test_events_are_heard_from_the_call_on(running: Running) -> None:
    """Not from when somebody first waits for one; and an iterator that nobody wants any more costs nothing."""
    with Client(target=running.target) as client:
        events = client.events()
        forgotten: Any = client.events()
        gone = weakref.ref(forgotten)
        del forgotten
        gc.collect()
        assert gone() is None
        called: list[Event] = []
        client._events._callback = called.append
        expire(client, "a")
        wait_for(lambda: called)

        async def first() -> Event:
            return await anext(events)

        assert asyncio.run(asyncio.wait_for(first(), WAIT_S)) == called[0]


def test_a_listener_may_stop_before_the_client_does() -> None:
    async def main(client: Client) -> list[Event]:
        events: Any = client.events()
        client._events.tell(Event(EventKind.EXPIRED, "r", "", ""))
        await events.aclose()
        return [e async for e in events]

    with Client(target="unix:/nowhere/mfsd.sock") as client:
        assert asyncio.run(main(client)) == []


def test_callers_get_in_while_a_long_queue_is_gone_through() -> None:
    """As after a daemon that hung for long has been killed: its clients have much to enter."""
    many = 100 * SLICE
    with Client(target="unix:/nowhere/mfsd.sock") as client:
        link = client._link
        assert link is not None
        with link._changed:
            link._queue.extend(RequestHint(f"r{i}", 1e12) for i in range(many))
            link._changed.notify_all()
        seen = {client.stats.queued}
        while client.stats.queued:
            seen.add(client.stats.queued)
        assert len(seen - {0, many}) > 1


def test_a_path_that_is_too_long_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    path = Path("/run") / ("x" * 120)
    with caplog.at_level(logging.WARNING, "mfsd.client"), Client(target=path):
        wait_for(lambda: caplog.records)
    assert [r.message for r in caplog.records] == [
        f"no hints are sent: {path}.id: too long for a socket's path; 107 bytes at most"
    ]


UNREADABLE = """
class Unreadable:
    def find_spec(self, name, path=None, target=None):
        if {which}:
            raise ImportError(f"no right to read {{name}}")

sys.meta_path.insert(0, Unreadable())
hints = Client("worker", target)
hints.advice("10.0.0.1")
hints.request("r", ttft_left_s=60.0)
"""


@pytest.mark.daemon
def test_a_worker_may_give_up_the_rights_to_read_its_environment(running: Running) -> None:
    """After the import; gRPC itself imports much of what it needs only when the first channel is made."""
    asks = """
while hints.advice("127.0.0.1") is None and hints._advisor._thread.is_alive() and not hints.stats.accepted:
    time.sleep(0.01)
print(hints.flush(20), hints._advisor._thread.is_alive())
"""
    assert run(UNREADABLE.format(which="True") + asks, running.target, daemon=running) == "True True\n"


@pytest.mark.daemon
def test_what_no_hint_can_be_sent_for_is_told_once_and_tried_again(running: Running) -> None:
    late = """
sys.modules.pop("grpc._channel")
del grpc._channel
hints = Client("worker", target)
hints.request("r", ttft_left_s=60.0)
time.sleep(1)
del sys.meta_path[0]
print(hints.flush(20))
"""
    first = "import grpc\n" + UNREADABLE.format(which='name == "grpc._channel"').split("hints =")[0]
    assert run(first + late, running.target, daemon=running).splitlines() == [
        "no hints are sent: ImportError('no right to read grpc._channel'); trying on", "True",
    ]  # fmt: skip
