# SPDX-License-Identifier: Apache-2.0
"""Columns over a real server: they do what single hints do, with every check of theirs, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import code_pb2
from support.daemons import Api, Running, violation

from mfsd.client import cookie_of
from mfsd.engine.settings import LimitsConfig
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

LIMITS = LimitsConfig()
LONG = "x" * 257
MULTICAST = pb.Selector(tuple=pb.Tuple(dst_addr="224.0.0.1"))
REQUEST = pb.Hint(request=pb.Request(id="r", ttft_left_us=600_000_000))


def columns(n: int = 3, **changes: Any) -> pb.TransferColumns:
    """Good ones, but for the changes."""
    good: dict[str, Any] = {
        "ids": [f"t{i}" for i in range(n)],
        "owners": ["r"],
        "request": [1],
        "stage": [pb.STAGE_P2D],
        "bytes": [1000],
        "selectors": [pb.Selector(cookie=1)],
    }
    return pb.TransferColumns(**(good | changes))


def send(api: Api, transfers: pb.TransferColumns, **more: Any) -> pb.HintReply:
    return api.send(REQUEST, transfers=transfers, **more)


def test_they_do_what_single_hints_do(
    api: Api, running: Running, connection: tuple[socket.socket, socket.socket]
) -> None:
    cookie = cookie_of(connection[0])
    stages = [pb.STAGE_KV_REUSE, pb.STAGE_COLLECTIVE, pb.STAGE_P2D, pb.STAGE_BACKGROUND]
    many = pb.TransferColumns(
        ids=["a", "b", "c", "d"],
        owners=["r", "g"],
        request=[1, 0, 1, 0],
        batch=[0, 2, 2, 0],
        stage=stages,
        bytes=[10, 20, 30, 40],
        target_layer=[1, 2, 3, 4],
        selectors=[pb.Selector(cookie=cookie), pb.Selector(tuple=pb.Tuple(dst_addr="10.1.2.3"))],
        selector=[0, 0, 0, 1],
        deadline_us=[0, 5_000_000, -3_000_000, 0],
        position=[7],
        ttl_us=[1_000_000, 0, 0, 10**15],
        max_defer_us=[0, 1, 9_000_000, 0],
    )
    batch = pb.Hint(batch=pb.Batch(id="g", request_ids=["r"]))
    owners = ["", *many.owners]
    singly = [
        pb.Hint(
            transfer=pb.Transfer(
                id=many.ids[i], request_id=owners[many.request[i]], batch_id=owners[many.batch[i]],
                stage=many.stage[i], bytes=many.bytes[i], target_layer=many.target_layer[i],  # type: ignore[arg-type]
                selector=many.selectors[many.selector[i]], deadline_us=many.deadline_us[i], position=7,
                ttl_us=many.ttl_us[i], max_defer_us=many.max_defer_us[i],
            )
        )
        for i in range(4)
    ]  # fmt: skip
    one = api.send(REQUEST, batch, transfers=many, session="columns")
    other = api.send(REQUEST, batch, *singly, session="singly")
    assert (one.accepted, len(one.rejected), one.takes_columns) == (6, 0, True)
    assert (other.accepted, len(other.rejected)) == (6, 0)

    def state(session: str) -> list[Any]:
        def read(engine: Any) -> list[Any]:
            rows, owner = engine.books.transfers, engine.books.sessions[session]
            found = {}
            for t in owner.transfers.values():
                numbers = [float(rows.get(t, c)) for c in ("stage", "size", "start", "end", "target_layer", "ordered")]
                times = [
                    round(float(rows.get(t, c)) - engine.books.sessions[session].seen, 1)
                    for c in ("deadline", "hold_until", "expires")
                ]
                found[t.id] = (numbers, times, t.request and t.request.id, t.batch and t.batch.id, t.stream.selector)
            return sorted(found.items())

        return running.ask(read)

    assert state("columns") == state("singly")
    assert len(state("columns")) == 4


BAD = [
    ({"ids": ["a", "", "c"]}, 1, "transfers.ids[1]", "is empty"),
    ({"ids": ["a", "b", LONG]}, 2, "transfers.ids[2]", "257 bytes"),
    ({"ids": ["a", "b", "ä" * 129]}, 2, "transfers.ids[2]", "258 bytes"),
    ({"ids": ["a", "b", "a"]}, 2, "transfers.ids[2]", "'a' is announced already"),
    ({"request": [1, 1, 2]}, 2, "transfers.request[2]", "2 is beyond the last of the owners"),
    ({"batch": [0, 7, 0]}, 1, "transfers.batch[1]", "7 is beyond the last of the owners"),
    ({"request": [0, 1, 1]}, 0, "transfers.request[0]", "is empty, and so is batch_id"),
    ({"owners": ["r", "nobody"], "request": [1, 2, 1]}, 1, "transfers.request[1]", "no request or batch 'nobody'"),
    ({"owners": ["r", LONG], "request": [1, 2, 1]}, 1, "transfers.request[1]", "257 bytes"),
    ({"owners": ["r", ""], "request": [1, 2, 1]}, 1, "transfers.request[1]", "is empty, and so is batch_id"),
    ({"stage": [3, 3, 9]}, 2, "transfers.stage[2]", "unknown stage 9"),
    ({"stage": [3, 0, 3]}, 1, "transfers.stage[1]", "unknown stage 0"),
    ({"stage": [5, 3, 3]}, 0, "transfers.stage[0]", "unknown stage 5"),
    ({"stage": [3, 3, 2**32 - 1]}, 2, "transfers.stage[2]", "unknown stage 4294967295"),
    ({"bytes": [1, 0, 1]}, 1, "transfers.bytes[1]", "0 bytes"),
    ({"bytes": [-5, 1, 1]}, 0, "transfers.bytes[0]", "-5 bytes"),
    ({"bytes": [1, 1, LIMITS.max_transfer_bytes + 1]}, 2, "transfers.bytes[2]", "limits.max_transfer_bytes"),
    ({"target_layer": [0, 5000, 0]}, 1, "transfers.target_layer[1]", "at most 4096"),
    ({"deadline_us": [0, 0, 10**15]}, 2, "transfers.deadline_us[2]", "limits.max_deadline_s"),
    ({"deadline_us": [0, 0, -(10**15)]}, 2, "transfers.deadline_us[2]", "limits.max_deadline_s"),
    ({"max_defer_us": [0, 0, 300_000_001]}, 2, "transfers.max_defer_us[2]", "limits.max_defer_s"),
    ({"max_defer_us": [0, 2**64 - 1, 0]}, 1, "transfers.max_defer_us[1]", "limits.max_defer_s"),
    ({"selector": [0, 0, 1]}, 2, "transfers.selector[2]", "1 is beyond the last of the selectors"),
    (
        {"selectors": [pb.Selector(cookie=1), MULTICAST], "selector": [0, 1, 0]},
        1,
        "transfers.selectors[1].tuple.dst_addr",
        "no peer's address",
    ),
    (
        {"selectors": [pb.Selector(cookie=1), pb.Selector()], "selector": [0, 1, 0]},
        1,
        "transfers.selector[1]",
        "is not set",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "row", "field", "problem"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_row_costs_only_itself_and_names_its_field(
    api: Api, running: Running, changes: dict[str, Any], row: int, field: str, problem: str
) -> None:
    reply = send(api, columns(**changes))
    assert reply.accepted == 3
    (rejected,) = reply.rejected
    assert (rejected.part, rejected.index, rejected.rows) == (pb.Rejection.TRANSFERS, row, 0)
    code, where, description = violation(rejected.status)
    assert (code, where) == (code_pb2.INVALID_ARGUMENT, field)
    assert problem in description
    assert running.ask(lambda e: e.books.transfers.n) == 2


def test_what_looks_too_long_but_is_not_is_taken(api: Api) -> None:
    names = ["x" * 256, "ä" * 128, "short"]
    assert not send(api, columns(ids=names, owners=["r", "y" * 256])).rejected


def test_columns_that_do_not_fit_together_are_rejected_as_a_whole(api: Api, running: Running) -> None:
    reply = send(api, columns(bytes=[1, 2]))
    assert reply.accepted == 1
    (rejected,) = reply.rejected
    assert (rejected.part, rejected.index, rejected.rows) == (pb.Rejection.TRANSFERS, 0, 3)
    assert violation(rejected.status)[1:] == (
        "transfers.bytes",
        "2 values for 3 rows; give one for each row, one for all, or none",
    )
    assert running.ask(lambda e: (e.books.counters.hints_accepted, e.books.counters.hints_rejected)) == (1, 3)


def test_limits_count_rows_as_hints(start: Callable[..., Running], reach: Callable[[Running], Api]) -> None:
    api = reach(start(limits={"max_hints_per_batch": 4, "max_transfers_per_session": 2}))
    (rejected,) = send(api, columns()).rejected
    code, field, description = violation(rejected.status)
    assert (rejected.index, code, field) == (2, code_pb2.RESOURCE_EXHAUSTED, "transfers.ids[2]")
    assert "limits.max_transfers_per_session" in description
    with pytest.raises(grpc.RpcError) as e:
        send(api, columns(4))
    assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_full_table_names_the_row(start: Callable[..., Running], reach: Callable[[Running], Api]) -> None:
    many = columns(17, selectors=[pb.Selector(cookie=100 + i) for i in range(17)], selector=list(range(17)))
    (rejected,) = send(reach(start(daemon={"slots": 16})), many).rejected
    code, field, description = violation(rejected.status)
    assert (rejected.index, code, field) == (16, code_pb2.RESOURCE_EXHAUSTED, "transfers.selector[16]")
    assert "16 slots" in description


def test_progress_by_columns(api: Api, running: Running) -> None:
    api.send(REQUEST, pb.Hint(batch=pb.Batch(id="b", layers=8)))
    steps = pb.ProgressColumns(
        batch_ids=["b", "nobody", "", "r"], current_layer=[3, 1, 1, 5000], compute_done=[True, False, False, False]
    )
    reply = api.send(progress=steps)
    assert reply.accepted == 1
    said = [(r.part, r.index, violation(r.status)[1]) for r in reply.rejected]
    assert said == [
        (pb.Rejection.PROGRESS, 1, "progress.batch_ids[1]"),
        (pb.Rejection.PROGRESS, 2, "progress.batch_ids[2]"),
        (pb.Rejection.PROGRESS, 3, "progress.current_layer[3]"),
    ]
    assert running.ask(lambda e: e.books.batches.live("current_layer").tolist()) == [3]
    assert running.ask(lambda e: e.books.batches.live("compute_done").tolist()) == [True]
    (whole,) = api.send(progress=pb.ProgressColumns(batch_ids=["b", "c"], current_layer=[1, 2, 3])).rejected
    assert (whole.rows, violation(whole.status)[1]) == (2, "progress.current_layer")


def test_they_are_applied_after_the_hints_of_their_batch(api: Api, running: Running) -> None:
    reply = api.send(
        pb.Hint(batch=pb.Batch(id="b")),
        pb.Hint(completion=pb.Completion(transfer_id="t0")),
        REQUEST,
        transfers=columns(),
        progress=pb.ProgressColumns(batch_ids=["b"], current_layer=[2]),
    )
    assert (reply.accepted, list(reply.rejected)) == (7, [])
    assert running.ask(lambda e: set(e.books.sessions["test"].transfers)) == {"t0", "t1", "t2"}


def test_a_failure_of_ours_costs_the_columns_only(api: Api, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(running.daemon.engine, "transfers", broken)
    reply = send(api, columns())
    assert reply.accepted == 1
    (rejected,) = reply.rejected
    assert (rejected.rows, rejected.status.code) == (3, code_pb2.INTERNAL)
