# SPDX-License-Identifier: Apache-2.0
"""The thread that tells promoted connections of it (mfsd/daemon/waker.py): once for many, and never after its end."""

from __future__ import annotations

import errno
import functools
import threading
from typing import TYPE_CHECKING

from support.waiting import WAIT_S, wait_for

from mfsd.daemon.waker import Waker

if TYPE_CHECKING:
    import pytest


def test_what_comes_meanwhile_is_told_once() -> None:
    entered, goes_on, calls = threading.Event(), threading.Event(), []

    def wake() -> None:
        calls.append(threading.current_thread().name)
        entered.set()
        assert goes_on.wait(WAIT_S)

    waker = Waker(wake)
    waker.call()
    assert entered.wait(WAIT_S)
    entered.clear()
    for _ in range(5):
        waker.call()
    assert len(calls) == 1
    goes_on.set()
    assert entered.wait(WAIT_S), "those five have been told"
    waker.close()
    waker.call()
    waker.close()
    assert calls == ["mfsd-wake"] * 2


def _more(calls: list[int], before: int) -> bool:
    return len(calls) > before


def test_a_failure_is_logged_when_it_begins_and_not_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [OSError(errno.EPERM, "not permitted"), OSError(errno.EPERM, "not permitted"), None]
    calls: list[int] = []

    def wake() -> None:
        outcome = outcomes[len(calls)]
        calls.append(1)
        if outcome is not None:
            raise outcome

    waker = Waker(wake)
    for _ in outcomes:
        before = len(calls)
        waker.call()
        wait_for(functools.partial(_more, calls, before), "another try")
    waker.close()
    assert capsys.readouterr().out.count("not permitted") == 1
