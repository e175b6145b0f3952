"""An answer as the protocol's responses: what is new since the last one, as tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trireme.errors import TriremeError
from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.events import Accepted, ChoiceFinished, Delta, Event
from trireme.gateway.oip.prompts import (
    CUMULATIVE_LOGPROB,
    FINISH_REASON,
    LOGPROBS,
    NUM_INPUT_TOKENS,
    NUM_OUTPUT_TOKENS,
    OUTPUTS,
    TEXT_OUTPUT,
    Prompt,
)
from trireme.gateway.oip.tensors import Value, add_output
from trireme.gateway.openai_api.shapes import LEAST_LOGPROB, finish_reason
from trireme.wire.oip.v2 import oip_pb2 as pb

VERSION = "1"
"""There is one version of each model."""
UNFINISHED = "None"
"""As Triton's backends say it."""
FINAL = "triton_final_response"
_SPECS = {spec.name: spec for spec in OUTPUTS}


@dataclass(slots=True)
class _Choice:
    text: str = ""
    finish_reason: str = UNFINISHED
    tokens: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    """Of all tokens so far, not of the new ones only."""


class Responses:
    """Collects one answer's events and makes responses of them."""

    def __init__(
        self, prompt: Prompt, vocabulary: Vocabulary, *, model: str, request_id: str, choices: int
    ) -> None:
        self._prompt = prompt
        self._vocabulary = vocabulary
        self._model = model
        self._request_id = request_id
        self._choices = [_Choice(text=prompt.text if prompt.echo else "") for _ in range(choices)]
        self._prompt_tokens = 0
        self._has_news = False

    def collect(self, event: Event) -> None:
        """Keep what an event brings for the next response.

        Raises:
            RequestCancelled: another call cancelled the request.
        """
        match event:
            case Accepted():
                self._prompt_tokens = event.prompt_tokens
            case Delta():
                choice = self._choices[event.choice]
                choice.text += event.text
                choice.tokens += len(event.token_ids)
                for position in event.logprobs:
                    choice.rows.append(self._row(position))
                    choice.cumulative_logprob += max(position.chosen.logprob, LEAST_LOGPROB)
                self._has_news = True
            case ChoiceFinished():
                self._choices[event.choice].finish_reason = finish_reason(event)
                self._has_news = True

    @property
    def has_news(self) -> bool:
        """Whether a response now would say anything."""
        return self._has_news

    def take(self, *, final: bool | None = None) -> pb.ModelInferResponse:
        """The response with all that is new.

        Args:
            final: whether it is a stream's last one for this request; None: it is not of a stream.
        """
        response = pb.ModelInferResponse(model_name=self._model, model_version=VERSION, id=self._request_id)
        if final is not None:
            response.parameters[FINAL].bool_param = final
        if not (final and self._prompt.empty_final and not self._has_news):
            for name in self._prompt.outputs:
                add_output(response, _SPECS[name], _READERS[name](self))
        for choice in self._choices:
            choice.text, choice.tokens, choice.rows = "", 0, []
        self._has_news = False
        return response

    def texts(self) -> list[Value]:
        return [choice.text.encode() for choice in self._choices]

    def finish_reasons(self) -> list[Value]:
        return [choice.finish_reason.encode() for choice in self._choices]

    def cumulative_logprobs(self) -> list[Value]:
        return [choice.cumulative_logprob for choice in self._choices]

    def logprobs(self) -> list[Value]:
        return [json.dumps(choice.rows).encode() for choice in self._choices]

    def input_tokens(self) -> list[Value]:
        return [self._prompt_tokens]

    def output_tokens(self) -> list[Value]:
        return [choice.tokens for choice in self._choices]

    def _row(self, position: Any) -> dict[str, Any]:
        """One position: the likeliest tokens and the chosen one by id; a rank where it is known."""
        ranked = list(enumerate(position.top, 1))
        if all(token.token_id != position.chosen.token_id for _, token in ranked):
            ranked.append((0, position.chosen))
        return {
            str(token.token_id): {
                "logprob": max(token.logprob, LEAST_LOGPROB),
                "rank": rank or None,
                "decoded_token": self._vocabulary.piece(token.token_id)[0],
            }
            for rank, token in ranked
        }


_READERS: dict[str, Callable[[Responses], list[Value]]] = {
    TEXT_OUTPUT.name: Responses.texts,
    FINISH_REASON.name: Responses.finish_reasons,
    CUMULATIVE_LOGPROB.name: Responses.cumulative_logprobs,
    LOGPROBS.name: Responses.logprobs,
    NUM_INPUT_TOKENS.name: Responses.input_tokens,
    NUM_OUTPUT_TOKENS.name: Responses.output_tokens,
}


def failure(request_id: str, error: TriremeError) -> pb.ModelStreamInferResponse:
    """How a stream says that one of its requests failed."""
    response = pb.ModelInferResponse(id=request_id)
    response.parameters[FINAL].bool_param = True
    response.parameters["error_code"].string_param = error.code
    if error.retry_after_s is not None:
        response.parameters["retry_after_ms"].int64_param = int(error.retry_after_s * 1000)
    return pb.ModelStreamInferResponse(error_message=error.message, infer_response=response)
