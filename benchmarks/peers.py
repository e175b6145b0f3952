"""Trireme, llama-cpp-python's server and `transformers serve`: same weights, same trace, one run.

    python -m benchmarks.peers [--requests 60] [--rate 2]

Each server gets the machine alone, with as many threads as it has cores, and the same text prompts
at the same times through `/v1/completions`: lengths from the Azure 2023 conversation trace scaled
to the model's context, texts from the standard library's source. The peers live in an environment
of their own (`make bench-peers` installs it). A peer that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.fleet import CHECKPOINTS, MODEL, REPOSITORY, fleet_document, running, write_result
from trireme.load.drivers import openai_driver
from trireme.load.plan import PlannedRequest, from_trace
from trireme.load.report import Report, summarise
from trireme.load.run import run_open_loop

PEERS = REPOSITORY / ".tools" / "peers"
TRACE = REPOSITORY / "benchmarks" / "data" / "traces" / "azure2023_conv_10min.csv"
CHARACTERS_PER_TOKEN = 3.2
LENGTH_SCALE = 0.25


def text_plan(requests: int, rate_rps: float) -> list[PlannedRequest]:
    """The trace's requests with texts instead of random tokens, its rate brought to `rate_rps`."""
    traced = from_trace(
        TRACE, limit=requests, time_scale=1.0, length_scale=LENGTH_SCALE, vocabulary=4000, seed=0
    )
    stretch = (requests / rate_rps) / traced[-1].at_s
    library = Path(sysconfig.get_paths()["stdlib"])
    source = "\n".join(
        (library / name).read_text() for name in ("argparse.py", "inspect.py", "tarfile.py", "ast.py")
    )
    plan = []
    for planned in traced:
        length = int(len(planned.prompt) * CHARACTERS_PER_TOKEN)
        start = (planned.index * 7919) % (len(source) - length)
        text = source[start : start + length]
        plan.append(
            replace(
                planned, prompt=text, at_s=planned.at_s * stretch, max_tokens=min(planned.max_tokens, 128)
            )
        )
    return plan


async def drive(base_url: str, model: str, plan: list[PlannedRequest], *, ignore_eos: bool) -> Report:
    """Warm up with three requests, then replay the plan."""
    async with openai_driver(base_url, model=model, ignore_eos=ignore_eos) as driver:
        for planned in plan[:3]:
            await driver(replace(planned, max_tokens=8))
        return summarise(await run_open_loop(plan, driver))


def trireme(plan: list[PlannedRequest]) -> Report:
    """Our fleet: as many workers as cores, one thread each."""
    with running(fleet_document(workers=os.cpu_count() or 1)) as fleet:
        return asyncio.run(drive(f"http://{fleet.http[0]}/v1", MODEL, plan, ignore_eos=False))


def llama_cpp(plan: list[PlannedRequest], variant: str) -> Report | str:
    """llama-cpp-python's OpenAI server on the same weights as float16 GGUF."""
    python = PEERS / "bin" / "python"
    if not list(PEERS.glob("lib/*/site-packages/llama_cpp")):
        return "llama-cpp-python is not installed"
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model.gguf"
        exporter = REPOSITORY / "benchmarks" / "gguf_export.py"
        subprocess.run([python, exporter, CHECKPOINTS / variant, model], check=True)
        command = [str(python), "-m", "llama_cpp.server", "--model", str(model), "--n_ctx", "2048"]
        command += ["--n_threads", str(os.cpu_count()), "--model_alias", variant]
        # Its default breaks off the running stream when another request comes.
        command += ["--interrupt_requests", "false"]
        with server(command) as base_url:
            return asyncio.run(drive(base_url, variant, plan, ignore_eos=False))


def transformers_serve(plan: list[PlannedRequest], variant: str) -> Report | str:
    """`transformers serve` on the same checkpoint."""
    command = PEERS / "bin" / "transformers"
    if not command.exists():
        return "transformers[serving] is not installed"
    words = [str(command), "serve", str(CHECKPOINTS / variant), "--device", "cpu"]
    with server(words) as base_url:
        return asyncio.run(drive(base_url, str(CHECKPOINTS / variant), plan, ignore_eos=False))


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    """Run an OpenAI-compatible server on a free port until the block ends; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait(port, process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"the server did not start: {process.args!r}")
            time.sleep(0.2)


def row(report: Report | str) -> dict[str, object] | str:
    """The figures that are compared."""
    if isinstance(report, str):
        return report
    return {
        "failed": report.failed,
        "duration_s": round(report.duration_s, 2),
        "answer_tokens": report.answer_tokens,
        "output_tokens_per_s": round(report.output_throughput, 1),
        "ttft_ms_p50": round(report.ttft_ms.p50, 1),
        "ttft_ms_p99": round(report.ttft_ms.p99, 1),
        "tpot_ms_p50": round(report.tpot_ms.p50, 2),
        "e2e_ms_p50": round(report.e2e_ms.p50, 1),
        "e2e_ms_p99": round(report.e2e_ms.p99, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--variant", default="trireme-py-6m")
    arguments = parser.parse_args()
    plan = text_plan(arguments.requests, arguments.rate)
    figures = {
        "variant": arguments.variant,
        "requests": arguments.requests,
        "rate_rps": arguments.rate,
        "trireme": row(trireme(plan)),
        "llama-cpp-python": row(llama_cpp(plan, arguments.variant)),
        "transformers": row(transformers_serve(plan, arguments.variant)),
    }
    path = write_result("peers", figures)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
