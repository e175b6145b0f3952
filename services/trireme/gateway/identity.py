"""Who calls. One gate for every route and RPC: it finds the principal, or refuses.

Deny by default: what is not listed as open here needs a key, also a path or method that does not
exist, and code that asks for the principal of a call that passed no gate fails.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from trireme.errors import InvalidApiKey, InvalidConfiguration, PermissionDenied, TriremeError
from trireme.gateway.audit import AuditLog
from trireme.gateway.settings import Settings
from trireme.gateway.submission import DEFAULT_TENANT, checked_name
from trireme.runtime.serving import Context, abort
from trireme.runtime.tenant_keys import KeyBook, Role, Tenant

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
"""Routes that need no key: they say one word about the process."""
OPEN_SERVICES = ("/grpc.health.v1.Health/",)
ROLE_OF_PATH = {"/metrics": Role.METRICS}
"""All others need `inference`."""
ANONYMOUS = frozenset({Role.INFERENCE, Role.METRICS})
UNLIMITED = Tenant()


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Whom a call counts for."""

    tenant: str = DEFAULT_TENANT
    key_id: str = ""
    """Empty: the gateway is open."""
    roles: frozenset[Role] = ANONYMOUS
    limits: Tenant = UNLIMITED

    def may(self, role: Role) -> bool:
        return role in self.roles or Role.ADMIN in self.roles


PRINCIPAL = web.RequestKey("principal", Principal)
_PRINCIPAL: ContextVar[Principal] = ContextVar("trireme_principal")


def current_principal() -> Principal:
    """The principal of the call that is being handled.

    Raises:
        LookupError: the call passed no gate, which is our bug.
    """
    return _PRINCIPAL.get()


@contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """What runs in the block counts for `principal`."""
    token = _PRINCIPAL.set(principal)
    try:
        yield
    finally:
        with suppress(ValueError):  # A stream that is torn down may end in another context.
            _PRINCIPAL.reset(token)


class Gate:
    """Finds the principal of a call."""

    def __init__(
        self,
        book: KeyBook | None,
        *,
        trust_tenant_header: bool = False,
        open_metrics: bool = False,
        audit: AuditLog | None = None,
    ) -> None:
        """Without a `book` the gateway is open."""
        self.book = book
        self.audit = audit or AuditLog("", max_bytes=0, max_files=1)
        self.open_paths = OPEN_PATHS | {"/metrics"} if open_metrics else OPEN_PATHS
        self._trust_tenant_header = trust_tenant_header

    def identify(self, headers: Mapping[str, str]) -> Principal:
        """Whose call it is, by its headers or metadata; names in lower case.

        Raises:
            InvalidApiKey: there is no key, or none of ours.
            InvalidRequest: the tenant's name is malformed.
        """
        if self.book is None:
            tenant = headers.get("x-trireme-tenant", "") if self._trust_tenant_header else ""
            return Principal(tenant=checked_name(tenant, param="x-trireme-tenant") or DEFAULT_TENANT)
        key = _key_in(headers)
        if not key:
            raise InvalidApiKey("no API key: send one as `Authorization: Bearer KEY`")
        owner = self.book.find(key)
        if owner is None:
            raise InvalidApiKey("the API key is not known: it may have been withdrawn")
        return Principal(
            tenant=owner.tenant, key_id=owner.key_id, roles=owner.limits.roles, limits=owner.limits
        )

    def admit(self, headers: Mapping[str, str], role: Role) -> Principal:
        """The principal, who must have the role.

        Raises:
            PermissionDenied: it has not.
            InvalidApiKey, InvalidRequest: as `identify` does.
        """
        principal = self.identify(headers)
        if not principal.may(role):
            raise PermissionDenied(f"this key's roles do not include {role.value!r}: use another key")
        return principal


def gate_of(settings: Settings) -> Gate:
    """The gate that the settings ask for.

    Raises:
        InvalidConfiguration: the keys file is not right, or there is none and the gateway would be
            open to other machines without having been told so; the audit log cannot be written.
    """
    try:
        audit = AuditLog(
            settings.audit_log, max_bytes=settings.audit_max_bytes, max_files=settings.audit_files
        )
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot write {settings.audit_log}: {error.strerror}", param="TRIREME_GATEWAY_AUDIT_LOG"
        ) from error
    if settings.keys is not None:
        if settings.trust_tenant_header or settings.allow_anonymous:
            raise InvalidConfiguration(
                "with a keys file tenants are known by their keys: "
                "leave out trust_tenant_header and allow_anonymous",
                param="TRIREME_GATEWAY_KEYS",
            )
        return Gate(KeyBook(settings.keys), open_metrics=settings.open_metrics, audit=audit)
    if not settings.allow_anonymous:
        for listen in (settings.http_listen, settings.grpc_listen, settings.operator_listen):
            if listen and not is_loopback(listen):
                raise InvalidConfiguration(
                    f"a gateway that listens on {listen} would answer anyone: name a keys file "
                    "(TRIREME_GATEWAY_KEYS; fleet.yaml: gateway.keys), or say that this is meant "
                    "(TRIREME_GATEWAY_ALLOW_ANONYMOUS=true; fleet.yaml: gateway.allow_anonymous)",
                    param="TRIREME_GATEWAY_KEYS",
                )
    return Gate(None, trust_tenant_header=settings.trust_tenant_header, audit=audit)


def is_loopback(listen: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def http_gate(gate: Gate) -> Middleware:
    """Asks every HTTP call who it is before anything of its body is read."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in gate.open_paths:
            return await handler(request)
        resource = request.match_info.route.resource  # Not the path: clients may make up any number.
        call = f"{request.method} {resource.canonical if resource else '(no such path)'}"
        with gate.audit.call(call[:256], peer=request.remote or "") as audited:
            try:
                principal = gate.admit(request.headers, ROLE_OF_PATH.get(request.path, Role.INFERENCE))
                audited.tenant, audited.key_id = principal.tenant, principal.key_id
                request[PRINCIPAL] = principal
                with acting_as(principal):
                    response = await handler(request)
                audited.outcome = str(response.status)
                return response
            except TriremeError as error:
                audited.outcome = error.code
                raise
            except web.HTTPException as error:
                audited.outcome = str(error.status)
                raise

    return middleware


class GrpcGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks every RPC who it is before its message is read."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method = handler_call_details.method
        if method.startswith(OPEN_SERVICES):
            return await continuation(handler_call_details)
        pairs = handler_call_details.invocation_metadata or ()
        headers = {str(key): value for key, value in pairs if isinstance(value, str)}
        try:
            principal = self._gate.admit(headers, Role.INFERENCE)
        except TriremeError as error:
            return _refusal(error, self._gate.audit, method)
        handler = await continuation(handler_call_details)
        return None if handler is None else _audited(handler, self._gate.audit, method, principal)


def _audited(handler: Any, audit: AuditLog, method: str, principal: Principal) -> Any:
    """The handler, whose calls count for the principal and are written down."""

    @contextmanager
    def noted(context: Context) -> Iterator[None]:
        with audit.call(method[:256], peer=context.peer()) as audited, acting_as(principal):
            audited.tenant, audited.key_id = principal.tenant, principal.key_id
            try:
                yield
                audited.outcome = "ok"
            except TriremeError as error:
                audited.outcome = error.code
                raise

    async def one(request: Any, context: Context) -> Any:
        with noted(context):
            return await inner(request, context)

    async def many(request: Any, context: Context) -> Any:
        with noted(context):
            async for response in inner(request, context):
                yield response

    inner, make = _parts(handler)
    return make(
        many if handler.response_streaming else one,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _parts(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    match (handler.request_streaming, handler.response_streaming):
        case (False, False):
            return handler.unary_unary, grpc.unary_unary_rpc_method_handler
        case (False, True):
            return handler.unary_stream, grpc.unary_stream_rpc_method_handler
        case (True, False):
            return handler.stream_unary, grpc.stream_unary_rpc_method_handler
        case _:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler


def _refusal(error: TriremeError, audit: AuditLog, method: str) -> Any:
    """A handler for methods of any kind that ends the call unread."""

    async def refuse(_: Any, context: Context) -> Any:
        with audit.call(method[:256], peer=context.peer()) as audited:
            audited.outcome = error.code
        await abort(context, error)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)


def _key_in(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key", "").strip()
