"""guidellm, a public load generator, and `trireme bench` on one fleet: the same load, the same figures?

    make bench-load-generator [ARGS="--requests 96"]

guidellm comes from the package index into an environment of its own, unchanged, and gets no option that
other servers do not get: it asks /health and /v1/models, then streams /v1/completions with the tokens so
far in each chunk. Both send texts of the same distribution, each text once, so that no prefix is found
again; they take turns, the first of each pair changes, and the table has medians over the turns. Times are
as each tool takes them: TTFT from sending to the first text, TPOT from there to the last text over the
tokens after the first (guidellm calls it inter-token latency). The gateway's own means over each turn stand
beside them, so that a tool that measures otherwise can be told from one that leaves the fleet less to compute
with. The tools have the last core and the fleet the others, unless they are to run `--together`. Cores share
caches and memory, and may be threads of one core, so `trireme bench` also runs beside a busy loop of the
lowest priority, which makes its core as busy as guidellm does.
"""

from __future__ import annotations

import argparse
import builtins
import json
import keyword
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fleet import MODEL, REPOSITORY, fleet_document, running, write_result

ENVIRONMENT = REPOSITORY / ".tools" / "load_generator"
WORDS = sorted(set(keyword.kwlist) | set(dir(builtins)))
PROMPT_WORDS = 40


@dataclass(frozen=True, slots=True)
class Figures:
    """What a tool tells of one turn; means over requests."""

    requests: int
    failed: int
    prompt_tokens: int
    answer_tokens: int
    requests_per_s: float
    answer_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of a tool: what it tells, and what the gateway told of the same requests."""

    told: Figures
    gateway_ttft_ms: float
    gateway_e2e_ms: float
    tool_cpu_s: float
    """Of the tool's processes, their start included."""


class GatewayClock:
    """Means of the gateway's histograms from one look to the next."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._seen = self._look()

    def means_ms(self) -> dict[str, float]:
        """Since the last look, by histogram."""
        before, self._seen = self._seen, self._look()
        return {
            name: 1000 * (total - before[name][0]) / max(1.0, count - before[name][1])
            for name, (total, count) in self._seen.items()
        }

    def _look(self) -> dict[str, tuple[float, float]]:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=30) as page:
            families = text_string_to_metric_families(page.read().decode())
            values = {sample.name: sample.value for family in families for sample in family.samples}
        return {
            name: (
                values[f"trireme_gateway_{name}_seconds_sum"],
                values[f"trireme_gateway_{name}_seconds_count"],
            )
            for name in ("ttft", "e2e")
        }


def write_prompts(path: Path, rng: random.Random, *, requests: int, answer_tokens: int) -> None:
    """JSON lines that both tools read; `output_tokens_count` is guidellm's."""
    rows = (
        {"prompt": " ".join(rng.choices(WORDS, k=PROMPT_WORDS)), "output_tokens_count": answer_tokens}
        for _ in range(requests)
    )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def by_guidellm(url: str, prompts: Path, arguments: argparse.Namespace, streams: int) -> Figures:
    """One run of `guidellm run` in its own environment."""
    out = prompts.with_suffix(".guidellm.json")
    command = [
        str(ENVIRONMENT / "bin" / "guidellm"),
        "run",
        *("--backend", f"kind=openai_http,target={url},request_format=/v1/completions"),
        *("--profile", f"kind=concurrent,streams={streams}"),
        *("--constraint", f"kind=max_requests,count={arguments.requests}"),
        *("--data", f"kind=json_file,path={prompts}"),
        *("--output", f"kind=json,path={out}"),
        "--disable-console",
    ]
    # Nothing is to be looked up at the hub: prompts come with the lengths of their answers.
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=prompts.parent)
    (found,) = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    metrics: dict[str, Any] = found["metrics"]

    def mean(name: str) -> float:
        return float(metrics[name]["successful"]["mean"])

    totals = metrics["request_totals"]
    good = int(totals["successful"])
    return Figures(
        requests=int(totals["total"]),
        failed=int(totals["total"]) - good,
        prompt_tokens=round(mean("prompt_token_count") * good),
        answer_tokens=round(mean("output_token_count") * good),
        requests_per_s=good / found["duration"],
        answer_tokens_per_s=mean("output_token_count") * good / found["duration"],
        ttft_ms=mean("time_to_first_token_ms"),
        tpot_ms=mean("inter_token_latency_ms"),
        e2e_ms=1000 * mean("request_latency"),
    )


def by_trireme(url: str, prompts: Path, arguments: argparse.Namespace, streams: int) -> Figures:
    """One run of `trireme bench` against the same address and API."""
    out = prompts.with_suffix(".trireme.json")
    command = [
        *(sys.executable, "-m", "trireme.cli", "bench", "--api", "openai", "--address", f"{url}/v1"),
        *("--model", MODEL, "--prompts", str(prompts), "--requests", str(arguments.requests)),
        *("--answer-tokens", str(arguments.answer_tokens), "--concurrency", str(streams)),
        *("--output", str(out)),
    ]
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
    subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text(encoding="utf-8"))
    return Figures(
        requests=found["requests"],
        failed=found["failed"],
        prompt_tokens=found["prompt_tokens"],
        answer_tokens=found["answer_tokens"],
        requests_per_s=found["request_throughput"],
        answer_tokens_per_s=found["output_throughput"],
        ttft_ms=found["ttft_ms"]["mean"],
        tpot_ms=found["tpot_ms"]["mean"],
        e2e_ms=found["e2e_ms"]["mean"],
    )


def by_busy_trireme(url: str, prompts: Path, arguments: argparse.Namespace, streams: int) -> Figures:
    """As `by_trireme`, while whatever it leaves of its core is taken."""
    with subprocess.Popen(["nice", "-n", "19", sys.executable, "-c", "while True: pass"]) as loop:
        try:
            return by_trireme(url, prompts, arguments, streams)
        finally:
            loop.kill()


TOOLS: dict[str, Callable[[str, Path, argparse.Namespace, int], Figures]] = {
    "guidellm": by_guidellm,
    "trireme bench": by_trireme,
    "trireme bench, core busy": by_busy_trireme,
}


COMPARED = (
    *("requests_per_s", "answer_tokens_per_s", "ttft_ms", "tpot_ms", "e2e_ms"),
    *("gateway_ttft_ms", "gateway_e2e_ms"),
)


def children_cpu_s() -> float:
    """Processor time of all children that ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def version() -> str:
    """Of the installed guidellm."""
    command = [str(ENVIRONMENT / "bin" / "pip"), "list", "--format=json"]
    packages = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return next(str(package["version"]) for package in packages if package["name"] == "guidellm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=96, help="in each turn")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="requests in flight")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="fleet and tools share all cores")
    arguments = parser.parse_args()
    if not (ENVIRONMENT / "bin" / "guidellm").exists():
        sys.exit("guidellm is not installed: run make bench-load-generator")
    rng = random.Random(0)
    seen: dict[int, dict[str, list[Turn]]] = {n: {tool: [] for tool in TOOLS} for n in arguments.streams}
    cores = sorted(os.sched_getaffinity(0))
    apart = len(cores) > 1 and not arguments.together
    os.sched_setaffinity(0, cores[:-1] if apart else cores)  # The fleet's processes inherit it.
    with (
        tempfile.TemporaryDirectory() as scratch,
        running(fleet_document(workers=arguments.workers)) as fleet,
    ):
        url, prompts = f"http://{fleet.http[0]}", Path(scratch) / "prompts.jsonl"
        os.sched_setaffinity(0, cores[-1:] if apart else cores)
        write_prompts(prompts, rng, requests=arguments.requests, answer_tokens=arguments.answer_tokens)
        by_trireme(url, prompts, arguments, max(arguments.streams))  # Warms the fleet up.
        clock = GatewayClock(url)
        for turn in range(arguments.turns):
            for streams in arguments.streams:
                for tool in list(TOOLS)[:: -1 if turn % 2 else 1]:
                    write_prompts(
                        prompts, rng, requests=arguments.requests, answer_tokens=arguments.answer_tokens
                    )
                    before_cpu_s = children_cpu_s()
                    told = TOOLS[tool](url, prompts, arguments, streams)
                    cpu_s, means_ms = children_cpu_s() - before_cpu_s, clock.means_ms()
                    found = Turn(
                        told,
                        gateway_ttft_ms=means_ms["ttft"],
                        gateway_e2e_ms=means_ms["e2e"],
                        tool_cpu_s=cpu_s,
                    )
                    seen[streams][tool].append(found)
                    print(f"{streams} streams, {tool}: {found}", flush=True)
    shown = {}
    for streams, tools in seen.items():
        medians = {tool: _medians(turns) for tool, turns in tools.items()}
        rows = dict(medians)
        for other in list(TOOLS)[1:]:
            rows[f"guidellm over {other}"] = {
                name: round(medians["guidellm"][name] / medians[other][name], 4) for name in COMPARED
            }
        shown[f"{streams} streams"] = rows
        for name, row in rows.items():
            print(f"{streams} streams, {name}: {row}")
    turns = {
        str(n): {tool: [asdict(one) for one in found] for tool, found in t.items()} for n, t in seen.items()
    }
    path = write_result(
        "load_generator",
        {"guidellm": version(), "load": vars(arguments), "medians": shown, "turns": turns},
        case="together" if arguments.together else "",
    )
    print(f"written to {path.relative_to(REPOSITORY)}")


def _medians(turns: list[Turn]) -> dict[str, float]:
    rows = [
        {
            **asdict(turn.told),
            "gateway_ttft_ms": turn.gateway_ttft_ms,
            "gateway_e2e_ms": turn.gateway_e2e_ms,
            "tool_cpu_s": turn.tool_cpu_s,
            "beside_the_gateway_ms": turn.told.e2e_ms - turn.gateway_e2e_ms,
        }
        for turn in turns
    ]
    return {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}


if __name__ == "__main__":
    main()
