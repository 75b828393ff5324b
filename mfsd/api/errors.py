# SPDX-License-Identifier: Apache-2.0
"""Errors as gRPC's error model wants them: a google.rpc.Status whose BadRequest details name the field.

https://cloud.google.com/apis/design/errors describes the model; ``grpc-status-details-bin`` carries it on the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    import grpc

    from mfsd.ground.model import HintError


SHOWN: Final = 300
"""Characters of a field, of what is wrong with it, and of what to do about it; gRPC makes up to 12 bytes of one."""


class Refused(Exception):  # noqa: N818 - it is no error of ours
    """A call that this peer may not make; ``code`` is a google.rpc.Code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def _cut(text: str) -> str:
    """What a caller wrote may be in it, of any length; gRPC loses a status whose metadata have more than 16 KiB."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"


def _violation(code: int, field: str, problem: str, fix: str = "") -> Any:
    """A google.rpc.Status with one field violation. ``code`` is a google.rpc.Code."""
    field, problem, fix = _cut(field), _cut(problem), _cut(fix)
    description = f"{problem}; {fix}" if fix else problem
    status = status_pb2.Status(code=code, message=f"{field}: {description}")
    details = error_details_pb2.BadRequest()
    details.field_violations.add(field=field, description=description)
    status.details.add().Pack(details)
    return status


def rejection(error: HintError, field: str = "") -> pb.Error:
    """Why a single hint is not taken; ``field`` replaces the error's own path."""
    return _as_error(_of_hint(error, field or error.field))


def failure(field: str) -> pb.Error:
    """A hint that we have tripped over."""
    return _as_error(_violation(code_pb2.INTERNAL, field, "mfsd failed; see its log"))


def _of_hint(error: HintError, field: str) -> Any:
    code = code_pb2.RESOURCE_EXHAUSTED if error.exhausted else code_pb2.INVALID_ARGUMENT
    return _violation(code, field, error.problem, error.fix)


def _as_error(status: Any) -> pb.Error:
    return pb.Error(code=status.code, message=status.message, details=status.details)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: HintError | Refused) -> NoReturn:
    """End a call that fails as a whole, with details. Raises what grpc.aio uses to end the handler."""
    if isinstance(error, Refused):
        status: Any = status_pb2.Status(code=error.code, message=_cut(str(error)))
    else:
        status = _of_hint(error, error.field)
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
    raise AssertionError("abort returned")  # it always raises, but its stub does not say so
