"""`inference.GRPCInferenceService`. Decode, hand over, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version

from trireme.errors import InvalidRequest, ModelNotFound, TriremeError
from trireme.gateway.answer import Answer
from trireme.gateway.events import Summary
from trireme.gateway.generation import Generation
from trireme.gateway.grpc_calls import ClientWatch, caller_of, counted
from trireme.gateway.models import ServedModel
from trireme.gateway.oip.prompts import INPUTS, OUTPUTS, TEXT_INPUT, Prompt, read_prompt
from trireme.gateway.oip.responses import VERSION, Responses, failure
from trireme.gateway.oip.tensors import SHOWN_CHARACTERS, TensorSpec
from trireme.gateway.openai_api.sampling import slo_class
from trireme.gateway.readiness import fleet_answers
from trireme.gateway.submission import Caller, generation
from trireme.gateway.worker_links import WorkerLinks
from trireme.runtime.serving import Context
from trireme.wire.oip.v2 import oip_pb2 as pb
from trireme.wire.oip.v2 import oip_pb2_grpc as rpc

SERVICE_NAME = "inference.GRPCInferenceService"
NAME = "trireme"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "sequence")
"""Triton's names for what is answered beyond the protocol itself."""
MAX_ID_CHARACTERS = 1024
MAX_STREAM_REQUESTS = 64
"""Requests of one stream that are answered at once; the next are read when one has ended."""


class OpenInferenceServicer(rpc.GRPCInferenceServiceServicer):
    """What clients of KServe and Triton call."""

    def __init__(self, core: Generation, links: WorkerLinks, *, stall_s: float) -> None:
        self._core = core
        self._links = links
        self._watch = ClientWatch(stall_s)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=fleet_answers(self._links).healthy)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        model = self._model(request.name, request.version)
        names = {model.name} | {m.name for m in self._core.catalog.all() if m.variant_of == model.name}
        return pb.ModelReadyResponse(ready=bool(names & self._links.served_variants()))

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=NAME, version=version("trireme"), extensions=EXTENSIONS)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        def described(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
            return pb.ModelMetadataResponse.TensorMetadata(
                name=spec.name, datatype=spec.datatype, shape=[spec.length]
            )

        return pb.ModelMetadataResponse(
            name=self._model(request.name, request.version).name,
            versions=[VERSION],
            platform=NAME,
            inputs=map(described, INPUTS),
            outputs=map(described, OUTPUTS),
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        config = pb.ModelConfig(
            name=self._model(request.name, request.version).name,
            platform=NAME,
            backend=NAME,
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        for spec in INPUTS:
            config.input.add(
                name=spec.name,
                data_type=_data_type(spec),
                dims=[spec.length],
                optional=spec is not TEXT_INPUT,
            )
        for spec in OUTPUTS:
            config.output.add(name=spec.name, data_type=_data_type(spec), dims=[spec.length])
        return pb.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        with counted(self._core.metrics, "oip_infer"):
            prompt = self._prompt(request)
            if prompt.stream:
                raise InvalidRequest("one response cannot stream: call ModelStreamInfer", param="stream")
            answer, responses = await self._asked(request, prompt, context)
            with closing(answer):
                answer.hear_only_the_end()
                while not answer.delivered:
                    for event in await answer.news():
                        responses.collect(event)
            return responses.take()

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        stream = _Stream(self, request_iterator, context)
        # Were it left to this generator's end, a client that is gone would be answered a while longer.
        context.add_done_callback(lambda _: stream.close())  # type: ignore[arg-type]
        try:
            async for response in stream.responses():
                with self._watch.taking(context, *stream.answers):
                    yield response
        finally:
            stream.close()

    async def answer_one(self, request: pb.ModelInferRequest, context: Context, stream: _Stream) -> None:
        """Answer one request of a stream; what is wrong with it is said on the stream, which goes on."""
        try:
            with counted(self._core.metrics, "oip_stream_infer"):
                prompt = self._prompt(request)
                answer, responses = await self._asked(request, prompt, context)
                stream.answers.add(answer)
                try:
                    if not prompt.stream:
                        answer.hear_only_the_end()
                    final = False
                    while not final:
                        for event in await answer.news():
                            responses.collect(event)
                            final = isinstance(event, Summary)
                        if final or (prompt.stream and responses.has_news):
                            response = responses.take(final=final)
                            await stream.put(pb.ModelStreamInferResponse(infer_response=response))
                finally:
                    stream.answers.discard(answer)
                    answer.close()
        except TriremeError as error:
            await stream.put(failure(request.id[:MAX_ID_CHARACTERS], error))

    def _prompt(self, request: pb.ModelInferRequest) -> Prompt:
        self._model(request.model_name, request.model_version)
        if len(request.id) > MAX_ID_CHARACTERS:
            raise InvalidRequest(f"id has more than {MAX_ID_CHARACTERS} characters", param="id")
        return read_prompt(request, self._core.limits)

    async def _asked(
        self, request: pb.ModelInferRequest, prompt: Prompt, context: Context
    ) -> tuple[Answer, Responses]:
        model = self._core.catalog.find(request.model_name)
        submission = generation(
            self._caller(context, prompt),
            model,
            await model.tokenize(prompt.text, param=TEXT_INPUT.name),
            prompt.sampling,
            self._core.limits,
            prompt_param=TEXT_INPUT.name,
        )
        answer = await self._core.submit(submission)
        responses = Responses(
            prompt,
            model.vocabulary,
            model=request.model_name,
            request_id=request.id,
            choices=submission.sampling.n,
        )
        return answer, responses

    def _caller(self, context: Context, prompt: Prompt) -> Caller:
        caller = caller_of(
            context,
            slo_class=slo_class(prompt.service_tier, None),
            priority=prompt.priority,
            session_id=prompt.session_id,
        )
        deadlines = [at for at in (caller.deadline_unix_s, prompt.deadline_unix_s) if at]
        return replace(caller, deadline_unix_s=min(deadlines, default=0.0))

    def _model(self, name: str, wanted: str) -> ServedModel:
        model = self._core.catalog.find(name)
        if wanted not in ("", VERSION):
            raise ModelNotFound(
                f"{model.name} has the version {VERSION!r} alone, not {wanted[:SHOWN_CHARACTERS]!r}",
                param="model_version",
            )
        return model


class _Stream:
    """The requests of one ModelStreamInfer call, answered side by side."""

    def __init__(
        self,
        servicer: OpenInferenceServicer,
        requests: AsyncIterator[pb.ModelInferRequest],
        context: Context,
    ) -> None:
        self.answers: set[Answer] = set()
        """Those that are under way."""
        self._servicer = servicer
        self._requests = requests
        self._context = context
        # One response waits at most: a client that is slow to read gets more text in each.
        self._out: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(maxsize=1)
        self._reading: asyncio.Task[None] | None = None
        self._broken: TriremeError | None = None

    async def responses(self) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """All responses, in the order in which they come about.

        Raises:
            InvalidRequest: something came that is no request; those before it are answered.
        """
        self._reading = asyncio.create_task(self._read())
        while (response := await self._out.get()) is not None:
            yield response
        await self._reading
        if self._broken is not None:
            raise self._broken

    async def put(self, response: pb.ModelStreamInferResponse) -> None:
        """Hand over a response once the one before it is taken."""
        await self._out.put(response)

    def close(self) -> None:
        """Stop reading and end what is under way; closing twice is harmless."""
        if self._reading is not None:
            self._reading.cancel()
        for answer in list(self.answers):
            answer.close()

    async def _read(self) -> None:
        places = asyncio.Semaphore(MAX_STREAM_REQUESTS)

        async def one(request: pb.ModelInferRequest) -> None:
            try:
                await self._servicer.answer_one(request, self._context, self)
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await places.acquire()
                    async for request in self._requests:
                        tasks.create_task(one(request))
                        await places.acquire()
                except TriremeError as error:
                    self._broken = error
        except ExceptionGroup:
            await self._out.put(None)
            raise
        await self._out.put(None)


def _data_type(spec: TensorSpec) -> pb.DataType.ValueType:
    return pb.DataType.Value("TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}")
