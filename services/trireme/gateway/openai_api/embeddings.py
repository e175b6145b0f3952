"""/v1/embeddings: texts or token ids to vectors."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from trireme.errors import InvalidRequest
from trireme.gateway.generation import Generation
from trireme.gateway.openai_api.bodies import EmbeddingsBody
from trireme.gateway.openai_api.shapes import usage_object
from trireme.gateway.scoring import embed
from trireme.gateway.submission import Caller, new_request_id


async def embeddings_answer(core: Generation, body: EmbeddingsBody, caller: Caller) -> web.Response:
    """The same as a response.

    Raises:
        InvalidRequest, ContextLengthExceeded: names the field to change.
        ModelNotFound: no such model.
    """
    return web.json_response(await embeddings_document(core, body, caller))


async def embeddings_document(core: Generation, body: EmbeddingsBody, caller: Caller) -> dict[str, Any]:
    """One vector per text, in order.

    Raises:
        InvalidRequest, ContextLengthExceeded: names the field to change.
        ModelNotFound: no such model.
    """
    model = core.catalog.find(body.model)
    if body.dimensions is not None:
        raise InvalidRequest(
            "dimensions: vectors are given as long as the model makes them; leave it out", param="dimensions"
        )
    # A retry is a request of its own: the fleet does not keep vectors for those who ask twice.
    fresh = replace(caller, request_id=new_request_id())
    vectors, summaries = await embed(core, fresh, model, _texts(body), param="input")
    usage = usage_object(summaries)
    rows = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if body.encoding_format == "base64" else list(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": rows,
        "model": body.model,
        "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens", "trireme")},
    }


def _texts(body: EmbeddingsBody) -> Sequence[str | Sequence[int]]:
    given = body.input
    if isinstance(given, str):
        return [given]
    ids = [part for part in given if isinstance(part, int)]
    return [ids] if ids else [part for part in given if not isinstance(part, int)]


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
