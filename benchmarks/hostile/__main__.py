"""Thousands of calls that nobody should send, to a whole fleet that serves others meanwhile.

    python -m benchmarks.hostile [--each 40] [--connections 250] [--seed 1]

A fleet with a real worker. Every RPC that reflection names gets `--each` well-formed messages of any
content and as many torn ones; every operation of /openapi.json gets `--each` right and wrong requests;
`--connections` sockets to either port say what no client library would; messages are over their limits,
metadata and headers come in floods, and connections that began a request and do not go on stay open.
Somebody else's greedy streams, one after the other, must go on with exactly their tokens; no answer may
be a 5xx or a status of the server's own fault; the gateway's memory must not follow the number of calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from dataclasses import dataclass, field

import grpc
import psutil

from benchmarks.fleet import MODEL, RunningFleet, fleet_document, running, write_result
from benchmarks.hostile import grpc_messages, http_requests
from benchmarks.hostile.raw_connections import grpc_connections, http_connections, send_all, slow_connections
from benchmarks.hostile.verdicts import Verdicts
from trireme.client import Delta, Sampling, TriremeClient

VARIANT = "trireme-py-1m"
PROMPT = "def read_lines(path):\n"
TOKENS = 48
GENERATE = "/trireme.wire.inference.v1.Inference/Generate"
MOST_GROWTH_MIB = 32.0
"""Between the first third of the calls and the last."""


@dataclass
class Others:
    """Streams of a client that does nothing wrong."""

    address: str
    streams: int = 0
    wrong: int = 0
    longest_s: float = 0.0
    failure: str = ""
    _expected: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    async def run(self) -> None:
        async with TriremeClient([self.address]) as client:
            while not self._stop.is_set():
                started_s = time.monotonic()
                sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
                events = [event async for event in client.generate(MODEL, PROMPT, sampling)]
                ids = [i for event in events if isinstance(event, Delta) for i in event.token_ids]
                self._expected = self._expected or ids
                self.streams += 1
                self.wrong += ids != self._expected or len(ids) != TOKENS
                self.longest_s = max(self.longest_s, time.monotonic() - started_s)

    def follow(self) -> None:
        try:
            asyncio.run(self.run())
        except Exception as error:
            self.failure = repr(error)

    def stop(self) -> None:
        self._stop.set()


def gateway_process(fleet: RunningFleet) -> psutil.Process:
    """The process behind the fleet's only gateway."""
    state = json.loads((fleet.run_dir / "fleet.json").read_text(encoding="utf-8"))
    return psutil.Process(next(p["pid"] for p in state["processes"] if p["name"].startswith("gateway")))


def attack(fleet: RunningFleet, arguments: argparse.Namespace, verdicts: Verdicts) -> list[float]:
    """All hostile calls, in three rounds; the gateway's resident MiB after each."""
    rng = random.Random(arguments.seed)
    gateway = gateway_process(fleet)
    url = fleet.http[0] if fleet.http[0].startswith("http") else f"http://{fleet.http[0]}"
    http_address = url.removeprefix("http://")
    models = [MODEL, VARIANT]
    resident_mib = []
    for third in range(3):
        seed = arguments.seed * 3 + third
        each = -(-arguments.each // 3)
        with grpc.insecure_channel(fleet.grpc[0]) as channel:
            methods = grpc_messages.methods(channel)
            words = grpc_messages.Words(models)
            grpc_messages.ask_all(channel, methods, words, verdicts, each=each, seed=seed)
            grpc_messages.ask_too_much(channel, methods[third::3], verdicts)
        http_requests.ask_all(url, models, verdicts, each=each, seed=seed)
        count = arguments.connections // 3
        send_all(fleet.grpc[0], grpc_connections(GENERATE, rng, count), verdicts, kind="grpc frames")
        send_all(http_address, http_connections(rng, count), verdicts, kind="http bytes")
        resident_mib.append(round(gateway.memory_info().rss / 2**20, 1))
    return resident_mib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--connections", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    verdicts = Verdicts()
    with running(fleet_document(workers=1, variant=VARIANT, max_sequences=32, kv_mib=64)) as fleet:
        others = Others(fleet.grpc[0])
        following = threading.Thread(target=others.follow)
        following.start()
        pid = gateway_process(fleet).pid
        started_s = time.monotonic()
        try:
            with slow_connections([fleet.http[0].removeprefix("http://"), fleet.grpc[0]], 50):
                resident_mib = attack(fleet, arguments, verdicts)
        finally:
            others.stop()
            following.join()
        took_s = time.monotonic() - started_s
        survived = gateway_process(fleet).pid == pid
    grown_mib = round(resident_mib[-1] - resident_mib[0], 1)
    passed = (
        not verdicts.faults
        and survived
        and not others.failure
        and not others.wrong
        and grown_mib <= MOST_GROWTH_MIB
    )
    figures: dict[str, object] = {
        "calls": verdicts.calls,
        "took_s": round(took_s, 1),
        "outcomes": {kind: dict(counter) for kind, counter in sorted(verdicts.outcomes.items())},
        "faults": verdicts.faults,
        "gateway_survived": survived,
        "gateway_resident_mib": resident_mib,
        "gateway_grown_mib": grown_mib,
        "other_streams": others.streams,
        "other_streams_wrong": others.wrong,
        "other_streams_failure": others.failure,
        "other_streams_longest_s": round(others.longest_s, 3),
        "passed": passed,
    }
    print(json.dumps(figures, indent=2))
    print(write_result("hostile", figures))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
