# SPDX-License-Identifier: Apache-2.0
"""Reads of vLLM's connectors that wait for tighter ones, with a real daemon."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.vllm import PullConnector, Request, transfers
from support.waiting import WAIT_S

from mfsd.integrations.vllm import MfsdConnector
from mfsd.integrations.vllm.hold import LONGEST_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.daemons import Running

    from mfsd.integrations.vllm.hold import Hold


@dataclass
class Entry:
    """As NIXL's ReqMeta."""

    local_block_ids: tuple[list[int], ...]
    awaiting_kvs: bool = True


class Pulls(MfsdConnector, PullConnector):
    """Both sides in one, as NIXL's pull connector has them."""

    def __init__(self, extra: dict[str, Any], policy: str = "recompute") -> None:
        super().__init__(extra)
        self._vllm_config.kv_transfer_config.kv_load_failure_policy = policy
        self.started: list[str] = []

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def step(self) -> list[str]:
        """One step of scheduler and worker; what the worker starts to read."""
        meta = self.build_connector_meta(SimpleNamespace(scheduled_new_reqs=[]))
        self._connector_metadata = meta
        self.start_load_kv(None)
        return self.started

    def expect(self, name: str, left_s: float, block: int) -> Request:
        return self.loads(name, left_s, Entry(([block, block + 1],)))


class _Pull(PullConnector):
    """What stands below the mixin."""

    started: list[str]

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        del forward_context
        self.started = [n for n, e in self._connector_metadata.reqs_to_recv.items() if e.awaiting_kvs]

    def get_transfer_results(self, finished_req_ids: Any) -> Any:
        del finished_req_ids
        return SimpleNamespace(finished_recving=set(), failed_recving=set())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set()


class Pull(Pulls, _Pull):
    @property
    def held(self) -> Hold:
        """Reads that wait, and those that are on their way."""
        hold = self._mfsd().hold
        assert hold is not None
        return hold


@pytest.fixture
def make(running: Running) -> Iterator[Callable[..., Pull]]:
    """Makes connectors that hold reads back; keyword arguments are of their configuration."""
    with contextlib.ExitStack() as stack:

        def made(policy: str = "recompute", **extra: object) -> Pull:
            pull = Pull({"mfsd_target": running.target, "mfsd_hold": True} | extra, policy)
            stack.callback(pull.shutdown)
            return pull

        yield made


def results(pull: Pull) -> tuple[set[str], set[str], set[int]]:
    out = pull.get_transfer_results(set())
    return out.finished_recving, out.failed_recving, pull.get_block_ids_with_load_errors()


def test_loose_reads_wait_for_tight_ones_and_start_when_those_are_over(
    running: Running, make: Callable[..., Pull]
) -> None:
    pull = make()
    pull.expect("loose", 60.0, 10)
    assert pull.step() == ["loose"]
    pull.expect("tight", 1.0, 20)
    pull.expect("looser", 90.0, 30)
    pull.expect("later", 5.0, 40)
    assert pull.step() == ["tight"]  # never held back by what is due later, though that is on its way
    pull._mfsd().client.flush(WAIT_S)
    assert {t.id for t in transfers(running)} == {"loose/kv", "tight/kv"}
    assert pull.step() == []
    pull.update_connector_output(SimpleNamespace(finished_recving={"tight"}))
    assert pull.step() == ["later"]
    pull.update_connector_output(SimpleNamespace(finished_recving={"later"}))
    assert pull.step() == []
    pull.update_connector_output(SimpleNamespace(failed_recving={"loose"}))
    assert pull.step() == ["looser"]
    assert results(pull) == (set(), set(), set())


def test_a_read_that_waits_is_started_when_it_can_wait_no_longer(make: Callable[..., Pull]) -> None:
    pull = make()
    pull.expect("tight", 1.0, 10)
    pull.expect("loose", 60.0, 20)
    assert pull.step() == ["tight"]
    pull.held.waiting["loose"].alone_s = 31.0
    assert pull.step() == ["loose"]
    pull.expect("looser", 90.0, 30)
    assert pull.step() == []
    pull.held.waiting["looser"].since -= 10.0
    assert pull.step() == ["looser"]


def test_a_read_without_a_deadline_waits_for_tight_ones_for_a_while_and_is_never_given_up(
    make: Callable[..., Pull],
) -> None:
    pull = make(mfsd_recompute=True)
    pull.expect("tight", 1.0, 10)
    for n, name in enumerate(("one", "two")):
        pull.expect(name, math.inf, 20 + n)
    assert pull.step() == ["tight"]
    for read in pull.held.waiting.values():
        read.alone_s = 1e6
    assert pull.step() == []
    pull.held.waiting["one"].since -= LONGEST_S
    assert pull.step() == ["one"]
    pull.update_connector_output(SimpleNamespace(finished_recving={"tight"}))
    assert pull.step() == ["two"]  # which is due no later than the other one
    assert results(pull) == (set(), set(), set())


def test_what_is_aborted_while_it_waits_or_can_t_be_in_time_is_reported_as_failed(make: Callable[..., Pull]) -> None:
    pull = make(mfsd_recompute=True)
    pull.expect("tight", 1.0, 10)
    aborted = pull.expect("aborted", 60.0, 20)
    pull.expect("hopeless", 70.0, 30)
    assert pull.step() == ["tight"]
    pull.request_finished(aborted, [])
    pull.held.waiting["hopeless"].alone_s = 71.0
    assert pull.step() == []
    told = pull._connector_metadata.reqs_to_recv
    assert {n: (e.local_block_ids, e.awaiting_kvs) for n, e in told.items()} == dict.fromkeys(
        ("aborted", "hopeless"), (([],), False)
    )  # the prefill host hears that it may free their blocks
    assert results(pull) == ({"aborted", "hopeless"}, {"aborted", "hopeless"}, {20, 21, 30, 31})
    assert results(pull) == (set(), set(), set())
    assert not pull.held.waiting


def test_nothing_is_given_up_where_vllm_would_fail_the_request(make: Callable[..., Pull]) -> None:
    pull = make("fail", mfsd_recompute=True)
    pull.expect("tight", 1.0, 10)
    pull.expect("hopeless", 70.0, 30)
    pull.held.expected["hopeless"].alone_s = 71.0
    assert pull.step() == ["tight", "hopeless"]


def test_reads_start_whatever_fails_in_holding_them(
    make: Callable[..., Pull], caplog: pytest.LogCaptureFixture
) -> None:
    pull = make()
    pull.expect("tight", 1.0, 10)
    pull.expect("loose", 60.0, 20)
    pull.held.expected["tight"].deadline = "soon"  # type: ignore[assignment]  # nobody can sort that
    assert sorted(pull.step()) == ["loose", "tight"]
    assert "holding reads back" in caplog.text
