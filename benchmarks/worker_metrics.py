"""Counters of a running fleet's workers, read from their metrics endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fleet import REPOSITORY, RunningFleet


def worker_counters(fleet: RunningFleet) -> dict[str, float]:
    """Each metric of the workers, summed over workers and variants, by name without `_total`."""
    command = [sys.executable, "-m", "trireme.cli", "status", "--json", "--run-dir", str(fleet.run_dir)]
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
    status = json.loads(subprocess.run(command, check=True, env=environ, capture_output=True).stdout)
    totals: dict[str, float] = {}
    for address in [worker["http_address"] for worker in status["workers"]]:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                totals[name] = totals.get(name, 0.0) + sample.value
    return totals
