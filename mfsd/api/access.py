# SPDX-License-Identifier: Apache-2.0
"""Who may call what: workers hint, operators do everything else, and health is for everybody.

An operator is root, the daemon's own user, a member of ``daemon.operator_group``, all of these on the kernel's word
(identity.py), or who holds a client certificate where the endpoint asks for one. Everybody else who reaches the socket
is a worker. One interceptor decides for all services, so a method that is added later is closed until it is listed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from inspect import isasyncgenfunction
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2

from mfsd.api import errors
from mfsd.api.whole import SMALL, Large
from mfsd.ground.wire import TOKEN
from mfsd.v1 import hints_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator

    from mfsd.api.identity import Identities, Peer

    Context = grpc.aio.ServicerContext[Any, Any]

STREAMS: Final = 4
"""Streams at a time, of a user or of all without a token, for each session that a user may have. One that says nothing
takes memory, too."""
HINTS: Final = hints_pb2.DESCRIPTOR.services_by_name["Hints"].full_name
BATCHES: Final = (f"/{HINTS}/Send", f"/{HINTS}/Stream")
"""Methods that take batches of hints, the only messages that may be large."""
FOR_ALL: Final = (f"/{HINTS}/", "/grpc.health.v1.Health/")
"""Beginnings of methods that workers may call, too."""


class Access(grpc.aio.ServerInterceptor):
    """Refuses what a caller may not do, before anything of it is read."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities
        self._streams: Counter[int] = Counter()
        """That are open, by user; -1: of callers without a token."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        check = self._anybody if method.startswith(FOR_ALL) else self._check
        serializers = _tolerant(handler.request_deserializer, batches=method in BATCHES), handler.response_serializer
        if not handler.response_streaming:
            inner = handler.unary_unary

            async def once(request: Any, context: Context) -> Any:
                await check(context)
                return await inner(await _formed(request, context), context)

            return grpc.unary_unary_rpc_method_handler(once, *serializers)
        if handler.request_streaming:
            both = self._limited(_many(handler.stream_stream, _all_formed, check))
            return grpc.stream_stream_rpc_method_handler(both, *serializers)
        some = self._limited(_many(handler.unary_stream, _formed, check))
        return grpc.unary_stream_rpc_method_handler(some, *serializers)

    def _limited(self, inner: Any) -> Any:
        """The same handler for as many streams of a user as it may have."""

        async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
            with await self._one(context):
                async for reply in inner(request, context):
                    yield reply

        async def writes(request: Any, context: Context) -> None:
            with await self._one(context):
                await inner(request, context)

        return answers if isasyncgenfunction(inner) else writes

    async def _one(self, context: Context) -> contextlib.AbstractContextManager[None]:
        """A stream of the caller's; ends the call where it has too many."""
        try:
            peer = peer_of(self._identities, context)
        except errors.Refused:  # the service answers that
            peer = None
        uid, most = -1 if peer is None else peer.uid, STREAMS * self._identities.limit
        if self._streams[uid] >= most:
            whose = "callers without a token have" if peer is None else f"user {uid} has"
            why = f"{whose} {most} streams open already ({STREAMS} times limits.max_sessions_per_user)"
            await errors.abort(context, errors.Refused(code_pb2.RESOURCE_EXHAUSTED, why))
        return self._counted(uid)

    @contextlib.contextmanager
    def _counted(self, uid: int) -> Iterator[None]:
        self._streams[uid] += 1
        try:
            yield
        finally:
            self._streams[uid] -= 1
            if not self._streams[uid]:
                del self._streams[uid]

    @staticmethod
    async def _anybody(context: Context) -> None:
        """Let everybody in."""

    async def _check(self, context: Context) -> None:
        if by_certificate(context):
            return
        try:
            peer = peer_of(self._identities, context)
        except errors.Refused as e:
            await errors.abort(context, e)
        if peer is None:
            refused = errors.Refused(
                code_pb2.UNAUTHENTICATED, "it does not know who calls: connect to the socket ending in .id first"
            )
            await errors.abort(context, refused)
        elif not peer.operator:
            refused = errors.Refused(
                code_pb2.PERMISSION_DENIED,
                f"user {peer.uid} is no operator; operators are root, mfsd's own user and the members of "
                "daemon.operator_group",
            )
            await errors.abort(context, refused)


_MALFORMED: Final = object()
_TOO_LARGE: Final = object()


def _tolerant(parse: Callable[[bytes], Any] | None, *, batches: bool) -> Callable[[bytes], Any]:
    """Have what is no message of ours answered, instead of logged with a traceback each time.

    What is large is not parsed here, before anybody is asked: ``batches`` of hints are when it is their turn.
    """

    def parsed(raw: bytes) -> Any:
        if len(raw) > SMALL:
            return Large(raw) if batches else _TOO_LARGE
        try:
            return raw if parse is None else parse(raw)
        except DecodeError:
            return _MALFORMED

    return parsed


async def _formed(request: Any, context: Context) -> Any:
    if request is _MALFORMED:
        refused = errors.Refused(code_pb2.INVALID_ARGUMENT, "the message is malformed")
        await errors.abort(context, refused)
    if request is _TOO_LARGE:
        refused = errors.Refused(code_pb2.RESOURCE_EXHAUSTED, f"the message has more than {SMALL} bytes")
        await errors.abort(context, refused)
    return request


async def _all_formed(requests: AsyncIterable[Any], context: Context) -> AsyncIterator[Any]:
    async def formed() -> AsyncIterator[Any]:
        async for request in requests:
            yield await _formed(request, context)

    return formed()


def _many(
    inner: Any, formed: Callable[[Any, Context], Awaitable[Any]], check: Callable[[Context], Awaitable[None]]
) -> Any:
    """A handler of many answers, which it yields, or writes itself."""

    async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
        await check(context)
        async for reply in inner(await formed(request, context), context):
            yield reply

    async def writes(request: Any, context: Context) -> None:
        await check(context)
        await inner(await formed(request, context), context)

    return answers if isasyncgenfunction(inner) else writes


def by_certificate(context: Context) -> bool:
    """The caller has shown a certificate of daemon.tls_client_ca: nobody else comes that way."""
    return bool(context.auth_context().get("transport_security_type") == [b"ssl"])


def peer_of(identities: Identities, context: Context) -> Peer | None:
    """Who calls; None: somebody without a token. Raises errors.Refused for a token that nobody has."""
    for key, value in context.invocation_metadata() or ():
        if key == TOKEN:
            found = identities.of(str(value))
            if found is None:
                raise errors.Refused(
                    code_pb2.UNAUTHENTICATED, "its token is not known; connect to the socket ending in .id again"
                )
            return found
    return None
