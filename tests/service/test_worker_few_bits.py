"""A worker process serves what its fleet file says: weights in few bits, KV in few bits."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.service.test_worker import Bench, FakeGateway, bench, checkpoint
from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest, build
from trireme.quant.formats import weight_format
from trireme.quant.writing import quantize_checkpoint

__all__ = ("bench", "checkpoint")  # fixtures

PROMPTS = {f"r{number}": [3 + number, 5, 7, 11, 13 + number] * 7 for number in range(6)}
NEW_TOKENS = 24


def engine_alone(directory: Path) -> Engine:
    """An engine in this process, on the same weights."""
    return build(directory, settings=EngineSettings(num_blocks=64, kv_dtype="int8"))


def answer(engine: Engine, prompt: list[int]) -> list[int]:
    """What it says when it runs nothing else."""
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    engine.add(SequenceRequest(sequence_id="alone", prompt_token_ids=prompt, sampling=sampling))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [output.token_id for output in engine.step().outputs if output.token_id is not None]
    return tokens


async def test_a_worker_answers_from_few_bits_as_an_engine_alone_does(
    bench: Bench, checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "quantized"
    quantize_checkpoint(checkpoint, directory, weight_format("fp6_e2m3"))
    document = yaml.safe_load(bench.fleet.read_text())
    variant = {"checkpoint": str(directory), "precision": "fp6", "kv_dtype": "int8"}
    document["models"]["small"]["variants"]["small-v"] = variant
    bench.fleet.write_text(yaml.safe_dump(document))
    bench.start_worker()
    [record] = await bench.workers()
    async with FakeGateway(record.grpc_address) as gateway:
        for name, prompt in PROMPTS.items():
            await bench.admit(name, prompt=prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
        await gateway.until(lambda: len(gateway.finished) == len(PROMPTS))
    engine = engine_alone(directory)
    assert gateway.tokens == {(name, 0): answer(engine, prompt) for name, prompt in PROMPTS.items()}
    [status] = record.worker.variants
    assert status.kv_namespace == f"{engine.model_key}/{engine.kv_layout}"
    assert "int8" in status.kv_namespace
