"""The HTTP API against bodies, headers and connections that nobody should send: refused, never a crash."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trireme.bus.connection import Keys
from trireme.bus.request_records import Admission, AdmissionResult, TenantBounds
from trireme.gateway.admission import AdmissionControl
from trireme.gateway.generation import Generation
from trireme.gateway.metrics import Metrics
from trireme.gateway.models import ModelCatalog, load_catalog
from trireme.gateway.openai_api.app import openai_server
from trireme.gateway.openai_api.bodies import ChatBody, CompletionBody
from trireme.gateway.request_table import RequestTable
from trireme.gateway.request_traces import RequestTraces
from trireme.gateway.settings import Settings
from trireme.runtime.fleet import Slo, load_fleet
from trireme.runtime.health import HealthReporter
from trireme.runtime.spans import NoSpans
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, ProcessRecord

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
FLEET = f"""
name: test
models: {{py: {{variants: {{py-1m: {{checkpoint: {CHECKPOINT}}}}}}}}}
workers: [{{name: w}}]
"""
CHAT = {"model": "py", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "py", "prompt": "x"}


class FullRecords:
    """A fleet in which too many requests wait: a request that gets so far is one that was understood."""

    def __init__(self) -> None:
        self.admitted: list[AdmittedRequest] = []

    async def admit(
        self, request: AdmittedRequest, *, max_waiting: int, bounds: TenantBounds
    ) -> AdmissionResult:
        request.SerializeToString()
        self.admitted.append(request)
        return AdmissionResult(Admission.FULL, None, "", max_waiting)


class NoLinks:
    scanned_s = None

    def living(self, service: str) -> list[ProcessRecord]:
        return []

    def served_variants(self) -> set[str]:
        return {"py-1m"}


@dataclass
class Server:
    url: str
    records: FullRecords
    http: aiohttp.ClientSession
    metrics: Metrics

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=raw, headers=headers) as response:
            return response.status, json.loads(await response.read())

    async def raw(self, sent: bytes, *, until: bytes = b"") -> bytes:
        """Send bytes on a connection of their own; what comes back until it is closed, or until a mark."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(sent)
            async with asyncio.timeout(60):
                return await (reader.readuntil(until) if until else reader.read())
        finally:
            writer.close()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> ModelCatalog:
    file = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    file.write_text(FLEET)
    return load_catalog(load_fleet(file))


@asynccontextmanager
async def serving(catalog: ModelCatalog, **changes: Any) -> AsyncIterator[Server]:
    chosen = Settings(fleet=Path("none"), http_listen="127.0.0.1:0", trust_tenant_header=True, **changes)
    records, metrics, links = FullRecords(), Metrics(), NoLinks()
    table = RequestTable(links, metrics, on_lost=lambda *_: None, on_unknown=lambda *_: None)  # type: ignore[arg-type]
    core = Generation(
        settings=chosen,
        gateway_id="g",
        fleet_name="test",
        catalog=catalog,
        records=records,  # type: ignore[arg-type]
        links=links,  # type: ignore[arg-type]
        table=table,
        recovery=None,  # type: ignore[arg-type]
        metrics=metrics,
        traces=RequestTraces(NoSpans(), keep=4),
        admission=AdmissionControl(
            None,  # type: ignore[arg-type]  # nobody looks at the queue
            Keys("test"),
            records=records,  # type: ignore[arg-type]
            links=links,  # type: ignore[arg-type]
            catalog=catalog,
            slo=Slo(),
            max_waiting=chosen.max_waiting,
            retry_after_s=chosen.retry_after_s,
            metrics=metrics,
        ),
    )
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(
            openai_server(chosen, core, links, HealthReporter({}))  # type: ignore[arg-type]
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield Server(f"http://{address}", records, http, metrics)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["none", "auto", "text", "user", "py", "", "\ud800", "<|end|>", 0, 1, -1, 2**31, 2**63])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["type", "text", "5"]), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [*ChatBody.model_fields, *CompletionBody.model_fields, "tools", "tool_choice", "modalities", "foo"]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"])},
        optional={"content": VALUES | st.text(max_size=20), "name": VALUES, "refusal": VALUES, "x": VALUES},
    ),
    max_size=3,
)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES,
        "prompt": st.lists(st.lists(st.integers(-2, 2**33), max_size=3), max_size=3) | st.text(max_size=20),
        "n": st.integers(-1, 20),
        "logprobs": st.booleans() | st.integers(),
        "logit_bias": st.dictionaries(st.integers().map(str), st.floats(), max_size=3),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
        "seed": st.integers(),
        "temperature": st.floats(),
        "repetition_penalty": st.floats(),
    },
)


async def test_whatever_a_body_says_it_is_understood_or_refused_by_name(catalog: ModelCatalog) -> None:
    """Several hundred bodies: each is a call that reaches the fleet (which is full), or a 4xx."""
    loop = asyncio.get_running_loop()
    async with serving(catalog) as server:

        def ask(path: str, raw: bytes) -> tuple[int, dict[str, Any]]:
            return asyncio.run_coroutine_threadsafe(server.post(path, raw), loop).result(20)

        @settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(
            base=st.sampled_from([CHAT, TEXT]),
            likely=LIKELY,
            change=st.dictionaries(FIELDS, VALUES, max_size=2),
        )
        def bodies(base: dict[str, Any], likely: dict[str, Any], change: dict[str, Any]) -> None:
            path = "/v1/chat/completions" if base is CHAT else "/v1/completions"
            other = "prompt" if base is CHAT else "messages"
            likely.pop(other, None)
            body = {**base, **likely, **change}
            status, answer = ask(path, json.dumps(body).encode())
            assert status in (400, 404, 429), (body, status, answer)
            assert set(answer["error"]) == {"message", "type", "param", "code"}

        @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(base=st.sampled_from([CHAT, TEXT]), data=st.data())
        def torn(base: dict[str, Any], data: st.DataObject) -> None:
            raw = bytearray(json.dumps(base).encode())
            for _ in range(data.draw(st.integers(1, 4))):
                position = data.draw(st.integers(0, len(raw)))
                raw[position : position + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=6))
            path = "/v1/chat/completions" if base is CHAT else "/v1/completions"
            status, answer = ask(path, bytes(raw))
            assert status in (400, 404, 429), (bytes(raw), status, answer)

        await asyncio.to_thread(bodies)
        await asyncio.to_thread(torn)
        assert server.records.admitted  # Some got through, or this would show little.


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("x-request-id", "\u00ff", 400),
        ("x-request-id", "i" * 129, 400),
        ("x-request-id", "fine/one", 429),
        ("x-trireme-session", "a b", 400),
        ("x-trireme-session", "s" * 4000, 400),
        ("x-trireme-tenant", "\u00e9", 400),
        ("x-trireme-tenant", "t" * 129, 400),
        ("x-trireme-slo-class", "\u00ff", 400),
    ],
)
async def test_names_in_headers_are_checked(
    catalog: ModelCatalog, name: str, value: str, status: int
) -> None:
    async with serving(catalog) as server:
        body = json.dumps(CHAT).encode()
        answer = await server.raw(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
            + name.encode() + b": " + value.encode("latin-1") + b"\r\n"
            + b"content-length: %d\r\n\r\n" % len(body) + body
        )  # fmt: skip
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert head.split()[1] == str(status).encode(), answer
        if status == 400:
            assert json.loads(rest)["error"]["param"] == name


async def test_a_malformed_trace_context_is_ignored_as_its_standard_says(catalog: ModelCatalog) -> None:
    async with serving(catalog) as server:
        good = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
        for header in ("x" * 9000, good):
            await server.post("/v1/chat/completions", CHAT, traceparent=header)
        first, second = server.records.admitted
        assert (first.traceparent, second.traceparent) == ("", good)


async def test_a_cache_key_of_any_text_becomes_a_name(catalog: ModelCatalog) -> None:
    async with serving(catalog) as server:
        for key in ("talk-1", "é \n" * 5000, "é \n" * 5000, None):
            await server.post("/v1/chat/completions", {**CHAT, "prompt_cache_key": key})
        names = [request.session_id for request in server.records.admitted]
        assert names[0] == "talk-1" and names[1] == names[2] and names[3] == ""
        assert names[1].isascii() and len(names[1]) < 64


@pytest.mark.parametrize(
    "sent",
    [
        b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\nhello",
        b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        b"content-encoding: deflate\r\ncontent-length: 5\r\n\r\nhello",
    ],
)
async def test_a_body_that_is_not_what_its_headers_say_is_the_clients_fault(
    catalog: ModelCatalog, sent: bytes
) -> None:
    async with serving(catalog) as server:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
        assert (await server.raw(head + sent)).split()[1] == b"400"


async def test_a_small_body_cannot_unpack_into_a_large_one(catalog: ModelCatalog) -> None:
    async with serving(catalog, max_body_bytes=2**20) as server:
        packed = gzip.compress(b" " * 2**26)
        headers = {"content-encoding": "gzip"}
        async with server.http.post(
            server.url + "/v1/chat/completions", data=packed, headers=headers
        ) as response:
            assert response.status == 413


async def test_slow_clients_are_let_go(catalog: ModelCatalog) -> None:
    async with serving(catalog, body_s=0.2, idle_s=0.2) as server:
        assert await server.raw(b"") == b""
        assert await server.raw(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nx-slow") == b""
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\n"
        answer = await server.raw(head + b'{"model"', until=b"}}")
        assert answer.split()[1] == b"408" and b'"error"' in answer


async def test_a_flood_of_connections_is_refused_at_the_door(catalog: ModelCatalog) -> None:
    async with serving(catalog, max_connections=3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        await asyncio.sleep(0.05)
        async with server.http.get(server.url + "/v1/models") as response:
            assert response.status == 429 and int(response.headers["retry-after"]) > 0
            assert (await response.json())["error"]["type"] == "rate_limit_error"
        refused = {"reason": "connections"}
        assert server.metrics.registry.get_sample_value("trireme_gateway_refused_total", refused) == 1
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(60):  # It learns a moment later that they are gone.
            while True:
                async with server.http.get(server.url + "/v1/models") as response:
                    if response.status == 200:
                        break
                await asyncio.sleep(0.01)


async def test_made_up_paths_leave_nothing_behind(catalog: ModelCatalog) -> None:
    async with serving(catalog) as server:
        for number in range(20):
            await server.post(f"/v1/{number}", {})
            async with server.http.get(f"{server.url}/v1/models/m{number}") as response:
                assert response.status == 404
        labels = {
            sample.labels["api"]
            for family in server.metrics.registry.collect()
            for sample in family.samples
            if "api" in sample.labels
        }
        assert labels == {"http_unknown", "http_v1_models_{name}"}


async def test_a_method_that_a_path_does_not_take_names_those_it_takes(catalog: ModelCatalog) -> None:
    async with serving(catalog) as server:
        for method, path, allowed in (
            ("OPTIONS", "/v1/chat/completions", "POST"),
            ("DELETE", "/v1/models", "GET,HEAD"),
        ):
            async with server.http.request(method, server.url + path) as response:
                assert (response.status, response.headers["allow"]) == (405, allowed)
                assert (await response.json())["error"]["type"] == "invalid_request_error"
        async with server.http.head(server.url + "/v1/models") as response:
            assert (response.status, await response.read()) == (200, b"")
