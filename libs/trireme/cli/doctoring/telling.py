"""The doctor's visit: look, judge, tell, and pack."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from trireme.cli.doctoring.bundle import as_plain, write_bundle
from trireme.cli.doctoring.collecting import Look, look_at
from trireme.cli.doctoring.facts import FleetFacts, PlacementFacts, RedisFacts
from trireme.cli.doctoring.findings import Finding, Severity, findings
from trireme.cli.failing import FAILURE
from trireme.cli.run_directory import FleetState, RunDirectory


def tell(run_dir: Path, *, redis_url: str, bus_prefix: str, bundle: Path | None, as_json: bool) -> None:
    """Print what is wrong, and write the bundle; exit status 1 where a finding is more than a note."""
    run_directory = RunDirectory.at(run_dir)
    state = _elsewhere(redis_url, bus_prefix) if redis_url else run_directory.read()
    look = asyncio.run(look_at(state, run_directory)) if state is not None else _nothing(run_directory)
    found = findings(look.facts)
    if bundle is not None:
        write_bundle(bundle, look, found)
    if as_json:
        print(json.dumps([as_plain(finding) for finding in found], indent=2))
    else:
        print(report(look.facts, found), end="")
        if bundle is not None:
            print(f"\nwrote {bundle}: settings, metrics, logs; without secrets, prompts and answers")
    if any(finding.severity is not Severity.NOTE for finding in found):
        sys.exit(FAILURE)


def report(facts: FleetFacts, found: list[Finding]) -> str:
    """The findings for a reader."""
    living = sum(process.lives for process in facts.processes)
    lines = [f"{facts.fleet_file or facts.run_dir}: {facts.phase}, {living} processes live"]
    if not found:
        lines.append("Nothing is wrong.")
    for number, finding in enumerate(found, start=1):
        lines += ["", f"{number}. [{finding.severity.value}] {finding.what} ({finding.code})"]
        lines += [f"   - {seen}" for seen in finding.seen[:8]]
        lines.append(f"   {finding.advice}")
    return "\n".join(lines) + "\n"


def _elsewhere(redis_url: str, bus_prefix: str) -> FleetState:
    """A fleet that no supervisor of this machine runs."""
    return FleetState(
        phase="unsupervised", run_id="", fleet="", node="", bus_prefix=bus_prefix, redis_url=redis_url
    )


def _nothing(run_directory: RunDirectory) -> Look:
    facts = FleetFacts(
        taken_unix_s=time.time(),
        run_dir=str(run_directory.path),
        fleet_file="",
        phase="none",
        supervisor_lives=False,
        startup_error="",
        waiting_for="",
        redis=RedisFacts(answers=False),
        placement=PlacementFacts(answers=False),
    )
    return Look(facts=facts)
