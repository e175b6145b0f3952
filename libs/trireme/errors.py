"""What callers may handle. One `Kind` each; `runtime/status.py` maps kinds once to gRPC and HTTP.

A message says what was wrong, with numbers, and what to change. `param` names the
request field at fault and `code` is the stable string that clients match on.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Kind(enum.Enum):
    """What the caller can do about an error."""

    INVALID = "invalid"
    """Fix the request."""
    UNAUTHENTICATED = "unauthenticated"
    """Say who you are."""
    FORBIDDEN = "forbidden"
    """Ask for something you may have."""
    NOT_FOUND = "not_found"
    """Name something that exists."""
    CONFLICT = "conflict"
    """It exists already, or in another state."""
    EXHAUSTED = "exhausted"
    """Come back later, or go elsewhere."""
    UNAVAILABLE = "unavailable"
    """Retry: a part of the fleet is away."""
    DEADLINE = "deadline"
    """It took longer than was asked for."""
    CANCELLED = "cancelled"
    """The caller went away or said stop."""
    ABORTED = "aborted"
    """This request cannot be served and must not be replayed (quarantine)."""


class TriremeError(Exception):
    """Base of all errors that a caller may handle. What escapes unnamed is our bug."""

    kind: ClassVar[Kind]
    code: ClassVar[str]

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(TriremeError):
    """A field of the request is malformed or out of range."""

    kind = Kind.INVALID
    code = "invalid_request"


class ContextLengthExceeded(TriremeError):
    """The prompt, or the prompt and the answer asked for, do not fit the model's context."""

    kind = Kind.INVALID
    code = "context_length_exceeded"


class InvalidApiKey(TriremeError):
    """The call has no API key, or none that is known."""

    kind = Kind.UNAUTHENTICATED
    code = "invalid_api_key"


class PermissionDenied(TriremeError):
    """The API key is known and does not open this."""

    kind = Kind.FORBIDDEN
    code = "permission_denied"


class InvalidCheckpoint(TriremeError):
    """A checkpoint's files are missing, malformed or of an unsupported architecture."""

    kind = Kind.INVALID
    code = "invalid_checkpoint"


class InvalidConfiguration(TriremeError):
    """A setting, an environment variable or `fleet.yaml` is malformed."""

    kind = Kind.INVALID
    code = "invalid_configuration"


class ModelNotFound(TriremeError):
    """No model or variant of that name is served here."""

    kind = Kind.NOT_FOUND
    code = "model_not_found"


class RequestNotFound(TriremeError):
    """No request of that id is known: it never was, or its retention ended."""

    kind = Kind.NOT_FOUND
    code = "request_not_found"


class ObjectNotFound(TriremeError):
    """No stored response, file or batch of that id is the caller's: it never was, or its time ended."""

    kind = Kind.NOT_FOUND
    code = "not_found"


class PreviousResponseNotFound(TriremeError):
    """`previous_response_id` names no stored response of the caller's."""

    kind = Kind.INVALID
    code = "previous_response_not_found"


class StorageFull(TriremeError):
    """A tenant's share of what is stored for it is used up."""

    kind = Kind.EXHAUSTED
    code = "storage_quota_exceeded"


class RequestConflict(TriremeError):
    """A request of that id exists with other contents or another owner."""

    kind = Kind.CONFLICT
    code = "request_conflict"


class Overloaded(TriremeError):
    """A bounded queue is full. `retry_after_s` says when to come back."""

    kind = Kind.EXHAUSTED
    code = "rate_limit_exceeded"


class ServiceUnavailable(TriremeError):
    """A needed part of the fleet is not there now."""

    kind = Kind.UNAVAILABLE
    code = "service_unavailable"


class DeadlineExceeded(TriremeError):
    """The request's own deadline passed."""

    kind = Kind.DEADLINE
    code = "deadline_exceeded"


class RequestCancelled(TriremeError):
    """The client cancelled the request."""

    kind = Kind.CANCELLED
    code = "cancelled"


class RequestQuarantined(TriremeError):
    """The request was in flight at too many crashes and is not replayed."""

    kind = Kind.ABORTED
    code = "request_quarantined"


class RequestFailed(TriremeError):
    """The engine failed on this request alone; the others go on."""

    kind = Kind.ABORTED
    code = "request_failed"
