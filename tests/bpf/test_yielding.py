# SPDX-License-Identifier: Apache-2.0
"""Connections that yield in the network: who gets the algorithm, who keeps theirs, what it does, and how it ends."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.privileges import DAEMON, call_with
from support.waiting import wait_for
from support.yielders import CHUNK, FIRST, SECOND, URGENT, Bench, needs_it, sleeper

from bench.parts.testrun import live
from mfsd.client import Fd, give_way
from mfsd.client.manners import AVAILABLE
from mfsd.datapath import _abi
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.yielding import Yielding
from mfsd.datapath.errors import LoaderError
from mfsd.lab.hosts.tcp import algorithm_of, queued, reset_at_close, tcp_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.namespaces import NetnsPair

FIRST_WINDOW: Final = 10
"""Packets of connections that know nothing of their way."""
STILL: Final = 20
"""Looks in a row that show the same."""


@pytest.fixture
def default(netns_pair: NetnsPair) -> str:
    """Algorithm of sockets that choose none."""
    with netns_pair.call(netns_pair.a, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
        return algorithm_of(sock)


@needs_it
@pytest.mark.bpf
def test_it_needs_one_capability_more(bench: Bench) -> None:
    with pytest.raises(LoaderError, match="CAP_PERFMON"):
        call_with(DAEMON, lambda: Yielding(bench.classifier))


@needs_it
@pytest.mark.bpf
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_deferred_connections_get_it_and_give_it_back(bench: Bench, default: str, family: int) -> None:
    sock = bench.connect(family)
    bench.hint(sock, URGENT)
    bench.stays(sock, default)
    bench.hint(sock, FIRST)
    bench.becomes(sock, bench.yielding.name)
    bench.hint(sock, SECOND)
    bench.sends_until(sock, lambda: any(key["band"] == SECOND for key in bench.yielding.paths()[0]))
    keys, paths = bench.yielding.paths()
    deferred = paths[keys["band"] == SECOND]
    assert (deferred["base_us"] < 0xFFFFFFFF).all(), "what the first level knew of the way is not asked for again"
    bench.forget(sock)
    bench.becomes(sock, default)


@needs_it
@pytest.mark.bpf
def test_urgent_again_it_runs_what_it_ran_before(bench: Bench) -> None:
    bench.yielding.settings["flags"] = _abi.YIELD_REPLACE
    reno, cubic = bench.connect(algorithm="reno"), bench.connect(algorithm="cubic")
    for sock in (reno, cubic):
        bench.hint(sock, FIRST)
        bench.becomes(sock, bench.yielding.name)
        bench.hint(sock, URGENT)
    bench.becomes(reno, "reno")
    bench.becomes(cubic, "cubic")  # not by our code for long
    bench.hint(cubic, FIRST)
    bench.becomes(cubic, bench.yielding.name)
    bench.forget(cubic)
    bench.becomes(cubic, "cubic")
    chosen = bench.connect(algorithm=bench.yielding.name)
    bench.hint(chosen, URGENT)
    bench.sends_until(chosen, lambda: tcp_info(chosen).acked > 1 << 26)
    bench.stays(chosen, bench.yielding.name)  # whose urgent part is cubic: nobody might give it back


@needs_it
@pytest.mark.bpf
def test_a_choice_of_its_own_is_respected(bench: Bench, default: str) -> None:
    choice = "reno"
    assert choice != default
    sock = bench.connect(algorithm=choice)
    bench.hint(sock, FIRST)
    bench.stays(sock, choice)
    later = bench.connect()
    bench.hint(later, FIRST)
    bench.becomes(later, bench.yielding.name)
    later.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, choice.encode())
    bench.stays(later, choice)


@needs_it
@pytest.mark.bpf
def test_without_a_sign_of_life_everything_goes_back(bench: Bench, default: str) -> None:
    sock = bench.connect()
    bench.hint(sock, FIRST)
    bench.becomes(sock, bench.yielding.name)
    bench.classifier.host["heartbeat_ns"], bench.classifier.host["timeout_ns"] = 1, 1
    bench.becomes(sock, default)
    live(bench.classifier)
    bench.becomes(sock, bench.yielding.name)


@needs_it
@pytest.mark.bpf
def test_nothing_is_left_when_it_is_closed_in_mid_flight(bench: Bench, default: str) -> None:
    sock = bench.connect()
    bench.hint(sock, FIRST)
    bench.becomes(sock, bench.yielding.name)
    name = bench.yielding.name
    assert name in AVAILABLE.read_text().split()
    bench.yielding.close()
    assert name not in AVAILABLE.read_text().split()
    bench.classifier.host["heartbeat_ns"], bench.classifier.host["timeout_ns"] = 1, 1
    bench.becomes(sock, default)
    live(bench.classifier)
    with Yielding(bench.classifier) as next_one:
        assert next_one.name == name
        bench.obey(next_one)
        bench.pair.call(bench.pair.a, next_one.adopt)
        bench.becomes(sock, name)  # also what the one before has given back
        bench.classifier.host["heartbeat_ns"], bench.classifier.host["timeout_ns"] = 1, 1
        bench.becomes(sock, default)


@needs_it
@pytest.mark.bpf
def test_two_daemons_do_not_meddle(bench: Bench, default: str) -> None:
    with contextlib.ExitStack() as stack:
        classifier = stack.enter_context(LibbpfLoader().open_classifier(64))
        other = Bench(classifier, stack.enter_context(Yielding(classifier)), bench.pair)
        stack.callback(other.close)
        assert other.yielding.name != bench.yielding.name
        pairs = [(one, one.connect()) for one in (bench, other)]
        for one, sock in pairs:
            one.hint(sock, FIRST)
            one.becomes(sock, one.yielding.name)
        for one, sock in pairs:
            one.forget(sock)
            one.becomes(sock, default)


@contextlib.contextmanager
def jammed(pair: NetnsPair) -> Iterator[None]:
    """Nothing leaves the first namespace meanwhile."""
    pair.run(pair.a, f"tc qdisc add dev {pair.dev_a} root tbf rate 8bit burst 2000 limit 1mb")
    try:
        yield
    finally:
        pair.run(pair.a, f"tc qdisc del dev {pair.dev_a} root")


def stands(number: Callable[[], int]) -> int:
    """A number that no longer changes."""
    seen: list[int] = []

    def still() -> bool:
        seen.append(number())
        return len(seen) >= STILL and len(set(seen[-STILL:])) == 1

    wait_for(still, "it to stand")
    return seen[-1]


@contextlib.contextmanager
def deaf(pair: NetnsPair) -> Iterator[Bench]:
    """A bench whose algorithm has gone: nobody is told of the next connections."""
    with LibbpfLoader().open_classifier(64) as classifier, Yielding(classifier) as early:
        bench = Bench(classifier, early, pair)
        early.close()
        with contextlib.closing(bench):
            yield bench


@needs_it
@pytest.mark.bpf
def test_connections_that_are_older_are_looked_for(netns_pair: NetnsPair) -> None:
    with deaf(netns_pair) as bench:
        sock = bench.connect()
        default = algorithm_of(sock)
        with Yielding(bench.classifier) as late:
            bench.obey(late)
            bench.hint(sock, FIRST)
            bench.stays(sock, default)
            switched, _ = netns_pair.call(netns_pair.a, late.adopt)
            assert switched == 1
            assert algorithm_of(sock) == late.name
            bench.forget(sock)
            bench.becomes(sock, default)


@needs_it
@pytest.mark.bpf
def test_a_worker_hands_over_a_connection_that_nobody_tells_of(netns_pair: NetnsPair) -> None:
    """Without any privileges; of another namespace the daemon can't look for it."""
    with deaf(netns_pair) as bench:
        sock, choice = bench.connect(algorithm="cubic"), bench.connect(algorithm="reno")
        assert not call_with(frozenset(), lambda: give_way(sock)), "nobody yields here"
        with Yielding(bench.classifier) as late:
            bench.obey(late)
            bench.hint(sock, FIRST)
            bench.stays(sock, "cubic")
            for _ in range(2):
                assert call_with(frozenset(), lambda: give_way(Fd(sock.fileno())))
            assert algorithm_of(sock) == late.name
            bench.stays(sock, late.name)
            assert not call_with(frozenset(), lambda: give_way(choice))
            assert algorithm_of(choice) == "reno"
            bench.forget(sock)
            bench.becomes(sock, "cubic")


@needs_it
@pytest.mark.bpf
def test_who_has_chosen_it_goes_back_to_cubic_though_the_kernel_tells_of_it(bench: Bench) -> None:
    early, sock = bench.connect(algorithm=bench.yielding.name), bench.connect(algorithm="cubic")
    for each in (early, sock):
        bench.hint(each, URGENT)
    bench.stays(early, bench.yielding.name)
    assert give_way(sock)
    bench.hint(sock, FIRST)
    bench.sends_until(sock, lambda: bool(bench.yielding.paths()[1]["samples"].any()))
    bench.hint(sock, URGENT)
    bench.stays(sock, bench.yielding.name)
    bench.forget(sock)
    bench.becomes(sock, "cubic")


@needs_it
@pytest.mark.bpf
@pytest.mark.parametrize("nodelay", [0, 1])
def test_who_sleeps_hears_of_its_promotion(bench: Bench, nodelay: int) -> None:
    """Nothing else would tell it."""
    sock = sleeper(bench, nodelay=nodelay)
    bench.hint(sock, URGENT)
    bench.pair.call(bench.pair.a, bench.yielding.wake)
    wait_for(lambda: not queued(sock), "what it had left")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == nodelay


@needs_it
@pytest.mark.bpf
def test_a_promoted_one_may_send_behind_what_is_stuck(bench: Bench) -> None:
    """More than its first window is: else nothing would show that it has been freed."""
    bench.yielding.settings["flags"] = _abi.YIELD_REPLACE
    sock = bench.connect(algorithm="cubic")
    reset_at_close(sock)
    bench.hint(sock, FIRST)
    bench.sends_until(sock, lambda: bool(bench.yielding.paths()[1]["samples"].any()))  # the window is no longer cubic's
    bench.sends_until(sock, lambda: tcp_info(sock).window > 4 * FIRST_WINDOW)
    sock.setblocking(False)
    with jammed(bench.pair):
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(CHUNK)
        stuck = stands(lambda: tcp_info(sock).unacked)
        assert stuck > FIRST_WINDOW
        bench.yielding.settings["rate"] = 1  # of a way that holds nothing
        bench.hint(sock, URGENT)
        bench.pair.call(bench.pair.a, bench.yielding.wake)
        assert tcp_info(sock).window > stuck


@needs_it
@pytest.mark.bpf
def test_made_the_default_it_is_cubic_to_all_and_goes(bench: Bench) -> None:
    """A namespace's default outlives the daemon; who gets it then does not keep it."""
    knob = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    bench.pair.call(bench.pair.a, lambda: knob.write_text(bench.yielding.name))
    sock, deferred = bench.connect(), bench.connect()
    assert algorithm_of(sock) == bench.yielding.name
    bench.hint(deferred, FIRST)
    bench.sends_until(deferred, lambda: bool(bench.yielding.paths()[1]["samples"].any()))
    bench.becomes(sock, "cubic")
    bench.yielding.close()
    bench.classifier.host["heartbeat_ns"], bench.classifier.host["timeout_ns"] = 1, 1
    bench.becomes(deferred, "cubic")
    bench.becomes(bench.connect(), "cubic")
