"""What both front ends hand to the core: a checked request with nothing left open."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trireme.errors import InvalidRequest
from trireme.gateway.arrivals import arrived_unix_s
from trireme.gateway.limits import (
    Limits,
    answer_tokens,
    check_prompt,
    check_prompt_logprobs,
    check_sampling,
    in_range,
)
from trireme.gateway.models import ServedModel
from trireme.gateway.truncation import Cut, Overflow, cut_prompt
from trireme.wire.bus.v1.facts_pb2 import RequestKind
from trireme.wire.inference.v1.inference_pb2 import (
    SLO_CLASS_STANDARD,
    SLO_CLASS_UNSPECIFIED,
    SamplingParameters,
    SloClass,
)

DEFAULT_TENANT = "default"
MUST_FIT = Overflow()
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_NAME = re.compile(r"[!-~]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, and how."""

    request_id: str
    tenant: str = DEFAULT_TENANT
    slo_class: SloClass.ValueType = SLO_CLASS_UNSPECIFIED
    priority: int = 0
    session_id: str = ""
    deadline_unix_s: float = 0.0
    """0: none."""
    traceparent: str = ""
    operation: str = "text_completion"
    """As OpenTelemetry names it."""
    received_unix_s: float = dataclasses.field(default_factory=arrived_unix_s)
    """When the call came in."""

    @property
    def fleet_id(self) -> str:
        """The request's id in the fleet."""
        return fleet_request_id(self.tenant, self.request_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request as the core takes it."""

    caller: Caller
    model: ServedModel
    kind: RequestKind.ValueType
    prompt_token_ids: list[int]
    """What stays of the prompt where it was cut."""
    sampling: SamplingParameters
    """Resolved: max_tokens, seed, n, temperature, top_p and repetition_penalty are set."""
    continuations: tuple[list[int], ...] = ()
    resume_from: tuple[int, ...] = ()
    constraint_param: str = "constraint"
    """What the API calls the constraint, for errors."""
    cut: Cut | None = None
    """Where prompt and answer may outgrow the context, and the client wants them cut."""
    answer_was_sized: bool = True
    """The client said how long the answer may be."""


def most_tokens(submission: Submission) -> int:
    """Prompt and answer tokens that a request may take."""
    sampling = submission.sampling
    continuations = sum(len(ids) for ids in submission.continuations)
    return len(submission.prompt_token_ids) + continuations + max(1, sampling.n) * sampling.max_tokens


def new_request_id() -> str:
    """Unique."""
    return f"req-{secrets.token_hex(12)}"


def checked_request_id(request_id: str) -> str:
    """The client's id, or a new one for an empty one.

    Raises:
        InvalidRequest: it has other characters than ids may have, or too many.
    """
    if not request_id:
        return new_request_id()
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest(
            "a request id has 1 to 128 letters, digits and . _ : / - and starts with a letter or digit",
            param="request_id",
        )
    return request_id


def fleet_request_id(tenant: str, request_id: str) -> str:
    """A request's id in the fleet: tenants may choose equal ids and never meet.

    No id that a client may send has the sign, so none can name another tenant's request.
    """
    return request_id if tenant == DEFAULT_TENANT else f"{request_id}@{tenant}"


def is_name(text: str) -> bool:
    """Whether sessions, tenants and HTTP calls may be called so: they become keys and headers."""
    return _NAME.fullmatch(text) is not None


def checked_name(text: str, *, param: str) -> str:
    """The name, which may be empty for none.

    Raises:
        InvalidRequest: it is too long or has other characters than names may have.
    """
    if text and not is_name(text):
        raise InvalidRequest(f"{param} must have 1 to 128 visible ASCII characters", param=param)
    return text


def checked_traceparent(text: str) -> str:
    """The W3C trace context; empty for one that is malformed, which the standard says to ignore."""
    return text if _TRACEPARENT.fullmatch(text) else ""


def generation(
    caller: Caller,
    model: ServedModel,
    prompt_token_ids: list[int],
    sampling: SamplingParameters,
    limits: Limits,
    *,
    prompt_param: str = "prompt",
    max_tokens_param: str = "max_tokens",
    logprobs_param: str = "logprobs",
    constraint_param: str = "constraint",
    resume_from: Sequence[int] = (),
    overflow: Overflow = MUST_FIT,
) -> Submission:
    """Check a request for generation and fill in what it leaves open; draws a seed if there is none.

    A prompt that may be cut is cut here.

    Raises:
        InvalidRequest: a field is out of range.
        ContextLengthExceeded: prompt and answer do not fit.
    """
    in_range("priority", caller.priority, -100, 100)
    check_sampling(sampling, model, limits, max_tokens_param=max_tokens_param, logprobs_param=logprobs_param)
    check_prompt(prompt_token_ids, model, limits, param=prompt_param, may_be_cut=overflow.cuts)
    asked = sampling.max_tokens if sampling.HasField("max_tokens") else None
    resolved = SamplingParameters()
    resolved.CopyFrom(sampling)
    check_prompt_logprobs(sampling, len(prompt_token_ids), limits)
    if overflow.cuts and sampling.HasField("prompt_logprobs"):
        raise InvalidRequest(
            "a prompt whose log-probabilities are asked for must fit: leave out context_overflow",
            param="context_overflow",
        )
    cut = cut_prompt(overflow, model, prompt_token_ids, asked, param=prompt_param)
    if cut is not None:
        prompt_token_ids = cut.plan.keep(prompt_token_ids)
    # A prompt that is cut makes room for any answer: what it outgrows is cut while it is written.
    resolved.max_tokens = (
        asked
        if cut is not None and asked is not None
        else answer_tokens(asked, len(prompt_token_ids), model, limits, param=max_tokens_param)
    )
    if resolved.min_tokens > resolved.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {resolved.min_tokens} but the answer may have {resolved.max_tokens} tokens",
            param="min_tokens",
        )
    resolved.n = max(1, sampling.n)
    if len(resume_from) > resolved.n:
        raise InvalidRequest(
            f"resume_from has {len(resume_from)} entries for {resolved.n} choices", param="resume_from"
        )
    if not sampling.HasField("seed"):
        resolved.seed = secrets.randbits(63)
    for field in ("temperature", "top_p", "repetition_penalty"):
        if not sampling.HasField(field):
            setattr(resolved, field, 1.0)
    return Submission(
        caller=with_class(caller),
        model=model,
        kind=RequestKind.REQUEST_KIND_GENERATE,
        prompt_token_ids=prompt_token_ids,
        sampling=resolved,
        resume_from=tuple(resume_from),
        constraint_param=constraint_param,
        cut=cut,
        answer_was_sized=asked is not None,
    )


def with_class(caller: Caller) -> Caller:
    """The caller with its SLO class decided."""
    if caller.slo_class != SLO_CLASS_UNSPECIFIED:
        return caller
    return replace(caller, slo_class=SLO_CLASS_STANDARD)
