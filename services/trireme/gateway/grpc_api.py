"""The gRPC front end: `trireme.wire.inference.v1.Inference`. Decode, hand over, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

from trireme.errors import InvalidRequest
from trireme.gateway.answer import Answer
from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.events import Accepted, ChoiceFinished, Delta, Event, Paused, Summary
from trireme.gateway.generation import Generation
from trireme.gateway.grpc_calls import ClientWatch, caller_of, counted
from trireme.gateway.identity import current_principal
from trireme.gateway.limits import at_most
from trireme.gateway.models import ServedModel
from trireme.gateway.scoring import classify, embed
from trireme.gateway.submission import Caller, checked_request_id, generation
from trireme.gateway.truncation import CUTTING, overflow_of
from trireme.gateway.worker_links import WorkerLinks
from trireme.runtime.serving import Context
from trireme.wire.inference.v1 import inference_pb2 as pb
from trireme.wire.inference.v1 import inference_pb2_grpc as rpc


class InferenceServicer(rpc.InferenceServicer):
    """What clients call over gRPC."""

    def __init__(self, core: Generation, links: WorkerLinks, *, stall_s: float) -> None:
        self._core = core
        self._links = links
        self._watch = ClientWatch(stall_s)

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        with counted(self._core.metrics, "generate"):
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
            caller = self._caller(
                context, request.request_id, request.slo_class, request.priority, request.session_id
            )
            is_chat = request.WhichOneof("prompt") == "chat"
            submission = generation(
                replace(caller, operation="chat") if is_chat else caller,
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
            try:
                while not answer.delivered:
                    for event in await answer.news():
                        with self._watch.taking(context, answer):
                            yield _response(request_id, event, vocabulary)
            finally:
                answer.close()

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        with counted(self._core.metrics, "classify"):
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
        with counted(self._core.metrics, "embed"):
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
        request_id = checked_request_id(request.request_id)
        cancelled = await self._core.cancel(request_id, tenant=current_principal().tenant)
        return pb.CancelResponse(cancelled=cancelled)

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
        return caller_of(
            context,
            request_id=request_id,
            slo_class=slo_class,
            priority=priority,
            session_id=session_id,
        )


def _close(answer: Answer, _: object) -> None:
    answer.close()


def _messages(request: pb.GenerateRequest) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in request.chat.messages]


def _response(request_id: str, event: Event, vocabulary: Vocabulary) -> pb.GenerateResponse:
    match event:
        case Delta():
            delta = pb.Delta(
                choice=event.choice,
                first_index=event.first_index,
                token_ids=event.token_ids,
                text=event.text,
                logprobs=event.logprobs,
                prompt_logprobs=event.prompt_logprobs,
            )
            for position in (*delta.logprobs, *delta.prompt_logprobs):
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
