"""What a ModelInferRequest asks of a language model.

The names are those of Triton's backends for language models: `text_input`, `stream` and
`sampling_parameters` (a JSON object), or a tensor for each common parameter. Parameters of the
request count as sampling, too, by the names that /v1/completions has for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from trireme.errors import InvalidRequest
from trireme.gateway.limits import Limits
from trireme.gateway.oip.tensors import SHOWN_CHARACTERS, TensorSpec, Value, read_inputs
from trireme.gateway.openai_api.bodies import CompletionBody, parse
from trireme.gateway.openai_api.sampling import completion_sampling
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters
from trireme.wire.oip.v2 import oip_pb2 as pb

TEXT_INPUT = TensorSpec("text_input", "BYTES")
STREAM = TensorSpec("stream", "BOOL")
EXCLUDE_INPUT = TensorSpec("exclude_input_in_output", "BOOL")
SAMPLING = TensorSpec("sampling_parameters", "BYTES")
STOP_WORDS = TensorSpec("stop_words", "BYTES", -1)

TEXT_OUTPUT = TensorSpec("text_output", "BYTES", -1)
FINISH_REASON = TensorSpec("finish_reason", "BYTES", -1)
CUMULATIVE_LOGPROB = TensorSpec("cumulative_logprob", "FP32", -1)
LOGPROBS = TensorSpec("logprobs", "BYTES", -1)
NUM_INPUT_TOKENS = TensorSpec("num_input_tokens", "UINT32")
NUM_OUTPUT_TOKENS = TensorSpec("num_output_tokens", "UINT32", -1)
OUTPUTS = (
    TEXT_OUTPUT,
    FINISH_REASON,
    CUMULATIVE_LOGPROB,
    LOGPROBS,
    NUM_INPUT_TOKENS,
    NUM_OUTPUT_TOKENS,
)

_RETURNS = {TensorSpec(f"return_{spec.name}", "BOOL"): spec.name for spec in OUTPUTS[1:]}
"""The inputs that ask for an output."""
_NUMBERS = {
    TensorSpec("max_tokens", "INT32"): "max_tokens",
    TensorSpec("min_tokens", "INT32"): "min_tokens",
    TensorSpec("temperature", "FP32"): "temperature",
    TensorSpec("top_p", "FP32"): "top_p",
    TensorSpec("top_k", "INT32"): "top_k",
    TensorSpec("min_p", "FP32"): "min_p",
    TensorSpec("random_seed", "UINT64"): "seed",
    TensorSpec("repetition_penalty", "FP32"): "repetition_penalty",
    TensorSpec("presence_penalty", "FP32"): "presence_penalty",
    TensorSpec("frequency_penalty", "FP32"): "frequency_penalty",
}
"""The inputs that are one sampling parameter each, and its name in a body."""
INPUTS = (TEXT_INPUT, STREAM, EXCLUDE_INPUT, SAMPLING, STOP_WORDS, *_NUMBERS, *_RETURNS)

_NOT_SAMPLING = {"model", "prompt", "stream", "stream_options", "echo", "user"}
_SAMPLING_FIELDS = CompletionBody.model_fields.keys() - _NOT_SAMPLING
_TEXTS = {"stop", "service_tier", "context_overflow"}
"""Sampling fields whose value may be a text; in the others a text is a number in quotes."""
_SEEN_ELSEWHERE = {
    "timeout",
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "triton_enable_empty_final_response",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request, understood."""

    text: str
    stream: bool
    echo: bool
    """The answer begins with the prompt."""
    outputs: tuple[str, ...]
    """Names of the wanted outputs, in order."""
    sampling: SamplingParameters
    service_tier: str | None
    priority: int
    session_id: str
    deadline_unix_s: float
    """0: none."""
    empty_final: bool
    """The last response of a stream may have no outputs."""


def read_prompt(request: pb.ModelInferRequest, limits: Limits) -> Prompt:
    """Check a request and say what it asks.

    Raises:
        InvalidRequest: names the tensor or parameter at fault.
    """
    values = read_inputs(request, INPUTS, most_elements=limits.max_stop_strings)
    parameters = {key: _plain(key, value) for key, value in request.parameters.items()}
    if TEXT_INPUT.name not in values:
        raise InvalidRequest("text_input is missing: give a prompt", param="text_input")
    stream = _one(values, STREAM) is True
    asked = [output for spec, output in _RETURNS.items() if _one(values, spec) is True]
    outputs = _wanted(request, asked)
    body = _body(values, parameters)
    sampling = completion_sampling(body)
    if not sampling.HasField("logprobs") and {LOGPROBS.name, CUMULATIVE_LOGPROB.name} & set(outputs):
        sampling.logprobs = 0
    excluded = _one(values, EXCLUDE_INPUT)
    if stream and excluded is False:
        raise InvalidRequest(
            "a stream has no prompt in its output: leave exclude_input_in_output out",
            param=EXCLUDE_INPUT.name,
        )
    return Prompt(
        text=_text(values, TEXT_INPUT),
        stream=stream,
        echo=not (stream or excluded),
        outputs=outputs,
        sampling=sampling,
        service_tier=body.service_tier,
        priority=body.priority or 0,
        session_id=_session(parameters),
        deadline_unix_s=_deadline(parameters),
        empty_final=_flag(parameters, "triton_enable_empty_final_response"),
    )


def _wanted(request: pb.ModelInferRequest, asked: list[str]) -> tuple[str, ...]:
    known = [spec.name for spec in OUTPUTS]
    if len(request.outputs) > len(known):
        raise InvalidRequest(f"outputs: at most {len(known)} can be asked for", param="outputs")
    for wanted in request.outputs:
        if wanted.name not in known:
            raise InvalidRequest(
                f"there is no output {wanted.name[:SHOWN_CHARACTERS]!r}; there are {', '.join(known)}",
                param="outputs",
            )
        for parameter in wanted.parameters:
            raise InvalidRequest(
                f"{wanted.name}: the parameter {parameter[:SHOWN_CHARACTERS]!r} is not supported",
                param="outputs",
            )
    if not request.outputs:
        return (TEXT_OUTPUT.name, *asked)
    names = tuple(wanted.name for wanted in request.outputs)
    if len(set(names)) < len(names):
        raise InvalidRequest("outputs: an output is asked for twice", param="outputs")
    return names


def _body(values: Mapping[str, list[Value]], parameters: Mapping[str, Any]) -> CompletionBody:
    """The request's sampling as a body of /v1/completions, whose rules it shares."""
    fields: dict[str, Any] = {}
    for name, value in parameters.items():
        if name in _SEEN_ELSEWHERE:
            continue
        if name == "priority":
            raise InvalidRequest("priority: say it in sampling_parameters, or by service_tier", param=name)
        if name not in _SAMPLING_FIELDS:
            raise InvalidRequest(
                f"the parameter {name[:SHOWN_CHARACTERS]!r} is not supported", param="parameters"
            )
        fields[name] = _unquoted(name, value)
    if SAMPLING.name in values:
        try:
            given = from_json(_text(values, SAMPLING), allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequest("sampling_parameters is not valid JSON", param=SAMPLING.name) from error
        if not isinstance(given, dict):
            raise InvalidRequest("sampling_parameters must be a JSON object", param=SAMPLING.name)
        for name, value in given.items():
            if name not in _SAMPLING_FIELDS:
                raise InvalidRequest(
                    f"sampling_parameters: {name[:SHOWN_CHARACTERS]!r} is not known", param=SAMPLING.name
                )
            _put(fields, name, _unquoted(name, value))
    for spec, name in _NUMBERS.items():
        number = _one(values, spec)
        if number is not None:
            _put(fields, name, number)
    if STOP_WORDS.name in values:
        _put(fields, "stop", [_decoded(STOP_WORDS.name, word) for word in values[STOP_WORDS.name]])
    seed = fields.get("seed")
    if isinstance(seed, int) and 2**63 <= seed < 2**64:
        fields["seed"] = seed - 2**64  # Bodies have it signed.
    return parse(CompletionBody, json.dumps({"model": "", "prompt": "", **fields}).encode())


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in fields:
        raise InvalidRequest(f"{name} is given twice", param=name)
    fields[name] = value


def _unquoted(name: str, value: Any) -> Any:
    """Triton's own examples write numbers as texts."""
    if not isinstance(value, str) or name in _TEXTS:
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError:
        return value


def _plain(name: str, parameter: pb.InferParameter) -> Any:
    which = parameter.WhichOneof("parameter_choice")
    if which is None:
        raise InvalidRequest(
            f"the parameter {name[:SHOWN_CHARACTERS]!r} has no value of a known type", param="parameters"
        )
    return getattr(parameter, which)


def _session(parameters: Mapping[str, Any]) -> str:
    """Requests of one sequence share a session, so that their KV is found again."""
    for name in ("sequence_start", "sequence_end"):
        _flag(parameters, name)
    sequence = parameters.get("sequence_id", 0)
    if isinstance(sequence, str):
        return sequence
    if isinstance(sequence, bool) or not isinstance(sequence, int):
        raise InvalidRequest("sequence_id must be a whole number or a text", param="sequence_id")
    return f"sequence-{sequence}" if sequence else ""


def _deadline(parameters: Mapping[str, Any]) -> float:
    timeout_us = parameters.get("timeout", 0)
    if isinstance(timeout_us, bool) or not isinstance(timeout_us, int) or timeout_us < 0:
        raise InvalidRequest("timeout must be a number of microseconds", param="timeout")
    return time.time() + timeout_us / 1e6 if timeout_us else 0.0


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return value


def _one(values: Mapping[str, list[Value]], spec: TensorSpec) -> Value | None:
    found = values.get(spec.name)
    return None if found is None else found[0]


def _text(values: Mapping[str, list[Value]], spec: TensorSpec) -> str:
    return _decoded(spec.name, values[spec.name][0])


def _decoded(name: str, value: Value) -> str:
    assert isinstance(value, bytes)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not valid UTF-8 at byte {error.start}", param=name) from error
