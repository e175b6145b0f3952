"""Whole decode steps of the engine on a GPU: that graphs and device sampling are right, then what they save.

Random weights: what a step computes does not depend on what the answer says.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_checks import Check
from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest
from trireme.engine.device_choice import DeviceChooser
from trireme.engine.graph_capture import CudaCapturer
from trireme.engine.sampling import SamplingState
from trireme.engine.speculation.token_tree import TokenTree
from trireme.engine.token_choice import TorchChooser
from trireme.kernels.cuda_launch import Launcher
from trireme.models.config import Family, ModelConfig, RopeConfig
from trireme.models.decoder import Decoder
from trireme.models.decoder_layer import DecoderLayer
from trireme.models.feed_forward import DenseFeedForward

_LOGPROB_STEP = 0.05
"""What a log-probability may differ by between a graph, with its padding, and a step without: products of
other sizes are rounded otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a model of the Llama family."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int


TINY = Shape(layers=2, hidden=256, inner=512, heads=4, kv_heads=2, vocab=2000)
SEVEN_B = Shape(layers=32, hidden=4096, inner=11008, heads=32, kv_heads=32, vocab=32000)


def random_decoder(shape: Shape, device: torch.device, *, max_positions: int) -> Decoder:
    """A model of random bfloat16 weights, small enough that activations stay finite."""
    head_dim = shape.hidden // shape.heads
    config = ModelConfig(
        model_type="llama",
        family=Family.LLAMA,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=1e-5,
        activation="silu",
        tie_embeddings=False,
        rope=RopeConfig(),
    )
    rows = (shape.heads + 2 * shape.kv_heads) * head_dim

    def matrix(outputs: int, inputs: int) -> Tensor:
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device)
        return weight.normal_(0.0, inputs**-0.5)

    norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
    layers = [
        DecoderLayer(
            input_norm=norm,
            qkv=matrix(rows, shape.hidden),
            qkv_bias=None,
            qk_norm=None,
            out=matrix(shape.hidden, shape.hidden),
            out_bias=None,
            post_attention_norm=None,
            mlp_norm=norm,
            post_mlp_norm=None,
            feed_forward=DenseFeedForward(
                gate_up=matrix(2 * shape.inner, shape.hidden),
                gate_up_bias=None,
                down=matrix(shape.hidden, shape.inner),
                down_bias=None,
                activation="silu",
            ),
            window=None,
        )
        for _ in range(shape.layers)
    ]
    return Decoder(
        config,
        embedding=matrix(shape.vocab, shape.hidden),
        layers=layers,
        final_norm=norm,
        head=matrix(shape.vocab, shape.hidden),
        max_positions=max_positions,
    )


def check_choices(launcher: Launcher, device: torch.device, *, vocab: int, rows: int = 24) -> list[Check]:
    """Tokens that the device chooses, over three steps and all options, against PyTorch's."""
    ours, theirs = (_mixed_states(rows, vocab, device) for _ in range(2))
    chooser = DeviceChooser(launcher, device, vocab_size=vocab, most_sequences=rows)
    drafts = [TokenTree(((row * 7) % vocab,) * (row % 4), (-1, -1, 0)[: row % 4]) for row in range(rows)]
    wrong = 0
    for step in range(3):
        drafted: Sequence[TokenTree] = drafts if step else ()
        count = rows + (sum(map(len, drafts)) if step else 0)
        logits = torch.randn(count, vocab, device=device) * 3
        got = chooser.begin(logits, ours, drafted).wait()
        expected = TorchChooser().begin(logits, theirs, drafted).wait()
        wrong += sum(
            one.token_id != other.token_id for one, other in zip(got.sampled, expected.sampled, strict=True)
        )
        wrong += list(map(tuple, got.paths)) != list(map(tuple, expected.paths))
        for one, other in zip(ours, theirs, strict=True):
            one.observe(step)
            other.observe(step)
    return [Check("device choice", float(wrong))]


def _mixed_states(count: int, vocab: int, device: torch.device) -> list[SamplingState]:
    wishes = (
        {"temperature": 0.0, "logprobs": 3},
        {"top_p": 0.9, "presence_penalty": 0.5},
        {"top_k": 40, "repetition_penalty": 1.3, "logit_bias": {3: 5.0}},
        {"min_p": 0.02, "frequency_penalty": 0.7, "min_tokens": 9},
        {},
    )
    return [
        SamplingState(
            SamplingParams(seed=row, **wishes[row % len(wishes)]),  # type: ignore[arg-type]
            stop_ids=(1, 2),
            prompt_ids=(4, 5, 5),
            output_ids=(6, 6),
            vocab_size=vocab,
            device=device,
        )
        for row in range(count)
    ]


def check_graphs(device: torch.device) -> list[Check]:
    """Log-probabilities of steps replayed from graphs of all sizes, against steps without."""
    model = random_decoder(TINY, device, max_positions=2048)
    engine = _engine(model, graphs=True)
    with_graphs, without = _answers(engine), _answers(_engine(model, graphs=False))
    # None are replayed where one could not be captured, or gave other scores than a run without it.
    worst = 0.0 if engine.stats().graph_steps else math.inf
    for name, logprobs in with_graphs.items():
        for one, other in zip(logprobs, without[name], strict=True):
            difference = max(abs(value - other.get(token, value)) for token, value in one.items())
            worst = max(worst, difference if one.keys() & other.keys() else math.inf)
    return [Check("decode graphs", worst / _LOGPROB_STEP)]


def _answers(engine: Engine) -> dict[str, list[dict[int, float]]]:
    """Log-probabilities of the likeliest tokens, by sequence and step; every token is forced."""
    for number in range(9):
        engine.add(
            SequenceRequest(
                sequence_id=str(number),
                prompt_token_ids=[(3 * place + number) % TINY.vocab for place in range(40 * number + 3)],
                sampling=SamplingParams(
                    max_tokens=30 + 4 * number, temperature=0.0, logit_bias={number: 100.0}, logprobs=5
                ),
            )
        )
    found: dict[str, list[dict[int, float]]] = {}
    with torch.inference_mode():
        while engine.has_work:
            for output in engine.step().outputs:
                if output.error is not None:
                    raise output.error
                found.setdefault(output.sequence_id, []).append(dict(output.top_logprobs))
    engine.close()
    return found


def _engine(model: Decoder, *, graphs: bool, rows: int = 16) -> Engine:
    settings = EngineSettings(
        num_blocks=rows * 32,
        max_num_seqs=rows,
        max_batch_tokens=4096,
        decode_graphs=graphs,
    )
    capturer = CudaCapturer(model.device) if graphs else None
    return Engine(model, settings, eos_token_ids=frozenset(), capturer=capturer)


def measure_decode(device: torch.device, copy_bytes_per_s: float) -> dict[str, object]:
    """Milliseconds of a step of a 7B-shaped model in bfloat16, with graphs and without, and as a multiple of
    reading its weights at the rate at which the GPU copies."""
    model = random_decoder(SEVEN_B, device, max_positions=2048)
    floor_s = model.step_bytes / copy_bytes_per_s
    figures: dict[str, object] = {}
    for batch in (1, 8, 64):
        times = {
            name: _step_seconds(_engine(model, graphs=graphs, rows=batch), batch)
            for name, graphs in (("graphs", True), ("no_graphs", False))
        }
        figures[f"batch {batch}"] = {
            **{f"{name}_ms": round(each * 1e3, 3) for name, each in times.items()},
            "times_faster": round(times["no_graphs"] / times["graphs"], 3),
            "share_of_floor": round(floor_s / times["graphs"], 3),
        }
    return figures


def _step_seconds(engine: Engine, batch: int, *, steps: int = 100) -> float:
    """Median of steps in which `batch` sequences decode."""
    for number in range(batch):
        engine.add(
            SequenceRequest(
                sequence_id=str(number),
                prompt_token_ids=[number % 1000 + 5] * 100,
                sampling=SamplingParams(max_tokens=steps + 60, seed=number, top_p=0.9),
            )
        )
    times: list[float] = []
    while engine.has_work and len(times) < steps:
        started_s = time.perf_counter()
        result = engine.step()
        if len(result.outputs) == batch:
            times.append(time.perf_counter() - started_s)
    engine.close()
    return statistics.median(times[20:])
