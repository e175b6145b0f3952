"""Layer-wise preloading against its model: what a step waits for KV that arrives while it computes.

    python -m benchmarks.preload_overlap [--rounds 40]

A random Llama computes 32 new tokens after a stored history of 512 that a modelled link brings from host
memory. A layer takes 0.5, 1, 2 or 5 times as long to load as to compute with the history resident; none or
`layers_to_preload` layers are there before the sequence joins. The time of that step stands against
`policies.kv_load.finish_s`. Then, at equal times, the time from the request to its first token with
layer-wise loading against loading first and computing after: 2L / (L + 1) in theory.

One compute thread, so that copies have the other core. A step is compared with the model at its own compute
time, which is its time less its waits; steps in which the machine was slower than just before by more than
15 % are left out. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.fleet import write_result
from trireme.engine import Engine, EngineSettings, Link, SamplingParams, SequenceRequest, StoredBlock
from trireme.kvcache.block_codec import payload_checksum
from trireme.loading.whole import load_model
from trireme.models.model import Model
from trireme.policies.kv_load import finish_s, layers_to_preload

HISTORY_TOKENS = 512
NEW_TOKENS = 32
BLOCK_TOKENS = 16
LAYERS = 12
RATIOS = (0.5, 1.0, 2.0, 5.0)
SALT = b"benchmark"


@dataclass(frozen=True, slots=True)
class Trial:
    """One request whose history was loaded."""

    load_s: float
    """Of a layer, over the modelled link."""
    step_s: float
    """Of the step in which it joined."""
    stall_s: float
    """The part of the step in which it waited."""
    ttft_s: float
    """From the request to the end of that step, the load included."""

    @property
    def compute_s(self) -> float:
        """Of a layer, in this step."""
        return (self.step_s - self.stall_s) / LAYERS

    def is_quiet(self, ratio: float) -> bool:
        """Nothing else ran during the step: it computed about as fast as just before."""
        return self.load_s / self.compute_s > 0.85 * ratio

    def model_s(self, preloaded: int) -> float:
        """What the step should take."""
        return finish_s(self.load_s, self.compute_s, LAYERS, preloaded=preloaded)


def median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def random_model(directory: Path) -> Model:
    """A layer takes about a millisecond, with little KV, so that copying costs no compute."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return load_model(directory)


def engine_of(model: Model, *, layers: int = 1, bytes_per_s: float | None = None) -> Engine:
    """An empty engine whose sequences join their loads after `layers` layers."""
    settings = EngineSettings(num_blocks=64, block_size=BLOCK_TOKENS, max_batch_tokens=1024)
    return Engine(model, settings, preload_layers=layers, link=Link(in_bytes_per_s=bytes_per_s))


def request_of(prompt: list[int]) -> SequenceRequest:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    return SequenceRequest(sequence_id="one", prompt_token_ids=prompt, sampling=sampling, salt=SALT)


def history_of(model: Model, prompt: list[int]) -> list[StoredBlock]:
    """The stored blocks of the prompt's history."""
    engine = engine_of(model)
    request = request_of(prompt)
    names = engine.missing_prefix(request)[: HISTORY_TOKENS // BLOCK_TOKENS]
    engine.add(request)
    while engine.has_work:
        engine.step()
    payloads = [engine.export_block(name) for name in names]
    return [StoredBlock(name, p, payload_checksum(p)) for name, p in zip(names, payloads, strict=True) if p]


def resident_step(model: Model, prompt: list[int], stored: list[StoredBlock]) -> tuple[float, int]:
    """Seconds of the step that computes the new tokens with the history resident; its first token."""
    engine = engine_of(model)
    for block in stored:
        engine.import_block(block.block_hash, memoryview(block.payload))
    engine.add(request_of(prompt))
    result = engine.step()
    assert sum(work.prefill_tokens for work in result.work) == NEW_TOKENS
    return result.seconds, result.outputs[0].token_id or 0


def loaded(
    model: Model, prompt: list[int], stored: list[StoredBlock], *, layers: int, load_s: float, token: int
) -> Trial:
    """Add the request with its stored history and step until it is answered."""
    layer_bytes = sum(len(block.payload) for block in stored) / LAYERS
    engine = engine_of(model, layers=layers, bytes_per_s=layer_bytes / load_s)
    started_s = time.perf_counter()
    engine.add(request_of(prompt), stored=stored)
    while not (result := engine.step()).outputs:
        pass
    ttft_s = time.perf_counter() - started_s
    assert result.outputs[0].token_id == token, "a load has changed the answer"
    assert sum(work.prefill_tokens for work in result.work) == NEW_TOKENS
    stall_s = engine.stats().stall_s
    engine.close()
    return Trial(load_s, result.seconds, stall_s, ttft_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model = random_model(Path(directory))
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, 512, (HISTORY_TOKENS + NEW_TOKENS,), generator=generator).tolist()
    stored = history_of(model, prompt)
    token = resident_step(model, prompt, stored)[1]

    def trial(ratio: float, layers: int) -> Trial:
        compute_s = min(resident_step(model, prompt, stored)[0] for _ in range(3)) / LAYERS
        load_s = ratio * compute_s
        return loaded(model, prompt, stored, layers=layers, load_s=load_s, token=token)

    cases = [
        (ratio, layers) for ratio in RATIOS for layers in sorted({0, layers_to_preload(ratio, 1.0, LAYERS)})
    ]
    trials: dict[tuple[float, int], list[Trial]] = {case: [] for case in [*cases, (1.0, LAYERS)]}
    for _ in range(rounds):
        for case, done in trials.items():
            done.append(trial(*case))

    rows = []
    for ratio, layers in cases:
        quiet = [one for one in trials[ratio, layers] if one.is_quiet(ratio)]
        if not quiet:
            raise SystemExit("the machine is too busy for this benchmark")
        finish = [one.step_s / one.model_s(layers) for one in quiet]
        stall = [(one.stall_s - one.model_s(layers)) / (LAYERS * one.compute_s) + 1.0 for one in quiet]
        rows.append(
            {
                "load_to_compute": ratio,
                "preloaded_layers": layers,
                "trials": len(quiet),
                "measured_load_to_compute": median(one.load_s / one.compute_s for one in quiet),
                "finish_to_model": median(finish),
                "stall_to_resident_step": median(one.stall_s / (LAYERS * one.compute_s) for one in quiet),
                "stall_error_to_resident_step": median(stall),
            }
        )
        print(rows[-1])
    after, beside = (
        median(one.ttft_s / one.load_s for one in trials[case] if one.is_quiet(1.0))
        for case in ((1.0, LAYERS), (1.0, 0))
    )
    speedup = round(after / beside, 3)
    theory = 2 * LAYERS / (LAYERS + 1)
    print(f"first token at equal times: {speedup:.2f} times as fast as loading first (theory {theory:.2f})")
    write_result(
        "preload_overlap",
        {
            "layers": LAYERS,
            "history_tokens": HISTORY_TOKENS,
            "new_tokens": NEW_TOKENS,
            "overlap": rows,
            "ttft_sequential_to_layer_wise": speedup,
            "ttft_sequential_to_layer_wise_theory": round(theory, 3),
        },
    )


if __name__ == "__main__":
    main()
