# SPDX-License-Identifier: Apache-2.0
"""Who may call what: workers hint, operators do everything else, and health is for everybody.

An operator is root, the daemon's own user, a member of ``daemon.operator_group``, all of these on the kernel's word
(identity.py), or who holds a client certificate where the endpoint asks for one. Everybody else who reaches the socket
is a worker. One interceptor decides for all services, so a method that is added later is closed until it is listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import grpc
from google.rpc import code_pb2

from mfsd.api import errors
from mfsd.api.identity import TOKEN
from mfsd.v1 import hints_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from mfsd.api.identity import Identities, Peer

    Context = grpc.aio.ServicerContext[Any, Any]

FOR_ALL: Final = (f"/{hints_pb2.DESCRIPTOR.services_by_name['Hints'].full_name}/", "/grpc.health.v1.Health/")
"""Beginnings of methods that workers may call, too."""


class Access(grpc.aio.ServerInterceptor):
    """Refuses what a caller may not do, before anything of it is read."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(FOR_ALL):
            return handler
        return self._guarded(handler)

    def _guarded(self, handler: Any) -> Any:
        """The same handler for operators only."""
        serializers = handler.request_deserializer, handler.response_serializer
        if not handler.response_streaming:
            inner = handler.unary_unary

            async def once(request: Any, context: Context) -> Any:
                await self._check(context)
                return await inner(request, context)

            return grpc.unary_unary_rpc_method_handler(once, *serializers)
        many = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def on_and_on(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._check(context)
            async for reply in many(request, context):
                yield reply

        make: Any = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(on_and_on, *serializers)

    async def _check(self, context: Context) -> None:
        if by_certificate(context):
            return
        try:
            peer = peer_of(self._identities, context)
        except errors.Refused as e:
            await errors.abort(context, errors.of_call(e))
        if peer is None:
            refused = errors.Refused(
                code_pb2.UNAUTHENTICATED, "it does not know who calls: connect to the socket ending in .id first"
            )
            await errors.abort(context, errors.of_call(refused))
        elif not peer.operator:
            refused = errors.Refused(
                code_pb2.PERMISSION_DENIED,
                f"user {peer.uid} is no operator; operators are root, mfsd's own user and the members of "
                "daemon.operator_group",
            )
            await errors.abort(context, errors.of_call(refused))


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
