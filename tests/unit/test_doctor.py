"""The doctor's rules over facts, and what its bundle must not hold."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.cli.doctoring.collecting import judged_samples, last_error
from trireme.cli.doctoring.facts import (
    DiskFacts,
    FleetFacts,
    GroupFacts,
    PlacementFacts,
    ProcessFacts,
    RedisFacts,
    Sample,
    StreamFacts,
    WorkerPlace,
)
from trireme.cli.doctoring.findings import RULES, Severity, findings
from trireme.cli.doctoring.redaction import GONE, Redactor, secret_values


def process(service: str, **more: Any) -> ProcessFacts:
    known = {"name": f"{service}-0", "registered": True, "pid": 7, "healthy": True, "health": "SERVING"}
    return ProcessFacts(service=service, **{**known, "version": "1", "started_unix_s": 900.0, **more})


WORKER = process("worker", ready_variants=("v",))
OTHERS = tuple(process(s) for s in ("gateway", "scheduler", "placement", "kvstore", "power"))
WELL = FleetFacts(
    taken_unix_s=1000.0,
    run_dir="/run",
    fleet_file="fleet.yaml",
    phase="ready",
    supervisor_lives=True,
    startup_error="",
    waiting_for="",
    redis=RedisFacts(answers=True),
    placement=PlacementFacts(answers=True, groups=(GroupFacts(name="worker", desired=1, ready=1),)),
    processes=(*OTHERS, WORKER),
    disks=(DiskFacts(path="/run", free_bytes=10**11, total_bytes=10**12),),
    version="1",
    cpu_kernels=True,
)


def with_processes(*changed: ProcessFacts) -> FleetFacts:
    names = {p.name for p in changed}
    return replace(WELL, processes=(*[p for p in WELL.processes if p.name not in names], *changed))


def samples(service: str, *found: Sample) -> FleetFacts:
    (known,) = WELL.of(service)
    return with_processes(replace(known, samples=found))


def placed(*workers: WorkerPlace, ready: int = 0) -> FleetFacts:
    groups = (GroupFacts(name="worker", desired=2, ready=ready, variants=("v", "w")),)
    return replace(WELL, placement=PlacementFacts(answers=True, groups=groups, workers=workers))


SICK: dict[str, FleetFacts] = {
    "no_fleet": replace(WELL, phase="none", processes=(), supervisor_lives=False),
    "stopped": replace(WELL, phase="stopped", processes=(), supervisor_lives=False),
    "port_taken": replace(WELL, phase="failed", startup_error="127.0.0.1:8000 is in use", processes=()),
    "start_failed": replace(WELL, phase="failed", startup_error="it did not", processes=()),
    "bus_away": replace(WELL, redis=RedisFacts(answers=False, error="Connection refused")),
    "bus_refuses_writes": replace(WELL, redis=RedisFacts(answers=True, write_error="MISCONF errors writing")),
    "disk_full": replace(WELL, disks=(DiskFacts(path="/run", free_bytes=10**6, total_bytes=10**12),)),
    "variant_did_not_load": placed(
        WorkerPlace(
            name="w-0", phase="ready", load_error="no such file", worker_id="worker-0", group="worker"
        )
    ),
    "workers_crash": placed(WorkerPlace(name="w-0", phase="waiting", crash_looping=True, restarts=9)),
    "no_worker": replace(WELL, processes=OTHERS),
    "gateway_gone": replace(WELL, processes=(*OTHERS[1:], WORKER)),
    "scheduler_gone": with_processes(process("scheduler", registered=False, pid=0, supervised=True)),
    "kvstore_gone": with_processes(process("kvstore", registered=False, pid=0, supervised=True)),
    "supervisor_gone": replace(WELL, supervisor_lives=False),
    "engine_stalled": samples("worker", Sample("trireme_engine_last_turn_age_seconds", 30.0)),
    "does_not_answer": with_processes(process("power", health="DEADLINE_EXCEEDED")),
    "clock_skew": replace(WELL, redis=RedisFacts(answers=True, clock_ahead_s=-4.0)),
    "versions_differ": with_processes(process("power", version="2")),
    "queue_grows": samples("scheduler", Sample("trireme_scheduler_oldest_seconds", 60.0)),
    "workers_missing": placed(WorkerPlace(name="w-1", phase="starting"), ready=1),
    "kv_tier_off": samples(
        "kvstore",
        Sample("trireme_kv_serving", 0.0, {"tier": "ssd"}),
        Sample("trireme_kv_capacity_bytes", 1.0, {"tier": "ssd"}),
    ),
    "kv_corrupt": samples("kvstore", Sample("trireme_kv_corrupt_total", 2.0, {"tier": "ssd"})),
    "cpu_kernels_missing": replace(WELL, cpu_kernels=False),
    "meter_silent": samples("power", Sample("trireme_power_reading_age_seconds", 600.0)),
    "carbon_signal_old": samples("power", Sample("trireme_carbon_signal_age_seconds", 10**6)),
    "metrics_hidden": with_processes(process("gateway", metrics_error="it wants a key")),
    "starting": replace(WELL, phase="starting", waiting_for="workers"),
}


def test_a_well_fleet_has_no_findings() -> None:
    assert findings(WELL) == []


@pytest.mark.parametrize("code", SICK)
def test_each_sickness_is_named_first_with_advice(code: str) -> None:
    found = findings(SICK[code])
    assert found[0].code == code
    assert found[0].what.endswith(".") and found[0].advice.endswith(".")


def test_every_rule_is_tried_above() -> None:
    tried = {rule.__name__ for rule in RULES for facts in SICK.values() if list(rule(facts))}
    assert tried == {rule.__name__ for rule in RULES}


def test_the_cause_comes_before_what_follows_from_it() -> None:
    redis = RedisFacts(
        answers=True,
        write_error="MISCONF disk",
        streams=(StreamFacts(name="t:requests", length=9, lag=9),),
    )
    everything = replace(
        SICK["disk_full"],
        redis=redis,
        processes=tuple(process(s, registered=False, supervised=True) for s in ("scheduler", "worker")),
        supervisor_lives=False,
    )
    codes = [finding.code for finding in findings(everything)]
    assert codes[:3] == ["disk_full", "bus_refuses_writes", "no_worker"]
    assert codes.index("queue_grows") > codes.index("scheduler_gone")


def test_what_costs_only_speed_comes_after_what_fails_requests() -> None:
    facts = replace(SICK["no_worker"], cpu_kernels=False, redis=RedisFacts(answers=True, clock_ahead_s=9.0))
    severities = [finding.severity for finding in findings(facts)]
    assert severities == sorted(severities, key=list(Severity).index)


def test_a_load_that_failed_once_is_history_when_all_is_loaded() -> None:
    place = WorkerPlace(name="w", phase="ready", load_error="no", worker_id="worker-0", group="worker")
    facts = placed(place, ready=2)
    loaded = replace(facts, processes=(*OTHERS, replace(WORKER, ready_variants=("v", "w"))))
    assert [f.code for f in findings(facts)] == ["variant_did_not_load"]
    assert findings(loaded) == []


def test_a_fleet_scaled_to_zero_is_not_sick() -> None:
    placement = PlacementFacts(answers=True, groups=(GroupFacts(name="worker", desired=0, ready=0),))
    assert findings(replace(WELL, processes=OTHERS, placement=placement)) == []


def test_only_what_rules_look_at_is_kept_of_a_metrics_page() -> None:
    page = "\n".join(
        [
            "# TYPE trireme_kv_corrupt counter",
            'trireme_kv_corrupt_total{tier="ssd"} 3.0',
            "# TYPE python_info gauge",
            "python_info 1.0",
            "cut off in the mid",
        ]
    )
    assert judged_samples(page) == [Sample("trireme_kv_corrupt_total", 3.0, {"tier": "ssd"})]


def test_the_last_error_of_a_log_is_found() -> None:
    line = {"level": "error", "event": "failed", "exception": "Traceback\n  File x\nValueError: no"}
    found = last_error("w", json.dumps({"level": "info"}) + "\n" + json.dumps(line) + "\nplain\n")
    assert found is not None and (found.event, found.detail) == ("failed", "ValueError: no")
    trace = "start\nTraceback (most recent call last):\n  File y\nKeyError: 'a'\n"
    found = last_error("w", trace)
    assert found is not None and found.detail == "KeyError: 'a'"
    assert last_error("w", "all is well") is None


SECRETS = {
    "TRIREME_GATEWAY_API_KEY": "aaaa-bbbb-cccc",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer dddd-eeee",
    "TRIREME_GATEWAY_REDIS_URL": "rediss://user:ffff-gggg@redis:6379/0",
    "SOME_PASSWORD": "hhhh-iiii",
}
INNOCENT = {"TRIREME_GATEWAY_MAX_PROMPT_TOKENS": "4096", "TRIREME_GATEWAY_NODE": "n1", "A_SECRET": "x"}


def test_settings_keep_their_names_and_lose_their_secrets() -> None:
    environ = SECRETS | INNOCENT
    redactor = Redactor(secret_values(environ))
    shown = redactor.settings(environ)
    assert shown.keys() == environ.keys()
    assert shown["TRIREME_GATEWAY_MAX_PROMPT_TOKENS"] == "4096" and shown["TRIREME_GATEWAY_NODE"] == "n1"
    assert shown["TRIREME_GATEWAY_REDIS_URL"] == f"rediss://{GONE}@redis:6379/0"
    assert all(shown[name] == GONE for name in ("TRIREME_GATEWAY_API_KEY", "SOME_PASSWORD", "A_SECRET"))


@given(
    before=st.text(max_size=20),
    after=st.text(max_size=20),
    place=st.sampled_from(["text", "log", "document"]),
)
def test_a_known_secret_is_found_wherever_it_stands(before: str, after: str, place: str) -> None:
    secret = "hhhh-iiii"
    redactor = Redactor(secret_values(SECRETS))
    around = f"{before}{secret}{after}"
    shown = {
        "text": lambda: redactor.text(around),
        "log": lambda: redactor.log_line(json.dumps({"event": "x", "detail": around})),
        "document": lambda: json.dumps(redactor.value({"a": [{"b": around}]})),
    }[place]()
    assert secret not in shown


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abcdef0123456789",
        "key trk_abcdefghijklmnopqrstuvwxyz012345",
        "redis://:hunter2hunter2@host:1/0",
        "sk-abcdefghijklmnopqrstuvwx",
    ],
)
def test_what_looks_like_a_secret_goes_too(text: str) -> None:
    shown = Redactor().text(text)
    assert GONE in shown and not any(word in shown for word in ("abcdef", "hunter2"))


def test_texts_go_by_the_names_of_their_fields_and_figures_stay() -> None:
    document = {
        "public_prefixes": [{"system": "You are kind"}, {"text": "Once upon"}],
        "prompt_tokens": 7,
        "messages": [{"role": "user", "content": "hi there"}],
        "redis": {"url": "redis://u:pppppppp@h"},
    }
    shown = json.dumps(Redactor().value(document))
    assert not any(text in shown for text in ("kind", "Once", "hi there", "pppppppp"))
    assert '"prompt_tokens": 7' in shown
    metrics = "trireme_gateway_requests_total 3.0"
    assert Redactor().text(metrics) == metrics
