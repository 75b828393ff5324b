# SPDX-License-Identifier: Apache-2.0
"""Between a client and a real daemon: a tap that remembers what was asked. And answers to order, of no daemon."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf import message_factory

from mfsd.v1 import control_pb2, hints_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from google.protobuf.message import Message

METHODS: Final = {
    f"/{service.full_name}/{method.name}": method
    for service in (control_pb2.DESCRIPTOR.services_by_name["Control"], hints_pb2.DESCRIPTOR.services_by_name["Hints"])
    for method in service.methods
}
"""By path of the call."""
YEAR_S: Final = 365 * 86400.0


class Tap(grpc.GenericRpcHandler):
    """Calls with one request. ``asked``: all requests so far."""

    def __init__(self, daemon: grpc.Channel) -> None:
        self._daemon = daemon
        self.asked: list[Any] = []

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """On the wire an answer is a stream of one."""

        def hand_on(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            self.asked.append(_request(call.method, request))
            left = context.time_remaining()  # centuries where the client sets no limit, which is no timeout to ask for
            ask: Any = self._daemon.unary_stream(call.method)
            answers = ask(request, timeout=left if left < YEAR_S else None)
            context.add_callback(answers.cancel)
            try:
                yield from answers
            except grpc.RpcError:
                context.set_trailing_metadata(answers.trailing_metadata())
                context.abort(answers.code(), answers.details())

        return grpc.unary_stream_rpc_method_handler(hand_on)


def _request(path: str, data: bytes) -> Any:
    return message_factory.GetMessageClass(METHODS[path].input_type).FromString(data)


class Scripted(grpc.GenericRpcHandler):
    """Answers the calls it is told of, by name; a server with nothing else does not know any other."""

    def __init__(self, **answers: Callable[[Any, grpc.ServicerContext], Message]) -> None:
        self._answers = answers

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """One message, also where the client expects a stream."""
        answer = self._answers.get(METHODS[call.method].name)
        if answer is None:
            return None

        def give(request: bytes, context: grpc.ServicerContext) -> bytes:
            return answer(_request(call.method, request), context).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(give)


@contextlib.contextmanager
def served(path: Path, handler: grpc.GenericRpcHandler) -> Iterator[None]:
    """A server on a unix socket."""
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, [handler])
        server.add_insecure_port(f"unix:{path}")
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait()
