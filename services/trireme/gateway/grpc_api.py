"""The gRPC front end: `trireme.wire.inference.v1.Inference`. Decode, hand over, encode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial

import grpc

from trireme.errors import InvalidRequest, TriremeError
from trireme.gateway.answer import Answer
from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.events import Accepted, ChoiceFinished, Delta, Event, Paused, Summary
from trireme.gateway.generation import Generation
from trireme.gateway.limits import at_most
from trireme.gateway.models import ServedModel
from trireme.gateway.scoring import classify, embed
from trireme.gateway.submission import (
    DEFAULT_TENANT,
    Caller,
    checked_name,
    checked_request_id,
    checked_traceparent,
    generation,
)
from trireme.gateway.truncation import CUTTING, overflow_of
from trireme.gateway.worker_links import WorkerLinks
from trireme.runtime.serving import Context
from trireme.wire.inference.v1 import inference_pb2 as pb
from trireme.wire.inference.v1 import inference_pb2_grpc as rpc

MAX_DEADLINE_S = 7 * 24 * 3600.0
"""A gRPC deadline beyond this is none."""


class InferenceServicer(rpc.InferenceServicer):
    """What clients call over gRPC."""

    def __init__(
        self, core: Generation, links: WorkerLinks, *, trust_tenant_header: bool, stall_s: float
    ) -> None:
        self._core = core
        self._links = links
        self._trust_tenant_header = trust_tenant_header
        self._stall_s = stall_s
        self._endings: set[asyncio.Task[None]] = set()

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        with self._counted("generate"):
            model = self._core.catalog.find(request.model)
            prompt = await self._prompt(request, model)
            sampling = request.sampling
            overflow = await overflow_of(
                request.context_overflow,
                request.pinned_tokens if request.HasField("pinned_tokens") else None,
                model,
                prompt,
                _messages(request) if request.WhichOneof("prompt") == "chat" else None,
                sampling.max_tokens if sampling.HasField("max_tokens") else None,
            )
            submission = generation(
                self._caller(
                    context, request.request_id, request.slo_class, request.priority, request.session_id
                ),
                model,
                prompt,
                sampling,
                self._core.limits,
                prompt_param=request.WhichOneof("prompt") or "prompt",
                resume_from=request.resume_from,
                overflow=overflow,
            )
            answer = await self._core.submit(submission)
            context.add_done_callback(partial(_close, answer))  # type: ignore[arg-type]
            request_id, vocabulary = submission.caller.request_id, model.vocabulary
            call_later = asyncio.get_running_loop().call_later
            try:
                while not answer.delivered:
                    for event in await answer.news():
                        stalled = call_later(self._stall_s, self._give_up, context, answer)
                        try:
                            yield _response(request_id, event, vocabulary)
                        finally:
                            stalled.cancel()
            finally:
                answer.close()

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        with self._counted("classify"):
            model = self._core.catalog.find(request.model)
            rows, summary = await classify(
                self._core,
                self._caller(context, "", request.slo_class),
                model,
                text=request.text,
                labels=list(request.labels),
                normalise_length=request.normalise_length,
            )
            return pb.ClassifyResponse(
                scores=[
                    pb.LabelScore(label=row.label, logprob=row.logprob, probability=row.probability)
                    for row in rows
                ],
                usage=_usage(summary),
                variant=summary.variant,
            )

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        with self._counted("embed"):
            model = self._core.catalog.find(request.model)
            vectors, summaries = await embed(
                self._core, self._caller(context, "", request.slo_class), model, list(request.texts)
            )
            usage = pb.Usage()
            for summary in summaries:
                one = _usage(summary)
                for field in pb.Usage.DESCRIPTOR.fields_by_name:
                    setattr(usage, field, getattr(usage, field) + getattr(one, field))
            return pb.EmbedResponse(
                embeddings=[pb.Embedding(values=vector) for vector in vectors],
                usage=usage,
                variant=summaries[-1].variant,
            )

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        served = self._links.served_variants()
        models = self._core.catalog.all()
        ready_models = {model.variant_of for model in models if model.name in served}
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    name=model.name,
                    variant_of=model.variant_of,
                    context_tokens=model.context_tokens,
                    vocabulary_size=model.vocabulary_size,
                    ready=model.name in served or model.name in ready_models,
                    created_unix_s=model.created_unix_s,
                )
                for model in models
            ]
        )

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        if not request.request_id:
            raise InvalidRequest("request_id is empty: name a request", param="request_id")
        return pb.CancelResponse(cancelled=await self._core.cancel(checked_request_id(request.request_id)))

    async def _prompt(self, request: pb.GenerateRequest, model: ServedModel) -> list[int]:
        most = self._core.limits.max_prompt_tokens if request.context_overflow in CUTTING else None
        match request.WhichOneof("prompt"):
            case "text":
                return await model.tokenize(request.text, most_tokens=most)
            case "token_ids":
                return list(request.token_ids.ids)
            case "chat":
                at_most("chat", len(request.chat.messages), self._core.limits.max_messages)
                if not request.chat.messages:
                    raise InvalidRequest("chat has no messages: give at least one", param="chat")
                return await model.tokenize_chat(_messages(request), most_tokens=most)
        raise InvalidRequest("give a prompt: text, token_ids or chat", param="prompt")

    def _caller(
        self,
        context: Context,
        request_id: str,
        slo_class: pb.SloClass.ValueType,
        priority: int = 0,
        session_id: str = "",
    ) -> Caller:
        metadata = _metadata(context)
        tenant = metadata.get("x-trireme-tenant", "") if self._trust_tenant_header else ""
        checked_name(tenant, param="x-trireme-tenant")
        if slo_class not in pb.SloClass.values():
            raise InvalidRequest(f"slo_class {slo_class} is not known", param="slo_class")
        remaining_s = context.time_remaining()
        limited = remaining_s is not None and remaining_s < MAX_DEADLINE_S
        return Caller(
            request_id=checked_request_id(request_id),
            tenant=tenant or DEFAULT_TENANT,
            slo_class=slo_class,
            priority=priority,
            session_id=checked_name(session_id, param="session_id"),
            deadline_unix_s=time.time() + (remaining_s or 0.0) if limited else 0.0,
            traceparent=checked_traceparent(metadata.get("traceparent", "")),
        )

    def _give_up(self, context: Context, answer: Answer) -> None:
        """The client takes nothing: its request ends now, its call once it reads on or goes away."""
        answer.close()
        ending = asyncio.create_task(_end(context))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    @contextmanager
    def _counted(self, call: str) -> Iterator[None]:
        code = "cancelled"  # What leaves neither by return nor by error was cut off.
        try:
            yield
            code = "ok"
        except TriremeError as error:
            code = error.code
            raise
        except Exception:
            code = "internal"
            raise
        finally:
            self._core.metrics.requests.labels(f"grpc_{call}", code).inc()


def _close(answer: Answer, _: object) -> None:
    answer.close()


def _messages(request: pb.GenerateRequest) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in request.chat.messages]


async def _end(context: Context) -> None:
    with suppress(grpc.aio.AbortError):
        await context.abort(grpc.StatusCode.CANCELLED, "the answer was not read for too long")


def _metadata(context: Context) -> Mapping[str, str]:
    pairs = context.invocation_metadata() or ()
    return {str(key): value for key, value in pairs if isinstance(value, str)}


def _response(request_id: str, event: Event, vocabulary: Vocabulary) -> pb.GenerateResponse:
    match event:
        case Delta():
            delta = pb.Delta(
                choice=event.choice,
                first_index=event.first_index,
                token_ids=event.token_ids,
                text=event.text,
                logprobs=event.logprobs,
            )
            for position in delta.logprobs:
                for token in (position.chosen, *position.top):
                    text, token.raw = vocabulary.piece(token.token_id)
                    token.text = "" if "\ufffd" in text else text
            return pb.GenerateResponse(request_id=request_id, delta=delta)
        case Accepted():
            accepted = pb.Accepted(
                prompt_tokens=event.prompt_tokens,
                seed=event.seed,
                attached=event.attached,
                truncated_tokens=event.truncated_tokens,
            )
            return pb.GenerateResponse(request_id=request_id, accepted=accepted)
        case ChoiceFinished():
            finished = pb.ChoiceFinished(
                choice=event.choice, reason=event.reason, stop_string=event.stop_string
            )
            return pb.GenerateResponse(request_id=request_id, choice_finished=finished)
        case Paused():
            return pb.GenerateResponse(request_id=request_id, paused=pb.Paused(reason=event.reason))
        case Summary():
            summary = pb.Summary(
                usage=_usage(event),
                timings=pb.Timings(
                    queue_s=event.queue_s,
                    first_token_s=event.first_token_s,
                    total_s=event.total_s,
                    paused_s=event.paused_s,
                ),
                variant=event.variant,
                worker_id=event.worker_id,
                decision=event.decision,
                attempts=event.attempts,
            )
            return pb.GenerateResponse(request_id=request_id, summary=summary)


def _usage(summary: Summary) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=summary.prompt_tokens,
        cached_prompt_tokens=summary.cached_prompt_tokens,
        completion_tokens=summary.completion_tokens,
        engine_s=summary.engine_s,
        joules=summary.joules,
        grams_co2e=summary.grams_co2e,
        truncated_tokens=summary.truncated_tokens,
    )
