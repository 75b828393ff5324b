# SPDX-License-Identifier: Apache-2.0
"""Errors as gRPC's error model wants them: a google.rpc.Status whose BadRequest details name the field.

https://cloud.google.com/apis/design/errors describes the model; ``grpc-status-details-bin`` carries it on the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    import grpc

    from mfsd.model import HintError


def violation(code: int, field: str, problem: str, fix: str = "") -> Any:
    """A google.rpc.Status with one field violation. ``code`` is a google.rpc.Code."""
    description = f"{problem}; {fix}" if fix else problem
    status = status_pb2.Status(code=code, message=f"{field}: {description}")
    details = error_details_pb2.BadRequest()
    details.field_violations.add(field=field, description=description)
    status.details.add().Pack(details)
    return status


def of_hint(error: HintError, field: str = "") -> Any:
    """The google.rpc.Status of a HintError; ``field`` replaces the error's own path."""
    code = code_pb2.RESOURCE_EXHAUSTED if error.exhausted else code_pb2.INVALID_ARGUMENT
    return violation(code, field or error.field, error.problem, error.fix)


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: Any) -> NoReturn:
    """End a call with a google.rpc.Status, details included. Raises what grpc.aio uses to end the handler."""
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
    raise AssertionError("abort returned")  # it always raises, but its stub does not say so
