"""From a gRPC status back to the typed error that the server raised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from trireme import errors
from trireme.errors import TriremeError

_BY_CODE: dict[str, type[TriremeError]] = {
    value.code: value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, TriremeError) and value is not TriremeError
}
_BY_STATUS: dict[grpc.StatusCode, type[TriremeError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.InvalidApiKey,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.RequestNotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.RequestConflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.ServiceUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
}
_TRANSPORT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
)
"""What a broken connection looks like; a server of the fleet also names its error in the metadata."""


def error_from(status: grpc.StatusCode, message: str, metadata: Mapping[str, str]) -> TriremeError:
    """The error behind a status that ended a call."""
    error_class = _BY_CODE.get(metadata.get("trireme-error-code", ""))
    if error_class is None:
        error_class = _BY_STATUS.get(status, errors.RequestFailed)
    after_ms = metadata.get("retry-after-ms", "")
    return error_class(
        message or status.name,
        param=metadata.get("trireme-error-param"),
        retry_after_s=int(after_ms) / 1000 if after_ms.isdigit() else None,
    )


def is_resumable(status: grpc.StatusCode, metadata: Mapping[str, str]) -> bool:
    """Whether another gateway may go on: this one is away, or leaves, and did not refuse."""
    code = metadata.get("trireme-error-code")
    if code is not None:
        return code == errors.ServiceUnavailable.code
    return status in _TRANSPORT


def told(failure: Any) -> tuple[TriremeError, bool]:
    """The error behind a failed call (grpc.RpcError of either kind), and whether it may be resumed."""
    metadata = metadata_of(failure.trailing_metadata())
    error = error_from(failure.code(), failure.details() or "", metadata)
    return error, is_resumable(failure.code(), metadata)


def cut_off() -> TriremeError:
    """What a stream that ended without its Summary means."""
    return errors.ServiceUnavailable("the stream ended before the answer did")


def metadata_of(pairs: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Trailing metadata as a mapping; binary entries are left out."""
    return {key: value for key, value in pairs or () if isinstance(value, str)}
