"""What Triton's own client sees of a gateway, as JSON: `python -m tests.service.triton_client ADDRESS`.

A process of its own: the client brings its own copy of the protocol's messages, and one process
takes the messages of one package from one file only.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

HANG_TOKENS = 7
"""A request for so many tokens is answered with the first two only."""


def tensor(name: str, values: Any, dtype: Any = np.object_, datatype: str = "") -> triton.InferInput:
    array = np.array(values, dtype=dtype)
    made = triton.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def asking(text: str = "x", **tensors: tuple[Any, Any]) -> list[triton.InferInput]:
    others = [tensor(name, value, dtype) for name, (value, dtype) in tensors.items()]
    return [tensor("text_input", [text.encode()]), *others]


def outputs(result: Any) -> dict[str, Any]:
    response = result.get_response()
    found: dict[str, Any] = {"id": response.id}
    for output in response.outputs:
        values = result.as_numpy(output.name).tolist()
        found[output.name] = [value.decode() if isinstance(value, bytes) else value for value in values]
    if "triton_final_response" in response.parameters:
        found["final"] = response.parameters["triton_final_response"].bool_param
    return found


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return "not refused"


def blocking(address: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with triton.InferenceServerClient(address) as client:
        seen["live"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("py")]
        seen["server"] = client.get_server_metadata(as_json=True)
        metadata = client.get_model_metadata("py", as_json=True)
        seen["inputs"] = {t["name"]: [t["datatype"], t["shape"]] for t in metadata["inputs"]}
        seen["outputs"] = [t["name"] for t in metadata["outputs"]]
        config = client.get_model_config("py", as_json=True)["config"]
        seen["config"] = [config["name"], config["model_transaction_policy"], len(config["input"])]
        tokens = {"max_tokens": ([32], np.int32)}
        seen["whole"] = outputs(client.infer("py", asking(**tokens), request_id="r1"))
        without = {"exclude_input_in_output": ([True], np.bool_), **tokens}
        returns = ("finish_reason", "num_input_tokens", "num_output_tokens", "logprobs", "cumulative_logprob")
        everything = {f"return_{name}": ([True], np.bool_) for name in returns}
        seen["all"] = outputs(client.infer("py", asking(**without, **everything)))
        wanted = [triton.InferRequestedOutput(name) for name in ("num_output_tokens", "text_output")]
        parameters = {"sampling_parameters": ([b'{"n": 2, "max_tokens": "32", "stop": ["zz"]}'], np.object_)}
        seen["two"] = outputs(client.infer("py", asking("é", **parameters), outputs=wanted))
        seen["by_parameter"] = outputs(
            client.infer("py", asking(), parameters={"max_tokens": 32, "temperature": 0.5}, sequence_id=9)
        )
        shaped = tensor("text_input", [[b"x"]])
        seen["matrix"] = outputs(client.infer("py", [shaped, *asking(**tokens)[1:]]))["text_output"]
        x = asking()
        infer = client.infer
        long = np.array([b"a" * 2_000_000], dtype=np.object_)
        huge = np.zeros(20 * 2**20, dtype=np.bool_)
        seen["refused"] = {
            "model": refused(lambda: infer("none", x)),
            "version": refused(lambda: infer("py", x, model_version="2")),
            "metadata": refused(lambda: client.get_model_metadata("none")),
            "ready": refused(lambda: client.is_model_ready("none")),
            "no_text": refused(lambda: infer("py", asking(stream=([False], np.bool_))[1:])),
            "dtype": refused(lambda: infer("py", asking(max_tokens=([1.5], np.float32)))),
            "shape": refused(lambda: infer("py", [tensor("text_input", [b"a", b"b"])])),
            "empty": refused(lambda: infer("py", [tensor("text_input", np.empty((0,), np.object_))])),
            "unknown": refused(lambda: infer("py", asking(image=([b"i"], np.object_)))),
            "twice": refused(lambda: infer("py", [*x, *x])),
            "range": refused(lambda: infer("py", asking(temperature=([9.0], np.float32)))),
            "not_utf8": refused(lambda: infer("py", [tensor("text_input", [b"\xff"])])),
            "json": refused(lambda: infer("py", asking(sampling_parameters=([b"[" * 9999], np.object_)))),
            "field": refused(lambda: infer("py", asking(sampling_parameters=([b'{"q": 1}'], np.object_)))),
            "parameter": refused(lambda: infer("py", x, parameters={"q": 1})),
            "priority": refused(lambda: infer("py", x, priority=3)),
            "output": refused(lambda: infer("py", x, outputs=[triton.InferRequestedOutput("q")])),
            "streaming": refused(lambda: infer("py", asking(stream=([True], np.bool_)))),
            "long": refused(lambda: infer("py", [tensor("text_input", long)])),
            "huge": refused(lambda: infer("py", [*x, tensor("stream", huge, np.bool_)])),
            "deadline": refused(
                lambda: infer("py", asking(max_tokens=([HANG_TOKENS], np.int32)), timeout=500_000)
            ),
        }
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        streaming = {"stream": ([True], np.bool_), "return_finish_reason": ([True], np.bool_), **tokens}
        client.async_stream_infer("py", asking(**streaming), request_id="s")
        client.async_stream_infer("none", asking(**streaming), request_id="bad")
        client.async_stream_infer("py", asking(**tokens), request_id="w", enable_empty_final_response=True)
        seen["stream"], finals = [], 0
        while finals < 3:
            result, error = answers.get(timeout=60)
            found = {"id": "bad", "error": error.message()} if error else outputs(result)
            finals += bool(error or found["final"])
            seen["stream"].append(found)
        client.stop_stream()
        call = client.async_infer(
            "py", asking(max_tokens=([HANG_TOKENS], np.int32)), lambda result, error: answers.put(error)
        )
        seen["cancelling"] = call.cancel() is not False
        seen["cancelled"] = str(answers.get(timeout=60).status())
    return seen


async def streaming(address: str) -> dict[str, Any]:
    """A stream that the client leaves in the middle, by the asynchronous client."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        tensors = {"stream": ([True], np.bool_), "max_tokens": ([HANG_TOKENS], np.int32)}
        for number in range(3):
            yield {"model_name": "py", "inputs": asking(**tensors), "request_id": str(number)}
        await asyncio.Event().wait()

    async with triton_aio.InferenceServerClient(address) as client:
        stream = client.stream_infer(requests())
        ids = set()
        async for result, error in stream:
            assert error is None, error
            ids.add(result.get_response().id)
            if len(ids) == 3:
                break
        stream.cancel()
    return {"ids": sorted(ids)}


if __name__ == "__main__":
    print(json.dumps({**blocking(sys.argv[1]), "aio": asyncio.run(streaming(sys.argv[1]))}))
