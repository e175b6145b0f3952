"""What placement reads out of Deployments and Pods."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trireme.placement.kubernetes_api import FIELD_MANAGER, JsonObject
from trireme.policies.workload_scaling import FieldOwner, WorkloadSnapshot

COMPONENT = "app.kubernetes.io/component"
SCALED_BY = "trireme/scaled-by"
WORKERS = "trireme/service=worker"
"""What a selector of a release's worker groups and their pods ends in."""
_PREFIX = "worker-"
_CONTAINER = "worker"


def group_of(found: JsonObject) -> str:
    """The worker group that an object's labels name; empty: none."""
    component = _labels(found).get(COMPONENT, "")
    return component.removeprefix(_PREFIX) if component.startswith(_PREFIX) else ""


def workload(deployment: JsonObject) -> WorkloadSnapshot:
    """A worker group's Deployment, as the policy sees it."""
    return WorkloadSnapshot(
        group=group_of(deployment),
        # The API's own default, where the field is absent.
        replicas=int((deployment.get("spec") or {}).get("replicas", 1)),
        scaled_by=_labels(deployment).get(SCALED_BY, "no one"),
        owners=tuple(
            FieldOwner(
                manager=str(entry.get("manager", "")),
                ours=(entry.get("manager"), entry.get("operation"), entry.get("subresource"))
                == (FIELD_MANAGER, "Apply", "scale"),
            )
            for entry in deployment["metadata"].get("managedFields") or []
            if "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {})
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPod:
    """One pod of a worker group."""

    name: str
    group: str
    created_unix_s: float
    runs: bool
    """Its worker's process lives."""
    ready: bool
    """Its worker takes requests."""
    terminating: bool
    restarts: int
    crash_looping: bool
    last_exit: str
    """How its worker last ended, or why it does not start, one phrase."""
    started_unix_s: float
    """Of the worker's process; 0: none lives."""


def worker_pod(pod: JsonObject) -> WorkerPod:
    """A Pod, as `GetState` tells it."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    containers = status.get("containerStatuses") or []
    worker: JsonObject = next((each for each in containers if each.get("name") == _CONTAINER), {})
    state = worker.get("state") or {}
    waiting = (state.get("waiting") or {}).get("reason", "")
    conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
    running = state.get("running")
    return WorkerPod(
        name=metadata["name"],
        group=group_of(pod),
        created_unix_s=_unix_s(metadata.get("creationTimestamp")),
        runs=running is not None,
        ready=conditions.get("Ready") == "True",
        terminating="deletionTimestamp" in metadata,
        restarts=int(worker.get("restartCount", 0)),
        crash_looping=waiting == "CrashLoopBackOff",
        last_exit=_last_exit(worker, waiting, status),
        started_unix_s=_unix_s((running or {}).get("startedAt")),
    )


def _last_exit(worker: JsonObject, waiting: str, status: JsonObject) -> str:
    ended = (worker.get("lastState") or {}).get("terminated")
    if ended is not None:
        return f"exit status {ended.get('exitCode')}: {ended.get('reason', 'no reason told')}"
    if waiting not in ("", "ContainerCreating", "PodInitializing"):
        return waiting
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"[:200]
    return str(status.get("reason", ""))


def _labels(found: JsonObject) -> dict[str, Any]:
    return found["metadata"].get("labels") or {}


def _unix_s(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0
