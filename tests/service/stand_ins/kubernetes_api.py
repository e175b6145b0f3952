"""A Kubernetes API server's part that placement talks to, over real HTTP.

Lists with pages, watches with bookmarks and 410, server-side apply to the scale subresource with
field managers and conflicts, Leases with optimistic locking, RBAC, and faults: errors, throttling,
connections that break or say nothing, a server that is gone. A small controller keeps as many
ready pods as a Deployment asks for.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

Json = dict[str, Any]
NAMESPACE = "serving"
KINDS = {"deployments": "Deployment", "pods": "Pod", "leases": "Lease"}
GROUPS = {"deployments": "apps", "pods": "", "leases": "coordination.k8s.io"}


class Status(Exception):
    """An answer of kind Status."""

    def __init__(self, code: int, reason: str, message: str, *, causes: list[Json] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
            "details": {"causes": causes or []},
        }


@dataclass(slots=True)
class Call:
    """One request, as it came."""

    verb: str
    resource: str
    """`deployments`, `deployments/scale`, ..."""
    name: str
    query: dict[str, str]
    body: Json | None


@dataclass
class Cluster:
    """What the API server stores; every method is one transaction."""

    version: int = 100
    oldest: int = 100
    """Changes up to here are forgotten."""
    objects: dict[tuple[str, str], Json] = field(default_factory=dict)
    history: list[tuple[int, str, str, Json]] = field(default_factory=list)
    """(version, resource, event, object), oldest first."""
    pods_made: int = 0

    def put(self, resource: str, found: Json, event: str = "MODIFIED") -> Json:
        """Store an object under a new version."""
        name = found["metadata"]["name"]
        event = "ADDED" if (resource, name) not in self.objects else event
        self.version += 1
        found = copy.deepcopy(found)
        found["metadata"]["resourceVersion"] = str(self.version)
        found.setdefault("kind", KINDS[resource])
        self.objects[resource, name] = found
        self.history.append((self.version, resource, event, found))
        return found

    def remove(self, resource: str, name: str) -> None:
        found = copy.deepcopy(self.objects.pop((resource, name)))
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, resource, "DELETED", found))

    def forget(self) -> None:
        """Compact: who asks for a change before now must list again."""
        self.oldest = self.version
        self.history.clear()

    def get(self, resource: str, name: str) -> Json:
        try:
            return self.objects[resource, name]
        except KeyError:
            raise Status(404, "NotFound", f'{resource} "{name}" not found') from None

    def find(self, resource: str, selector: str) -> list[Json]:
        found = [each for (kind, _), each in sorted(self.objects.items()) if kind == resource]
        return [each for each in found if selected(each, selector)]

    def install(self, name: str, labels: dict[str, str], *, replicas: int = 1, manager: str = "helm") -> None:
        """A Deployment, as a client that is no applier makes it: it owns the defaults, too."""
        deployment = {
            "apiVersion": "apps/v1",
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "labels": labels,
                "managedFields": [
                    {
                        "manager": manager,
                        "operation": "Update",
                        "apiVersion": "apps/v1",
                        "fieldsType": "FieldsV1",
                        "fieldsV1": {"f:spec": {"f:replicas": {}, "f:template": {}}},
                    }
                ],
            },
            "spec": {"replicas": replicas},
        }
        self.put("deployments", deployment)
        self._control(name)

    def replicas(self, name: str) -> int:
        return int(self.get("deployments", name)["spec"]["replicas"])

    def owners(self, name: str) -> list[tuple[str, str, str]]:
        """(manager, operation, subresource) of those who own the number of replicas."""
        fields = self.get("deployments", name)["metadata"]["managedFields"]
        return [_identity(entry) for entry in fields if _owns(entry)]

    def update_replicas(self, name: str, replicas: int, *, manager: str) -> None:
        """As an autoscaler does through the scale subresource: an update asks nobody."""
        deployment = copy.deepcopy(self.get("deployments", name))
        if deployment["spec"]["replicas"] == replicas:
            return
        _disown(deployment, but=None)
        _own(deployment, (manager, "Update", "scale"))
        deployment["spec"]["replicas"] = replicas
        self.put("deployments", deployment)
        self._control(name)

    def apply_replicas(
        self, name: str, replicas: int, *, manager: str, force: bool, version: str | None
    ) -> Json:
        """Server-side apply to the scale subresource.

        Raises:
            Status: 409, where another owns the number and it would change, or the version differs.
        """
        deployment = copy.deepcopy(self.get("deployments", name))
        if version is not None and version != deployment["metadata"]["resourceVersion"]:
            raise Status(409, "Conflict", f'Operation cannot be fulfilled on deployments "{name}": changed')
        me = (manager, "Apply", "scale")
        others = [owner for owner in self.owners(name) if owner != me]
        changes = deployment["spec"]["replicas"] != replicas
        if changes and others and not force:
            texts = [_told(owner) for owner in others]
            raise Status(
                409,
                "Conflict",
                f"Apply failed with {len(texts)} conflict: "
                + ", ".join(f"{t}: .spec.replicas" for t in texts),
                causes=[
                    {"reason": "FieldManagerConflict", "message": text, "field": ".spec.replicas"}
                    for text in texts
                ],
            )
        if changes and others:
            _disown(deployment, but=me)
        if changes or me not in self.owners(name):
            _own(deployment, me)
            deployment["spec"]["replicas"] = replicas
            deployment = self.put("deployments", deployment)
            self._control(name)
        metadata = {"name": name, "resourceVersion": deployment["metadata"]["resourceVersion"]}
        return {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": metadata,
            "spec": {"replicas": replicas},
        }

    def patch_lease(self, name: str, patch: Json) -> Json:
        """JSON merge patch with its precondition."""
        lease = copy.deepcopy(self.get("leases", name))
        wanted = patch.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != lease["metadata"]["resourceVersion"]:
            raise Status(409, "Conflict", f'Operation cannot be fulfilled on leases "{name}": changed')
        spec = {**(lease.get("spec") or {}), **(patch.get("spec") or {})}
        lease["spec"] = {key: value for key, value in spec.items() if value is not None}
        return self.put("leases", lease)

    def create(self, resource: str, found: Json) -> Json:
        name = found["metadata"]["name"]
        if (resource, name) in self.objects:
            raise Status(409, "AlreadyExists", f'{resource} "{name}" already exists')
        return self.put(resource, found)

    def _control(self, name: str) -> None:
        """What the Deployment's controller, the scheduler and kubelets do, at once."""
        deployment = self.get("deployments", name)
        mine = [each for each in self.find("pods", "") if each["metadata"]["name"].startswith(name + "-")]
        wanted = deployment["spec"]["replicas"]
        for pod in mine[wanted:]:
            self.remove("pods", pod["metadata"]["name"])
        for _ in range(wanted - len(mine)):
            self.pods_made += 1
            started = "2026-01-01T00:00:00Z"
            self.put(
                "pods",
                {
                    "apiVersion": "v1",
                    "metadata": {
                        "name": f"{name}-{self.pods_made:05d}",
                        "labels": deployment["metadata"]["labels"],
                        "creationTimestamp": started,
                    },
                    "status": {
                        "conditions": [{"type": "Ready", "status": "True"}],
                        "containerStatuses": [
                            {
                                "name": "worker",
                                "restartCount": 0,
                                "state": {"running": {"startedAt": started}},
                            }
                        ],
                    },
                },
            )


def selected(found: Json, selector: str) -> bool:
    """Whether `a=b,c=d` finds an object."""
    labels = found["metadata"].get("labels") or {}
    pairs = [part.split("=", 1) for part in selector.split(",") if part]
    return all(labels.get(key) == value for key, value in pairs)


def _identity(entry: Json) -> tuple[str, str, str]:
    return entry["manager"], entry["operation"], entry.get("subresource", "")


def _owns(entry: Json) -> bool:
    return "f:replicas" in entry["fieldsV1"].get("f:spec", {})


def _disown(deployment: Json, *, but: tuple[str, str, str] | None) -> None:
    for entry in deployment["metadata"]["managedFields"]:
        if _identity(entry) != but:
            entry["fieldsV1"].get("f:spec", {}).pop("f:replicas", None)


def _own(deployment: Json, who: tuple[str, str, str]) -> None:
    fields = deployment["metadata"]["managedFields"]
    fields[:] = [entry for entry in fields if _identity(entry) != who]
    manager, operation, subresource = who
    fields.append(
        {
            "manager": manager,
            "operation": operation,
            "subresource": subresource,
            "apiVersion": "apps/v1",
            "fieldsType": "FieldsV1",
            "fieldsV1": {"f:spec": {"f:replicas": {}}},
        }
    )


def _told(owner: tuple[str, str, str]) -> str:
    manager, operation, subresource = owner
    text = f'conflict with "{manager}"'
    if subresource:
        text += f' with subresource "{subresource}"'
    return text + (" using apps/v1" if operation == "Update" else "")


Fault = Callable[[Call], "Status | str | None"]
"""What happens to a call: a Status is answered; `abort` breaks the connection, `hang` never answers,
`throttle SECONDS` is 429, `garbage` is no JSON; None: nothing."""


class ApiServer:
    """The cluster behind HTTP; it may be stopped and started again on its port."""

    def __init__(self, cluster: Cluster, port: int, *, rules: list[Json] | None = None) -> None:
        """`rules`: those of a Role, which alone are allowed; None: everything is."""
        self.cluster = cluster
        self.calls: list[Call] = []
        self.fault: Fault = lambda call: None
        self.refused: list[str] = []
        """Calls that the rules did not allow."""
        self.bookmark_s = 0.2
        self._port = port
        self._rules = rules
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()

    async def stop(self) -> None:
        """Gone: connections are refused, watches end in the middle."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    def changed(self) -> None:
        """The cluster was changed from outside: watches look."""
        self._changed.set()
        self._changed = asyncio.Event()

    def kubeconfig(self, path: Path) -> Path:
        """A file that leads here."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": "of-placement"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            call = await _parse(request)
            self.calls.append(call)
            trouble = self.fault(call)
            if isinstance(trouble, Status):
                raise trouble
            if trouble is not None:
                return await _trouble(request, trouble)
            self._authorize(request, call)
            if call.verb == "watch":
                return await self._watch(request, call)
            before = self.cluster.version
            answer = self._answer(request, call)
            if self.cluster.version != before:
                self.changed()
            return web.json_response(answer)
        except Status as status:
            return web.json_response(status.body, status=status.code)
        except ConnectionResetError:
            return web.Response()  # who asked went away

    def _authorize(self, request: web.Request, call: Call) -> None:
        if request.headers.get("Authorization") != "Bearer of-placement":
            raise Status(401, "Unauthorized", "Unauthorized")
        if self._rules is None:
            return
        group = GROUPS[call.resource.partition("/")[0]]
        for rule in self._rules:
            names = rule.get("resourceNames")
            if (
                group in rule["apiGroups"]
                and call.resource in rule["resources"]
                and call.verb in rule["verbs"]
                and (not names or call.name in names)
            ):
                return
        self.refused.append(f"{call.verb} {call.resource} {call.name}")
        raise Status(403, "Forbidden", f"cannot {call.verb} {call.resource} {call.name}")

    def _answer(self, request: web.Request, call: Call) -> Json:
        cluster = self.cluster
        match call.verb, call.resource:
            case "list", resource:
                return self._list(resource, call.query)
            case "get", resource:
                return cluster.get(resource, call.name)
            case "create", "leases":
                assert call.body is not None
                return cluster.create("leases", {**call.body, "metadata": dict(call.body["metadata"])})
            case "patch", "leases":
                _expect(request, "application/merge-patch+json")
                assert call.body is not None
                return cluster.patch_lease(call.name, call.body)
            case "patch", "deployments/scale":
                _expect(request, "application/apply-patch+yaml")
                body = call.body or {}
                if (body.get("apiVersion"), body.get("kind")) != ("autoscaling/v1", "Scale"):
                    raise Status(400, "BadRequest", "no autoscaling/v1 Scale")
                if set(body) - {"apiVersion", "kind", "metadata", "spec"} or set(body["spec"]) != {
                    "replicas"
                }:
                    raise Status(400, "BadRequest", "strict decoding error: unknown field")
                if not call.query.get("fieldManager"):
                    raise Status(422, "Invalid", "fieldManager: Required value: is required for apply patch")
                return cluster.apply_replicas(
                    call.name,
                    body["spec"]["replicas"],
                    manager=call.query["fieldManager"],
                    force=call.query.get("force", "").lower() == "true",
                    version=body["metadata"].get("resourceVersion"),
                )
        raise Status(405, "MethodNotAllowed", f"{call.verb} {call.resource}")

    def _list(self, resource: str, query: dict[str, str]) -> Json:
        found = self.cluster.find(resource, query.get("labelSelector", ""))
        first = int(query.get("continue", "0"))
        last = first + int(query.get("limit", "0") or 10**9)
        metadata = {"resourceVersion": str(self.cluster.version)}
        if last < len(found):
            metadata["continue"] = str(last)
        return {"kind": KINDS[resource] + "List", "metadata": metadata, "items": found[first:last]}

    async def _watch(self, request: web.Request, call: Call) -> web.StreamResponse:
        cluster, query = self.cluster, call.query
        seen = int(query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        loop = asyncio.get_running_loop()
        end_s = loop.time() + int(query.get("timeoutSeconds", "1800"))
        await response.prepare(request)

        async def send(kind: str, found: Json) -> None:
            await response.write(json.dumps({"type": kind, "object": found}).encode() + b"\n")

        while (left_s := end_s - loop.time()) > 0:
            if seen < cluster.oldest:
                await send("ERROR", Status(410, "Expired", f"too old resource version: {seen}").body)
                break
            changed = self._changed
            for version, resource, event, found in list(cluster.history):
                if version <= seen:
                    continue
                seen = version
                if resource == call.resource and selected(found, query.get("labelSelector", "")):
                    await send(event, found)
            trouble = self.fault(Call("watching", call.resource, "", query, None))
            if isinstance(trouble, Status):
                await send("ERROR", trouble.body)
                break
            if trouble == "abort" and request.transport is not None:
                request.transport.abort()
                break
            if query.get("allowWatchBookmarks") == "true":
                await send(
                    "BOOKMARK", {"kind": KINDS[call.resource], "metadata": {"resourceVersion": str(seen)}}
                )
            try:
                async with asyncio.timeout(min(left_s, self.bookmark_s)):
                    await changed.wait()
            except TimeoutError:
                continue
        return response


async def _parse(request: web.Request) -> Call:
    words = [word for word in request.path.split("/") if word]
    # /api/v1/namespaces/NS/pods..., /apis/GROUP/VERSION/namespaces/NS/deployments/NAME/scale
    rest = words[words.index("namespaces") + 1 :] if "namespaces" in words else []
    if len(rest) < 2 or rest[0] != NAMESPACE or rest[1] not in KINDS:
        raise Status(404, "NotFound", f"no such path: {request.path}")
    resource, name = rest[1], rest[2] if len(rest) > 2 else ""
    if len(rest) > 3:
        resource += "/" + rest[3]
    query = dict(request.query)
    verb = {"GET": "get" if name else "list", "POST": "create", "PATCH": "patch", "PUT": "update"}.get(
        request.method, request.method.lower()
    )
    if verb == "list" and query.get("watch") == "true":
        verb = "watch"
    text = await request.text()
    return Call(verb, resource, name, query, json.loads(text) if text else None)


def _expect(request: web.Request, content_type: str) -> None:
    if request.content_type != content_type:
        raise Status(415, "UnsupportedMediaType", f"not {content_type}: {request.content_type}")


async def _trouble(request: web.Request, kind: str) -> web.StreamResponse:
    match kind.split():
        case ["abort"]:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        case ["hang"]:
            await asyncio.sleep(3600)
            return web.Response()
        case ["throttle", seconds]:
            return web.json_response(
                Status(429, "TooManyRequests", "slow down").body,
                status=429,
                headers={"Retry-After": seconds},
            )
        case ["garbage"]:
            return web.Response(text="<html>a proxy's page</html>")
    raise AssertionError(kind)


def storm(rng: random.Random, share: float) -> Fault:
    """Every kind of trouble, for a share of the calls."""

    def fault(call: Call) -> Status | str | None:
        if rng.random() >= share:
            return None
        if call.verb == "watching":
            return rng.choice(["abort", Status(410, "Expired", "too old"), Status(500, "InternalError", "x")])
        return rng.choice(
            [
                Status(500, "InternalError", "etcdserver: leader changed"),
                Status(503, "ServiceUnavailable", "starting"),
                Status(409, "Conflict", "the object has been modified"),
                Status(410, "Expired", "the resource version is too old"),
                Status(401, "Unauthorized", "the token ended"),
                "abort",
                "garbage",
                "throttle 0.2",
            ]
        )

    return fault


@asynccontextmanager
async def api_server(
    cluster: Cluster, port: int, *, rules: list[Json] | None = None
) -> AsyncIterator[ApiServer]:
    """A server in this event loop."""
    server = ApiServer(cluster, port, rules=rules)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class ServerThread:
    """A server in a thread of its own, for tests that wait for processes."""

    def __init__(self, server: ApiServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self._loop = loop

    def do(self, action: Callable[[], Any]) -> Any:
        """Run `action` as one transaction; watches then look."""

        async def act() -> Any:
            result = action()
            self.server.changed()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(timeout=60)


@contextmanager
def api_server_thread(
    cluster: Cluster, port: int, *, rules: list[Json] | None = None
) -> Iterator[ServerThread]:
    """As `api_server`, beside the test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def make() -> ApiServer:
        return ApiServer(cluster, port, rules=rules)

    try:
        running = ServerThread(asyncio.run_coroutine_threadsafe(make(), loop).result(timeout=60), loop)
        running.do(running.server.start)
        try:
            yield running
        finally:
            running.do(running.server.stop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=60)
        loop.close()
