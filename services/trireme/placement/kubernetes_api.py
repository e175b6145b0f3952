"""The few calls to the Kubernetes API that placement makes, through the official client.

Answers are the API's own JSON. What goes wrong is one of `ApiProblem`; while the API asks to be
left alone (429, or 503 with Retry-After) nothing is sent at all.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from trireme.errors import InvalidConfiguration
from trireme.runtime.clock import Clock

JsonObject = dict[str, Any]

FIELD_MANAGER = "trireme-placement"
CALL_TIMEOUT_S = 5.0
PAGE_OBJECTS = 500
MAX_RETRY_AFTER_S = 60.0
"""A server that asks for more is asked again after so long."""
MAX_ANSWER_BYTES = 64 * 2**20
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiProblem(Exception):
    """A call did not do what was asked for; the message is one phrase."""


class ApiAway(ApiProblem):
    """It could not be reached, took too long, or failed itself."""


class ApiThrottled(ApiProblem):
    """It asks to be called later."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ApiExpired(ApiProblem):
    """It does not remember so old a version: list again."""


class ApiConflict(ApiProblem):
    """Someone else changed the object, or owns the field."""


class ApiMissing(ApiProblem):
    """There is no such object."""


class ApiRefused(ApiProblem):
    """It does not allow the call, or does not understand it."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One line of a watch."""

    kind: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    found: JsonObject


class KubernetesApi:
    """Calls within one namespace."""

    def __init__(self, api_client: client.ApiClient, namespace: str, clock: Clock) -> None:
        self._apps = client.AppsV1Api(api_client)
        self._core = client.CoreV1Api(api_client)
        self._coordination = client.CoordinationV1Api(api_client)
        self._namespace = namespace
        self._clock = clock
        self._not_before_s = 0.0

    async def list_deployments(self, selector: str) -> tuple[list[JsonObject], str]:
        """All Deployments that a label selector finds, and the version that they are of."""
        return await self._list(self._apps.list_namespaced_deployment_without_preload_content, selector)

    async def list_pods(self, selector: str) -> tuple[list[JsonObject], str]:
        """All Pods that a label selector finds, and the version that they are of."""
        return await self._list(self._core.list_namespaced_pod_without_preload_content, selector)

    def watch_deployments(self, selector: str, version: str, *, watch_s: int) -> AsyncIterator[WatchEvent]:
        """Changes after `version`, until the server ends the watch after `watch_s`.

        Raises:
            ApiExpired: `version` is too old.
            ApiProblem: the watch broke.
        """
        call = self._apps.list_namespaced_deployment_without_preload_content
        return self._watch(call, selector, version, watch_s)

    def watch_pods(self, selector: str, version: str, *, watch_s: int) -> AsyncIterator[WatchEvent]:
        """As `watch_deployments`."""
        return self._watch(self._core.list_namespaced_pod_without_preload_content, selector, version, watch_s)

    async def apply_replicas(
        self, deployment: str, replicas: int, *, force: bool, version: str | None = None
    ) -> None:
        """Own the number of replicas of a Deployment, and nothing else of it.

        It is server-side apply to the scale subresource, so that no more than its patching need
        be allowed.

        Args:
            deployment: its name.
            replicas: wanted.
            force: take the field from its owners.
            version: refuse where the object is of another version; None: whatever it is.

        Raises:
            ApiConflict: another manager owns the field and `force` is false, or the version differs.
            ApiProblem: otherwise.
        """
        metadata = {"name": deployment, "namespace": self._namespace}
        if version is not None:
            metadata["resourceVersion"] = version
        body = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": metadata,
            "spec": {"replicas": replicas},
        }
        call = self._apps.patch_namespaced_deployment_scale_without_preload_content
        await self._answer(
            lambda: call(
                deployment,
                self._namespace,
                body,
                field_manager=FIELD_MANAGER,
                force=force,
                _content_type="application/apply-patch+yaml",
                _request_timeout=CALL_TIMEOUT_S,
            )
        )

    async def read_lease(self, name: str) -> JsonObject:
        """A Lease; ApiMissing where there is none."""
        call = self._coordination.read_namespaced_lease_without_preload_content
        return await self._answer(lambda: call(name, self._namespace, _request_timeout=CALL_TIMEOUT_S))

    async def create_lease(self, name: str) -> JsonObject:
        """Make a Lease that nobody holds; ApiConflict where there is one already."""
        call = self._coordination.create_namespaced_lease_without_preload_content
        lease = client.V1Lease(
            api_version="coordination.k8s.io/v1", kind="Lease", metadata=client.V1ObjectMeta(name=name)
        )
        return await self._answer(
            lambda: call(self._namespace, lease, field_manager=FIELD_MANAGER, _request_timeout=CALL_TIMEOUT_S)
        )

    async def change_lease(self, name: str, spec: JsonObject, *, version: str) -> JsonObject:
        """Change fields of a Lease; ApiConflict where it is not of that version any more.

        A patch takes times as they are written here; the client's own Lease would write those of
        a whole second without a fraction, which the API refuses.
        """
        call = self._coordination.patch_namespaced_lease_without_preload_content
        body = {"metadata": {"resourceVersion": version}, "spec": spec}
        return await self._answer(
            lambda: call(
                name,
                self._namespace,
                body,
                field_manager=FIELD_MANAGER,
                _content_type="application/merge-patch+json",
                _request_timeout=CALL_TIMEOUT_S,
            )
        )

    async def _list(self, call: Callable[..., Awaitable[Any]], selector: str) -> tuple[list[JsonObject], str]:
        found: list[JsonObject] = []
        more: str | None = None
        while True:
            page = await self._answer(
                partial(
                    call,
                    self._namespace,
                    label_selector=selector,
                    limit=PAGE_OBJECTS,
                    _continue=more,
                    _request_timeout=CALL_TIMEOUT_S,
                )
            )
            metadata = page.get("metadata", {})
            found += page.get("items") or []
            more = metadata.get("continue") or None
            if more is None:
                return found, str(metadata.get("resourceVersion", ""))

    async def _watch(
        self, call: Callable[..., Awaitable[Any]], selector: str, version: str, watch_s: int
    ) -> AsyncIterator[WatchEvent]:
        with _as_problems():
            response = await self._send(
                lambda: call(
                    self._namespace,
                    label_selector=selector,
                    resource_version=version,
                    allow_watch_bookmarks=True,
                    watch=True,
                    timeout_seconds=watch_s,
                    # A connection that died without a word ends here.
                    _request_timeout=watch_s + CALL_TIMEOUT_S,
                )
            )
        try:
            if response.status >= 300:
                with _as_problems():
                    await self._checked(response)
            # Nothing has changed, but it answers.
            yield WatchEvent("OPENED", {})
            while True:
                with _as_problems():
                    line = await response.content.readline()
                if not line:
                    return
                yield _event(line)
        finally:
            response.close()

    async def _answer(self, call: Callable[[], Awaitable[Any]]) -> JsonObject:
        with _as_problems():
            response = await self._send(call)
            try:
                return await self._checked(response)
            finally:
                response.release()

    async def _send(self, call: Callable[[], Awaitable[Any]]) -> aiohttp.ClientResponse:
        left_s = self._not_before_s - self._clock.monotonic_s()
        if left_s > 0:
            raise ApiThrottled("the API asked to be called later", retry_after_s=left_s)
        response: aiohttp.ClientResponse = await call()
        return response

    async def _checked(self, response: aiohttp.ClientResponse) -> JsonObject:
        """The answer's JSON, or what it says is wrong."""
        body = await response.content.read(MAX_ANSWER_BYTES)
        while not response.content.at_eof() and len(body) < MAX_ANSWER_BYTES:
            body += await response.content.read(MAX_ANSWER_BYTES - len(body))
        retry_after_s = _seconds(response.headers.get("Retry-After"))
        if response.status == 429 or (response.status == 503 and retry_after_s is not None):
            wait_s = min(retry_after_s if retry_after_s is not None else 1.0, MAX_RETRY_AFTER_S)
            self._not_before_s = self._clock.monotonic_s() + wait_s
            raise ApiThrottled(f"status {response.status}", retry_after_s=wait_s)
        if response.status >= 300:
            raise _problem(response.status, _message(body))
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise ApiAway("it answered what is not JSON") from error
        if not isinstance(answer, dict):
            raise ApiAway("it answered what is no object")
        return answer


class _as_problems:
    """Turns what the client raises into `ApiProblem`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TimeoutError):
            raise ApiAway("it did not answer in time") from error
        # ValueError: a line or a header that is longer than the client reads.
        if isinstance(error, (aiohttp.ClientError, OSError, ValueError, client.ApiException)):
            raise ApiAway(f"{type(error).__name__}: {error}") from error
        if isinstance(error, config.ConfigException):
            raise ApiAway(f"the service account's token cannot be read: {error}") from error


def _problem(status: int, message: str) -> ApiProblem:
    text = f"status {status}: {message}"
    if status == 410:
        return ApiExpired(text)
    if status == 409:
        return ApiConflict(message)
    if status == 404:
        return ApiMissing(text)
    if status >= 500 or status in (408, 401):  # 401: a token that ended is read anew within a minute
        return ApiAway(text)
    return ApiRefused(text)


def _message(body: bytes) -> str:
    try:
        status = json.loads(body)
        return str(status["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return "no explanation"


def _event(line: bytes) -> WatchEvent:
    try:
        event = json.loads(line)
        kind, found = event["type"], event["object"]
        if kind == "ERROR":
            problem = _problem(int(found["code"]), str(found.get("message")))
        else:
            problem = None
            assert found["metadata"]["resourceVersion"]
            assert kind == "BOOKMARK" or found["metadata"]["name"]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ApiAway("a watch sent what is no event") from error
    if problem is not None:
        raise problem
    return WatchEvent(kind, found)


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; None where it is absent or a date."""
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None


@asynccontextmanager
async def open_kubernetes(
    kubeconfig: Path | None, namespace: str, clock: Clock
) -> AsyncIterator[KubernetesApi]:
    """The API that a kubeconfig names, or this pod's own.

    Args:
        kubeconfig: its path; None: the pod's service account.
        namespace: empty: the pod's own.
        clock: for Retry-After.

    Raises:
        InvalidConfiguration: neither is there, or the kubeconfig is wrong.
    """
    configuration = client.Configuration()
    try:
        if kubeconfig is not None:
            await config.load_kube_config(  # type: ignore[no-untyped-call]
                str(kubeconfig), client_configuration=configuration
            )
        else:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as error:
        raise InvalidConfiguration(
            f"no way to the Kubernetes API: {error}; run in a pod, or set TRIREME_PLACEMENT_KUBECONFIG",
            param="TRIREME_PLACEMENT_KUBECONFIG",
        ) from error
    namespace = namespace or _own_namespace()
    async with client.ApiClient(configuration) as api_client:
        api_client.user_agent = FIELD_MANAGER
        yield KubernetesApi(api_client, namespace, clock)


def _own_namespace() -> str:
    try:
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidConfiguration(
            "which namespace? Set TRIREME_PLACEMENT_NAMESPACE", param="TRIREME_PLACEMENT_NAMESPACE"
        ) from error
