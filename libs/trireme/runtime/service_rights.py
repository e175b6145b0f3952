"""Which service may call which RPC of which other service, where services know each other by certificate.

A service's certificate bears the fleet's name (`trireme`) and, before it, its own: `worker.trireme`.
One that bears several names has the rights of each. What is not written here nobody may call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import grpc

from trireme.errors import PermissionDenied

GATEWAY, SCHEDULER, WORKER, KVSTORE, POWER, PLACEMENT = (
    "gateway",
    "scheduler",
    "worker",
    "kvstore",
    "power",
    "placement",
)
OPERATOR = "operator"
"""People, by the `trireme` command."""
CALLERS: Collection[str] = (GATEWAY, SCHEDULER, WORKER, KVSTORE, POWER, PLACEMENT, OPERATOR)

Callers = frozenset[str] | None
"""Who may call; None: whoever has a certificate of the fleet's authority."""

_KVSTORE = "/trireme.wire.kvstore.v1.KvStore/"
_PLACEMENT = "/trireme.wire.placement.v1.Placement/"
_POWER = "/trireme.wire.power.v1.Power/"
_SCHEDULER = "/trireme.wire.scheduler.v1.Scheduler/"
_WORKER = "/trireme.wire.worker.v1.Worker/"

RIGHTS: Mapping[str, Callers] = {
    f"{_WORKER}Connect": frozenset({GATEWAY}),
    f"{_WORKER}LoadVariant": frozenset({PLACEMENT}),
    f"{_WORKER}UnloadVariant": frozenset({PLACEMENT}),
    f"{_WORKER}Drain": frozenset({PLACEMENT}),
    f"{_KVSTORE}Match": frozenset({WORKER, KVSTORE}),
    f"{_KVSTORE}Reserve": frozenset({WORKER}),
    f"{_KVSTORE}Commit": frozenset({WORKER}),
    f"{_KVSTORE}Abort": frozenset({WORKER}),
    f"{_KVSTORE}Acquire": frozenset({WORKER}),
    f"{_KVSTORE}Release": frozenset({WORKER}),
    f"{_KVSTORE}NoteSession": frozenset({WORKER}),
    f"{_KVSTORE}GetSession": frozenset({WORKER}),
    f"{_KVSTORE}Fetch": frozenset({KVSTORE}),
    f"{_KVSTORE}Push": frozenset({KVSTORE}),
    f"{_KVSTORE}GetStats": frozenset({WORKER, GATEWAY, OPERATOR}),
    f"{_SCHEDULER}Explain": frozenset({OPERATOR}),
    f"{_SCHEDULER}GetQueue": frozenset({GATEWAY, OPERATOR}),
    f"{_PLACEMENT}GetState": frozenset({OPERATOR}),
    f"{_PLACEMENT}Scale": frozenset({OPERATOR}),
    f"{_PLACEMENT}Drain": frozenset({OPERATOR}),
    f"{_PLACEMENT}LoadVariant": frozenset({OPERATOR}),
    f"{_PLACEMENT}UnloadVariant": frozenset({OPERATOR}),
    f"{_POWER}GetStatus": frozenset({GATEWAY, OPERATOR}),
    f"{_POWER}GetLedger": frozenset({GATEWAY, OPERATOR}),
    f"{_POWER}GetRequestEnergy": frozenset({OPERATOR}),
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": frozenset({OPERATOR}),
}
"""By the method's full name. The gateway's RPCs are clients' and ask for API keys."""

Context = grpc.aio.ServicerContext
Check = Callable[[str, Context], None]  # type: ignore[type-arg]
"""Takes a method's full name and a call of it; raises PermissionDenied."""


def certificate_names(fleet: str, *services: str) -> list[str]:
    """The DNS names that a certificate of these services bears; of all callers, if none is named."""
    return [fleet, *(f"{service}.{fleet}" for service in services or CALLERS)]


def services_named(names: Collection[str], fleet: str) -> frozenset[str]:
    """The services that a certificate is for, by its DNS names and the fleet's name."""
    return frozenset(service for service in CALLERS if f"{service}.{fleet}" in names)


def check_right(method: str, services: frozenset[str], fleet: str) -> None:
    """Return where one of the services may call the method.

    Raises:
        PermissionDenied: none may.
    """
    may = RIGHTS.get(method, frozenset())
    if may is None or may & services:
        return
    wanted = " or ".join(f"{service}.{fleet}" for service in sorted(may)) or "none: nobody may call it"
    had = ", ".join(sorted(services)) or "no service"
    raise PermissionDenied(
        f"{method} is not for the caller, whose certificate names {had}: it must bear the DNS name {wanted}"
    )


def rights_by_certificate(fleet: str) -> Check:
    """Checks each call by the certificate that its connection showed; `fleet` is TRIREME_TLS_NAME."""

    def check(method: str, context: Context) -> None:  # type: ignore[type-arg]
        shown = context.auth_context().get("x509_subject_alternative_name", ())
        names = {name.decode(errors="replace") for name in shown}
        check_right(method, services_named(names, fleet), fleet)

    return check
